"""Image files of any kind -> 8-bit RGB.

What is done, so that no mode is silently wrong: palettes are looked up; CMYK is converted; more
than 8 bits are scaled by the set's range (`depth`; 16-bit grey without one by v / 257, rounded;
plain Pillow clips at 255); transparent pixels are laid over white; grey is repeated; the camera's
orientation (EXIF) is applied; of an animation the first frame is taken. 32-bit integers beyond 16
bits and floats are refused where no range is given.
What stands beside the picture (profiles, texts, EXIF) costs no picture where it cannot be read.
"""

import contextlib
import functools
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.formats import depth, dicom, metadata, png

SUFFIXES = frozenset(
    f".{kind}"
    for kind in [
        "png",
        "jpg",
        "jpeg",
        "webp",
        "bmp",
        "gif",
        "tif",
        "tiff",
        "ppm",
        "pgm",
        "pbm",
        "pnm",
        "jp2",
        "tga",
        "avif",
        "dcm",
    ]
)


# Pillow's names of them. It knows others, of which some run programs: an EPS runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF")

#: Called once for an image of which something beside the picture could not be read.
OnUnreadable = Callable[[], object] | None

_TILE_WIDTH, _TILE_LENGTH = 322, 323
_LONG_COMMENT = re.compile(rb"P[1-7fF](?:\s|#[^\n\r]{0,4096}[\n\r])*#[^\n\r]{4096}")

# Pillow's plug-ins raise almost anything on broken files.
_BROKEN = (
    *(OSError, ValueError, SyntaxError, EOFError, KeyError, IndexError, TypeError),
    *(struct.error, zlib.error, OverflowError, ZeroDivisionError, AttributeError, AssertionError),
    RuntimeError,
)

#: Pixels of an image at most, where no more are allowed: what Pillow warns of.
MOST_PIXELS = 89_478_485


# Pillow refuses twice as many, and warns between: here they are refused.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def allow(pixels: int) -> None:
    """Lets this process, and those that it forks, decode larger images, or only smaller ones.

    Args:
        pixels: Of an image at most.
    """
    if pixels < 1:
        raise UserError(f"max_pixels is {pixels}: give 1 or more")
    Image.MAX_IMAGE_PIXELS = pixels


def _over_white(image: Image.Image) -> Image.Image:
    """An image with transparency as RGB."""
    laid = Image.new("RGB", image.size)
    for box in depth.bands(image):
        part = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        laid.paste(Image.alpha_composite(white, part).convert("RGB"), box)
    return laid


def to_rgb(
    image: Image.Image, on_unreadable: OnUnreadable = None, span: depth.Range | None = None
) -> Image.Image:
    """Any image as mode L (grey) or RGB, upright.

    Args:
        image: As Pillow opened it.
        on_unreadable: Called where the orientation cannot be read: the image is then not turned.
        span: Range of more than 8 bits, see `depth`.

    Returns:
        The image in mode "L" or "RGB".

    Raises:
        ValueError: Its mode has no fixed range.
    """
    image.load()
    if image.mode not in ("L", "RGB") or "exif" in image.info or "xmp" in image.info:
        try:
            image = ImageOps.exif_transpose(image)
        except _BROKEN:
            if on_unreadable is not None:
                on_unreadable()
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if depth.is_deep(image):
        return depth.scaled(image, span)
    if image.mode == "1":
        return image.convert("L")
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("RGB")


def _read(
    content: bytes,
    size: int | None = None,
    on_unreadable: OnUnreadable = None,
    span: depth.Range | None = None,
) -> Image.Image | NDArray[np.uint8]:
    """As `read`, or an image's pixels where those are had without it.

    Args:
        content: The file's bytes.
        size: A JPEG's sides come down to it: it is decoded at a half, a quarter or an eighth of
            its own where half as much again is left to be resized. With less left the picture is
            visibly sharper than `fit` makes it of the whole one (26 dB, where 35 are kept).
        on_unreadable: See `read`.
        span: See `to_rgb`.
    """
    with _one_line(content):
        if dicom.is_dicom(content):
            return dicom.read(content, span, _limit)
        if content.startswith(png.SIGNATURE):
            plain = png.plain(content)
            if plain is not None:
                return plain
            _limit(png.size(content))
            png.check_rows(content)
        try:
            return _by_pillow(content, size, on_unreadable, span)
        except _BROKEN:
            bare = metadata.without(content)
            if bare is None:
                raise
            image = None
            with contextlib.suppress(*_BROKEN):
                image = _by_pillow(bare, size, None, span)
            if image is None:
                raise
            if on_unreadable is not None:
                on_unreadable()
            return image


@contextlib.contextmanager
def _one_line(content: bytes) -> Iterator[None]:
    """Makes a ValueError of one line of all that Pillow raises."""
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError("it is no image of a known kind" if content else "it is empty") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(_too_many()) from None
    except MemoryError:
        raise ValueError("it does not fit in memory; make it smaller") from None
    except _BROKEN as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of the formats that this Pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _too_many() -> str:
    most = Image.MAX_IMAGE_PIXELS or MOST_PIXELS
    return (
        f"it has too many pixels (more than {most:,}); make it smaller, or allow them (max_pixels)"
    )


