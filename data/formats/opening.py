"""Opens image files by Pillow: of known formats alone, not too large, errors of one line."""

import contextlib
import functools
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image, ImageFile, UnidentifiedImageError

from selfdistill.data.errors import UserError
from selfdistill.data.formats import channels, png

# Pillow's names of them. It knows others, of which some run programs: an EPS runs Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "TGA", "AVIF")

# How pictures of phones begin, behind the length of their first box.
_HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"mif1", b"msf1", b"heim", b"hevc"))

_TILE_WIDTH, _TILE_LENGTH = 322, 323
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR = 258, 262, 277, 284
_LONG_COMMENT = re.compile(rb"P[1-7fF](?:\s|#[^\n\r]{0,4096}[\n\r])*#[^\n\r]{4096}")

#: Pillow's plug-ins raise almost anything on broken files.
BROKEN = (
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


@contextlib.contextmanager
def one_line(content: bytes) -> Iterator[None]:
    """Makes a ValueError of one line of all that Pillow raises."""
    try:
        yield
    except UnidentifiedImageError:
        if content.startswith(channels.TIFF):
            raise ValueError(
                "it is broken, or a TIFF of channels, bits or compression that are not read here:"
                " convert it to grey or RGB"
            ) from None
        if content[4:12] in _HEIC:
            raise ValueError(
                "it is HEIC, which is not read here: convert it to JPEG or PNG"
            ) from None
        raise ValueError("it is no image of a known kind" if content else "it is empty") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(_too_many()) from None
    except MemoryError:
        raise ValueError("it does not fit in memory; make it smaller") from None
    except BROKEN as error:
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


def limit(size: tuple[int, int]) -> None:
    """Raises ValueError for a picture of more pixels than are allowed."""
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
    _check(image)
    return image


def _check(image: ImageFile.ImageFile) -> None:
    limit(image.size)
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose tiles may be larger than it is
    limit((_number(tags.get(_TILE_WIDTH)), _number(tags.get(_TILE_LENGTH))))
    bits = tags.get(_BITS)
    if max(map(_number, bits if isinstance(bits, tuple) else (bits,)), default=0) <= 8:
        return
    # Pillow takes their bytes for something else, without a word.
    if tags.get(_PLANAR) == 2 and tags.get(_SAMPLES) != 1:
        raise ValueError(
            "its channels of more than 8 bits lie one after the other (planar TIFF), which is not"
            " read here: convert it to grey or RGB with interleaved channels"
        )
    if tags.get(_PHOTOMETRIC) == 0:
        raise ValueError(
            "in this TIFF of more than 8 bits 0 is white, which is not read here: convert it to one"
            " where 0 is black"
        )


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


def page_of(content: bytes, page: int) -> ImageFile.ImageFile:
    """A page of a file, numbered from 1 among those that count; see `opened`.

    Where none counts, or none that can be read, the first page is the picture.
    """
    image = opened(content)
    left, frame = page - channels.counts(image), 0
    try:
        while left:
            frame += 1
            if frame >= channels.LOOKED_AT * page:
                raise EOFError
            image.seek(frame)
            left -= channels.counts(image)
    except BROKEN as error:
        if page == 1:
            return opened(content)
        if not isinstance(error, EOFError):
            raise
        raise channels.Ambiguous(f"it has no page {page}, which --channels asks for") from None
    _check(image)
    return image
