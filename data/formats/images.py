"""Image files of any kind -> 8-bit RGB.

What is done, so that no mode is silently wrong: palettes are looked up; CMYK is converted; more
than 8 bits are scaled by the set's range (`depth`; 16-bit grey without one by v / 257, rounded;
plain Pillow clips at 255); transparent pixels are laid over white; grey is repeated; the camera's
orientation (EXIF) is applied; of an animation the first frame is taken, of a TIFF the pages that
are asked for (`channels`). 32-bit integers beyond 16 bits and floats are refused where no range is
given. What stands beside the picture (profiles, texts, EXIF) costs no picture where it cannot be
read.
"""

import contextlib
import io
import re
from collections.abc import Callable
from typing import Annotated

import numpy as np
import pydantic
from numpy.typing import NDArray
from PIL import Image, ImageOps

from selfdistill.data.errors import BrokenData
from selfdistill.data.formats import channels, depth, dicom, metadata, png
from selfdistill.data.formats.fitting import Fit, fitted
from selfdistill.data.formats.opening import BROKEN, limit, one_line, opened, page_of
from selfdistill.data.formats.opening import MOST_PIXELS as MOST_PIXELS
from selfdistill.data.formats.opening import allow as allow

SUFFIXES = frozenset(
    f".{kind}"
    for kind in (
        *("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "pbm", "pnm"),
        *("jp2", "tga", "avif", "dcm"),
    )
)


#: Height and width in pixels.
Sides = tuple[int, int]


def size_of(value: object) -> int | Sides:
    """An image's size as it is typed or stands in a file: 224, "224", "224x448" or [224, 448].

    Returns:
        Pixels: the side of a square, or height and width of another rectangle.

    Raises:
        ValueError: It is none, or a side is not of 1 to 32,768 pixels.
    """
    found = [value]
    if isinstance(value, list | tuple):
        found = list(value)
    elif isinstance(value, str) and re.fullmatch("[0-9]{1,9}(x[0-9]{1,9})?", value):
        found = [int(side) for side in value.split("x")]
    if len(found) not in (1, 2) or any(type(side) is not int for side in found):
        raise ValueError("give a side in pixels, such as 224, or height x width, such as 224x448")
    numbers = [side for side in found if isinstance(side, int)]
    if not 0 < min(numbers) <= max(numbers) <= 2**15:
        raise ValueError("give sides of 1 to 32768 pixels")
    return numbers[0] if len(set(numbers)) == 1 else (numbers[0], numbers[1])


#: Side of a square, or height and width, in pixels; the last note is what --help says.
Size = Annotated[int | Sides, pydantic.PlainValidator(size_of), "int|HEIGHTxWIDTH"]


def sides(size: Size) -> Sides:
    """Height and width of a size."""
    return (size, size) if isinstance(size, int) else size


def typed(size: Size) -> str:
    """A size as it is typed: 224, or 224x448."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


#: Called once for an image of which something beside the picture could not be read.
OnUnreadable = Callable[[], object] | None

# Where Pillow finds the orientation; the last is how ImageMagick writes it into a PNG.
_TURNING = {"exif", "xmp", "Raw profile type exif"}


def _over_white(image: Image.Image) -> Image.Image:
    """An image with transparency as RGB."""
    laid = Image.new("RGB", image.size)
    for box in depth.bands(image):
        part = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", part.size, (255, 255, 255, 255))
        laid.paste(Image.alpha_composite(white, part).convert("RGB"), box)
    return laid


def _upright(image: Image.Image, on_unreadable: OnUnreadable = None) -> Image.Image:
    image.load()
    if image.mode not in ("L", "RGB") or _TURNING & image.info.keys():
        try:
            return ImageOps.exif_transpose(image)
        except BROKEN:
            if on_unreadable is not None:
                on_unreadable()
    return image


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
    image = _upright(image, on_unreadable)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if depth.is_deep(image):
        return depth.scaled(image, span)
    if image.has_transparency_data:
        return _over_white(image)
    return image.convert("L" if image.mode == "1" else "RGB")


def _read(
    content: bytes,
    size: int | None = None,
    on_unreadable: OnUnreadable = None,
    span: depth.Range | None = None,
    chosen: channels.Channels | None = None,
) -> Image.Image | NDArray[np.uint8]:
    """As `read`, or an image's pixels where those are had without it.

    Args:
        content: The file's bytes.
        size: A JPEG's sides come down to it: it is decoded at a half, a quarter or an eighth of
            its own where half as much again is left to be resized. With less left the picture is
            visibly sharper than `fit` makes it of the whole one (26 dB, where 35 are kept).
        on_unreadable: See `read`.
        span: See `to_rgb`.
        chosen: See `read`.
    """
    with one_line(content):
        if dicom.is_dicom(content):
            return dicom.read(content, span, limit)
        if content.startswith(png.SIGNATURE):
            plain = png.plain(content)
            if plain is not None:
                return plain
            limit(png.size(content))
            png.check_rows(content)
        try:
            return _by_pillow(content, size, on_unreadable, span, chosen)
        except channels.Ambiguous:
            raise
        except BROKEN:
            bare = metadata.without(content)
            if bare is None:
                raise
            image = None
            with contextlib.suppress(*BROKEN):
                image = _by_pillow(bare, size, None, span, chosen)
            if image is None:
                raise
            if on_unreadable is not None:
                on_unreadable()
            return image


def kind_of(content: bytes) -> str | None:
    """An image's usual extension, such as "jpg"; None where it is no image."""
    if dicom.is_dicom(content):
        return "dcm"
    try:
        kind = (opened(content).format or "").lower()
    except BROKEN:
        return None
    return {"jpeg": "jpg", "jpeg2000": "jp2"}.get(kind, kind) or None


def _taken(content: bytes, chosen: channels.Channels | None) -> tuple[channels.Channels, bool]:
    """Pages to read, and whether `chosen` are channels of a page instead."""
    if not content.startswith(channels.TIFF):
        return (1,), False
    image = page_of(content, 1)
    if channels.pages(lambda: opened(content), BROKEN):
        if chosen is None:
            raise channels.ask("several pages")
        return chosen, False
    extra = channels.extra(image)
    if extra and chosen is None:
        raise channels.ask(f"{len(image.getbands())} channels and {extra} more")
    return (1,), extra > 0


def _by_pillow(
    content: bytes,
    size: int | None,
    on_unreadable: OnUnreadable,
    span: depth.Range | None,
    chosen: channels.Channels | None,
) -> Image.Image:
    pages, picks = _taken(content, chosen)
    found = channels.merged([_shown(content, p, size, on_unreadable, span) for p in pages])
    return channels.picked(found, chosen) if picks and chosen else found


def _shown(
    content: bytes,
    page: int,
    size: int | None,
    on_unreadable: OnUnreadable,
    span: depth.Range | None,
) -> Image.Image:
    image = page_of(content, page)
    if size is not None:
        least = size + size // 2
        image.draft(None, (least, least))  # of JPEGs; others have no such way
    if "transparency" in image.info and depth.is_halved(image):
        raise ValueError(
            "one of its 16-bit colours stands for transparency, and their upper halves alone would"
            " be compared with it: convert it to RGBA, or to RGB of 8 bits"
        )
    if span in (None, depth.FULL) or not depth.is_halved(image):
        return to_rgb(image, on_unreadable, span)
    half = depth.other_half(image)
    if not half:
        raise ValueError(
            "of its 16-bit values the upper halves alone are read here, too few for the set's"
            " range: convert it to grey, RGB or RGBA, or give all values (--range 0,65535)"
        )
    upper = _upright(image, on_unreadable)
    lower = _upright(depth.with_half(page_of(content, page), half))
    found = depth.scaled(upper, span, lower)
    if upper.mode != "RGBA":
        return found
    found.putalpha(upper.getchannel("A"))
    return _over_white(found)


def values(content: bytes, chosen: channels.Channels | None = None) -> depth.Seen | None:
    """The values of a picture of more than 8 bits; None of others, and of those that are broken."""
    found = []
    with contextlib.suppress(ValueError), one_line(content):
        if dicom.is_dicom(content):
            return dicom.values(content, limit)
        for page in _taken(content, chosen)[0]:
            image = page_of(content, page)
            half = depth.other_half(image)
            if half or depth.is_deep(image):
                low = depth.with_half(page_of(content, page), half) if half else None
                found.append(depth.seen(image, low))
            elif depth.is_halved(image):
                found.append(depth.seen_halved(image))
        return depth.joined(found)._replace(pictures=1) if found else None
    return None


def _image(found: Image.Image | NDArray[np.uint8]) -> Image.Image:
    return found if isinstance(found, Image.Image) else Image.fromarray(found)


def read(
    content: bytes,
    on_unreadable: OnUnreadable = None,
    span: depth.Range | None = None,
    chosen: channels.Channels | None = None,
) -> Image.Image:
    """A whole image file as mode L or RGB.

    Args:
        content: The file's bytes.
        on_unreadable: Called where metadata cannot be read, and was passed over.
        span: Range of more than 8 bits, see `depth`.
        chosen: Pages or channels of TIFFs that have several, see `channels`.

    Returns:
        The upright image.

    Raises:
        ValueError: It is broken or of no known kind; one line that says how.
    """
    return _image(_read(content, None, on_unreadable, span, chosen))


def fit(image: Image.Image, size: Size, how: Fit = "crop") -> Image.Image:
    """An image of mode L or RGB in that size, see `fitting.fitted`; errors are ValueErrors."""
    with one_line(b""):
        return fitted(image, *sides(size), how)


def prepare(
    content: bytes,
    size: Size | None,
    on_unreadable: OnUnreadable = None,
    span: depth.Range | None = None,
    chosen: channels.Channels | None = None,
    how: Fit = "crop",
) -> bytes:
    """An image file as it is packed: fitted to a size, PNG, without loss.

    Args:
        content: The file's bytes.
        size: What it is fitted to, in pixels; None keeps the image's own.
        on_unreadable: See `read`.
        span: See `read`.
        chosen: See `read`.
        how: See `fitting.Fit`.

    Returns:
        A PNG file, grey or RGB.

    Raises:
        ValueError: See `read`.
    """
    image = read(content, on_unreadable, span, chosen)
    if size is not None:
        image = fit(image, size, how)
    image.info.clear()  # no colour profiles, no dates: equal pixels make equal files
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def decode(
    content: bytes,
    size: Size | None,
    name: str = "image",
    on_unreadable: OnUnreadable = None,
    span: depth.Range | None = None,
    how: Fit = "crop",
) -> NDArray[np.uint8]:
    """`pixels` for a loader, which names the sample.

    Raises:
        BrokenData: The image is unreadable.
    """
    try:
        return pixels(content, size, on_unreadable, span, how=how)
    except ValueError as error:
        raise BrokenData(
            f"{name}: the image cannot be read: {error}: pack it again from a whole file, or"
            " allow some to be skipped (--data.skip_broken)"
        ) from None


def pixels(
    content: bytes,
    size: Size | None,
    on_unreadable: OnUnreadable = None,
    span: depth.Range | None = None,
    chosen: channels.Channels | None = None,
    whole: bool = False,
    how: Fit = "crop",
) -> NDArray[np.uint8]:
    """An image file as pixels.

    Args:
        content: The file's bytes.
        size: Images of another size are fitted to this one; None leaves them as they are.
        on_unreadable: See `read`.
        span: See `read`.
        chosen: See `read`.
        whole: Decode all of a large JPEG, as packing does, not only what `size` needs.
        how: See `fitting.Fit`.

    Returns:
        uint8 [3, H, W], RGB.

    Raises:
        ValueError: See `read`.
    """
    # A turned picture's sides change places: the longer one stands for both.
    longest = None if whole or size is None else max(sides(size))
    found = _read(content, longest, on_unreadable, span, chosen)
    if size is not None and not (isinstance(found, np.ndarray) and found.shape[:2] == sides(size)):
        found = fit(_image(found), size, how)
    array = np.asarray(found)
    if array.ndim == 2:
        return np.broadcast_to(array, (3, *array.shape))
    return array.transpose(2, 0, 1)