def _limit(size: tuple[int, int]) -> None:
    if math.prod(size) > (Image.MAX_IMAGE_PIXELS or MOST_PIXELS):
        raise ValueError(_too_many())


def opened(content: bytes) -> ImageFile.ImageFile:
    """An image as Pillow opens it, of a format that is read here; its pixels come later.

    Args:
        content: The file's bytes.

    Raises:
        UnidentifiedImageError: It is of no such format.
        ValueError: It has more pixels than are allowed.
    """
    if _LONG_COMMENT.match(content):  # Pillow reads it letter by letter, and copies it each time
        raise ValueError("its header has a comment of more than 4,096 bytes")
    formats = _formats()
    if content.startswith(png.SIGNATURE):
        formats = ("PNG",)
    elif content.startswith(b"\xff\xd8"):
        formats = ("JPEG",)
    image = Image.open(io.BytesIO(content), formats=formats)
    _limit(image.size)
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than it is
    _limit((_number(tags.get(_TILE_WIDTH)), _number(tags.get(_TILE_LENGTH))))
    return image


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def kind_of(content: bytes) -> str | None:
    """An image's usual extension, such as "jpg"; None where it is no image."""
    if dicom.is_dicom(content):
        return "dcm"
    try:
        kind = (opened(content).format or "").lower()
    except _BROKEN:
        return None
    return {"jpeg": "jpg", "jpeg2000": "jp2"}.get(kind, kind) or None


def _by_pillow(
    content: bytes, size: int | None, on_unreadable: OnUnreadable, span: depth.Range | None
) -> Image.Image:
    image = opened(content)
    if size is not None:
        least = size + size // 2
        image.draft(None, (least, least))  # of JPEGs; others have no such way
    half = depth.other_half(image)
    found = to_rgb(image, on_unreadable, span)
    if not half or span in (None, depth.FULL) or "transparency" in image.info:
        return found
    return depth.scaled(found, span, to_rgb(depth.with_half(opened(content), half)))


def values(content: bytes) -> depth.Seen | None:
    """The values of a picture of more than 8 bits; None of others, and of those that are broken."""
    with contextlib.suppress(ValueError), _one_line(content):
        if dicom.is_dicom(content):
            return dicom.values(content, _limit)
        image = opened(content)
        half = depth.other_half(image)
        if half or depth.is_deep(image):
            low = depth.with_half(opened(content), half) if half else None
            return depth.seen(image, low)
    return None


def _image(found: Image.Image | NDArray[np.uint8]) -> Image.Image:
    return found if isinstance(found, Image.Image) else Image.fromarray(found)


def read(
    content: bytes, on_unreadable: OnUnreadable = None, span: depth.Range | None = None
) -> Image.Image:
    """A whole image file as mode L or RGB.

    Args:
        content: The file's bytes.
        on_unreadable: Called where metadata cannot be read, and was passed over.
        span: Range of more than 8 bits, see `depth`.

    Returns:
        The upright image.

    Raises:
        ValueError: It is broken or of no known kind; one line that says how.
    """
    return _image(_read(content, None, on_unreadable, span))


def fit(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` (bicubic, antialiased), then the centre square.

    To the pixel what transformers' image processors do where Pillow resizes for them, so that an
    export sees what was scored; by torchvision they differ by one level of 255.

    Args:
        image: Mode L or RGB.
        size: Pixels.

    Returns:
        The image, size x size.
    """
    if image.size == (size, size):
        return image
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def prepare(
    content: bytes,
    size: int | None,
    on_unreadable: OnUnreadable = None,
    span: depth.Range | None = None,
) -> bytes:
    """An image file as it is packed: fitted to a square, PNG, without loss.

    Args:
        content: The file's bytes.
        size: Side of the square in pixels; None keeps the image's own.
        on_unreadable: See `read`.
        span: See `read`.

    Returns:
        A PNG file, grey or RGB.

    Raises:
        ValueError: See `read`.
    """
    image = read(content, on_unreadable, span)
    if size is not None:
        image = fit(image, size)
    image.info.clear()  # no colour profiles, no dates: equal pixels make equal files
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def decode(
    content: bytes,
    size: int | None,
    name: str = "image",
    on_unreadable: OnUnreadable = None,
    span: depth.Range | None = None,
) -> NDArray[np.uint8]:
    """An image file as pixels.

    Args:
        content: The file's bytes.
        size: Images of another size are fitted to this square; None leaves them as they are.
        name: Of the sample, for errors.
        on_unreadable: See `read`.
        span: See `read`.

    Returns:
        uint8 [3, H, W], RGB.

    Raises:
        BrokenData: The image is unreadable.
    """
    try:
        found = _read(content, size, on_unreadable, span)
    except ValueError as error:
        raise BrokenData(
            f"{name}: the image cannot be read: {error}: pack it again from a whole file, or"
            " allow some to be skipped (--data.skip_broken)"
        ) from None
    ready = isinstance(found, np.ndarray) and found.shape[:2] == (size, size)
    if size is not None and not ready:
        found = fit(_image(found), size)
    pixels = np.asarray(found)
    if pixels.ndim == 2:
        return np.broadcast_to(pixels, (3, *pixels.shape))
    return pixels.transpose(2, 0, 1)
