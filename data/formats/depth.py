"""Pictures of more than 8 bits -> 8 bits: which values are black and white.

Cameras of 12 bits and scanners of bones write 0 to 4095 into 16-bit files; floats have no range at
all. So a range (low, high) belongs to a set: v is shown as 255 (v - low) / (high - low), rounded,
what lies outside as 0 or 255.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from selfdistill.data.errors import UserError
from selfdistill.data.formats.png import SIGNATURE

#: The values of a picture that are black and white.
Range = tuple[float, float]
#: Of 16-bit files whose pictures use all of it: v / 257.
FULL: Range = (0.0, 65535.0)
#: First bytes of a file by which `may_be_deep` judges.
HEAD = 32

_LARGEST = 1e30  # beyond, differences of floats of 32 bits are none
#: Pixels that are computed at a time, so that large images need little memory.
ROWS = 2**22
# First bytes of kinds that have 8 bits, or that Pillow reads as such.
_SHALLOW = (b"\xff\xd8", b"GIF8", b"BM", b"RIFF")
_COLOURS = ("RGB", "RGBA")
# Pillow's names of 16-bit colours in a file: the half of a value that it takes, and the other.
_OTHER = {
    f"{colours};16{order}": f"{colours};16{other}"
    for colours in ("RGB", "RGBA", "RGBX")
    for order, other in (("B", "L"), ("L", "B"), ("N", "B"))
}


def check(span: Range, cure: str) -> Range:
    """A range as it may be used.

    Raises:
        UserError: It is empty, upside down, or of no numbers.
    """
    low, high = span
    finite = all(abs(one) <= _LARGEST for one in span)
    if not finite or not low < high or not math.isfinite(255 / (high - low)):
        raise UserError(f"the range {low:g},{high:g} has no values in it: {cure}")
    return span


def parse(text: str | None) -> Range | str | None:
    """The option --range: "auto", LOW,HIGH, or None where it is not given.

    Raises:
        UserError: It is something else.
    """
    if text is None or text == "auto":
        return text
    cure = "give auto or LOW,HIGH, such as 0,4095"
    try:
        low, high = (float(part) for part in text.strip("()[] ").split(","))
    except ValueError:
        raise UserError(f"--range {text}: {cure}") from None
    return check((low, high), cure)


def entry(span: Range | None) -> dict[str, list[float]]:
    """What a manifest notes of a range, among what is known of the images."""
    if span is None:
        return {}
    return {"range": [int(one) if one.is_integer() else one for one in map(float, span)]}


def may_be_deep(head: bytes) -> bool:
    """Whether a file may have more than 8 bits.

    Args:
        head: Its first `HEAD` bytes.
    """
    if head.startswith(SIGNATURE):
        return len(head) > 24 and head[24] > 8
    return not head.startswith(_SHALLOW)


def is_deep(image: Image.Image) -> bool:
    """Whether Pillow keeps a picture's values whole, one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _kinds(image: ImageFile.ImageFile) -> set[str]:
    """Pillow's names of what a file has; its pixels are not read yet."""
    kinds = [args if isinstance(args, tuple) else (args,) for args in (t.args for t in image.tile)]
    return {str(args[0]) for args in kinds if args}


def is_halved(image: ImageFile.ImageFile) -> bool:
    """Whether Pillow takes the upper halves of 16-bit values alone; see `other_half`."""
    return not is_deep(image) and any(";16" in name for name in _kinds(image))


def other_half(image: ImageFile.ImageFile) -> str:
    """How Pillow calls the half of 16-bit colours that it leaves out.

    Args:
        image: Opened, its pixels not read yet.

    Returns:
        For `with_half`; "" where nothing is left out, or Pillow has no name for it.
    """
    names = _kinds(image)
    return _OTHER.get(names.pop(), "") if len(names) == 1 and image.mode in _COLOURS else ""


def with_half(image: ImageFile.ImageFile, name: str) -> Image.Image:
    """The picture of the other half of its values; `image` is another opened one of the file."""
    image.tile = [
        tile._replace(args=(name, *tile.args[1:]) if isinstance(tile.args, tuple) else name)
        for tile in image.tile
    ]
    return image


def bands(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of whole rows, from the top to the bottom."""
    width, height = image.size
    rows = max(1, ROWS // max(1, width))
    for top in range(0, height, rows):
        yield 0, top, width, min(height, top + rows)


def _values(
    image: Image.Image, low: Image.Image | None, box: tuple[int, int, int, int]
) -> NDArray[np.int64] | NDArray[np.float64]:
    """Values of a part of a picture, [h, w] or [h, w, 3]; of transparency none."""
    values = np.asarray(image.crop(box))
    if low is not None:
        lower = np.asarray(low.crop(box), np.int64)
        return values[..., :3].astype(np.int64) * 256 + lower[..., :3]
    if values.dtype.kind != "f":
        return values.astype(np.int64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are no numbers (NaN or infinite)")
    return values.astype(np.float64)


class Seen(NamedTuple):
    """What values pictures have.

    Attributes:
        low: The smallest.
        high: The largest.
        whole: All are whole numbers.
        windows: Files that say themselves which values are black and white, as DICOM does.
        pictures: How many they are.
    """

    low: float
    high: float
    whole: bool = True
    windows: int = 0
    pictures: int = 1


def seen(image: Image.Image, low: Image.Image | None = None) -> Seen:
    """The values of one picture.

    Args:
        image: A deep one, or RGB or RGBA of the upper halves of its values.
        low: That of their lower halves.

    Raises:
        ValueError: It has values that are no numbers.
    """
    found = []
    for box in bands(image):
        values = _values(image, low, box)
        found.append(Seen(float(values.min()), float(values.max()), image.mode != "F"))
    return joined(found)._replace(pictures=1)


def seen_halved(image: Image.Image) -> Seen:
    """The values of a picture of which the upper halves alone are known, of colours and grey."""
    colours = 3 if image.mode == "RGBA" else len(image.getbands())
    shown = [image.getchannel(number).getextrema() for number in range(colours)]
    lows, highs = zip(*shown, strict=True)
    return Seen(256.0 * min(lows), 256.0 * max(highs) + 255)


def joined(found: Iterable[Seen]) -> Seen:
    """The values of several together; there must be some."""
    lows, highs, whole, windows, pictures = zip(*found, strict=True)
    return Seen(min(lows), max(highs), all(whole), sum(windows), sum(pictures))


def scaled(image: Image.Image, span: Range | None, low: Image.Image | None = None) -> Image.Image:
    """A picture in 8 bits, mode L or RGB.

    Args:
        image: See `seen`.
        span: Its range; None for `FULL`, and then other values are refused.
        low: See `seen`.

    Raises:
        ValueError: No range is known for its values.
    """
    cure = "give the range of the values when packing (--range auto, or LOW,HIGH)"
    span = None if span == FULL else span
    if span is None and image.mode == "F":
        raise ValueError(f"it has floating-point pixels: {cure}")
    out = Image.new("L" if low is None else "RGB", image.size)
    black, white = span or FULL
    for box in bands(image):
        values = _values(image, low, box)
        if span is None and values.size and (values.min() < 0 or values.max() > FULL[1]):
            raise ValueError(f"its 32-bit values are beyond 16 bits: {cure}")
        levels = np.rint((values - black) * (255 / (white - black)))
        out.paste(Image.fromarray(levels.clip(0, 255).astype(np.uint8)), box)
    return out


def choose(wanted: Range | str | None, found: Seen | None) -> tuple[Range | None, str]:
    """The range of a set, and a line about it.

    Where nothing is asked for, files with windows of their own keep these, and 16-bit pictures that
    use the upper half of their range keep it all (v / 257); others get the set's own, for they
    would come out dark.

    Args:
        wanted: From `parse`.
        found: The values of the set's pictures of more than 8 bits; None if it has none.

    Returns:
        None, and no line, where there is neither.

    Raises:
        UserError: All values are the same; some files have windows of their own, and others not.
    """
    if isinstance(wanted, tuple):
        return wanted, ""
    if found is None:
        return None, ""
    if wanted is None and 0 < found.windows < found.pictures:
        raise UserError(
            f"{found.windows} of {found.pictures} pictures of more than 8 bits name a window of"
            f" their values, the others none (values {found.low:.10g} to {found.high:.10g}): give"
            " one range for all (--range auto, or LOW,HIGH)"
        )
    if wanted is None and found.windows:
        return None, (
            f"{found.pictures} pictures are shown through the windows that their files name"
            f" (values {found.low:.10g} to {found.high:.10g}; another way: --range auto, or"
            " LOW,HIGH)"
        )
    span = found.low, found.high
    used = ""
    fits = found.whole and found.low >= 0 and found.high <= FULL[1]
    # One value alone: blank pictures among others.
    if wanted is None and fits and (found.high >= 2**15 or found.low == found.high):
        used = f", of which they use {found.low:.10g} to {found.high:.10g}"
        span = FULL
    check(span, "these pictures are blank; give another one (--range LOW,HIGH)")
    return span, (
        f"range {span[0]:.10g} to {span[1]:.10g} of the {found.pictures} pictures of more than 8"
        f" bits{used} (another one: --range auto, or LOW,HIGH)"
    )
