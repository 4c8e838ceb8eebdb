"""How an image comes to the size of a model: cut, bordered or squashed."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

from PIL import Image

from selfdistill.data.formats.opening import MOST_PIXELS

#: crop: scaled until it covers the size, and cut; pad: until it lies in it, with borders; squash:
#: each side for itself.
Fit = Literal["crop", "pad", "squash"]
FITS: tuple[Fit, ...] = get_args(Fit)

#: Of borders, in 0..255: ImageNet's mean colour, which models normalised by it see as 0.
BORDER = (124, 116, 104)

#: What a size does to images, for people.
WORDS = {
    "crop": "what is beyond is cut at both ends",
    "pad": "borders fill it",
    "squash": "squashed to it",
}


def fitted(image: Image.Image, high: int, wide: int, how: Fit = "crop") -> Image.Image:
    """Scales an image (bicubic, antialiased) to a size.

    By `crop` a square is to the pixel what transformers' image processors make of it where Pillow
    resizes for them, so that an export sees what was scored; by torchvision they differ by one
    level of 255. These processors cover no other rectangle: there it is what timm's evaluation
    makes of it. `pad` is timm's crop mode "border", and `squash` what both call a resize.

    Args:
        image: Mode L or RGB.
        high: Pixels.
        wide: Pixels.
        how: See `Fit`.

    Returns:
        The image of that size; RGB where borders were added.

    Raises:
        ValueError: Before it is cut it would have more pixels than are allowed.
    """
    if image.size == (wide, high):
        return image
    if how == "squash":
        return image.resize((wide, high), Image.Resampling.BICUBIC)
    if how == "pad":
        return _bordered(image, high, wide)
    if high == wide:
        short = min(image.size)
        width, height = (int(high * side / short) for side in image.size)
        left, top = (width - wide) // 2, (height - high) // 2
    else:
        ratio = min(image.height / high, image.width / wide)
        width, height = round(image.width / ratio), round(image.height / ratio)
        left, top = round((width - wide) / 2), round((height - high) / 2)
    most = max(Image.MAX_IMAGE_PIXELS or 0, MOST_PIXELS)
    if width * height > most:
        raise ValueError(
            f"it is too long and thin: scaled to cover {wide} x {high} it has more than {most:,}"
            " pixels: cut a part out of it, or give all images borders (--fit pad)"
        )
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + wide, top + high))


def _bordered(image: Image.Image, high: int, wide: int) -> Image.Image:
    ratio = max(image.height / high, image.width / wide)
    # A line of one pixel stays one.
    width, height = (max(1, round(side / ratio)) for side in image.size)
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    if (width, height) == (wide, high):
        return resized
    laid = Image.new("RGB", (wide, high), BORDER)
    laid.paste(resized, ((wide - width) // 2, (high - height) // 2))
    return laid


def told(size: object, how: Fit, *, stored: bool) -> str | None:
    """What a manifest says of it under ``fit``.

    Args:
        size: As packed; a pair is a rectangle.
        how: See `Fit`.
        stored: Whether files are stored as they are, and fitted at each reading.
    """
    if how != "crop":
        return how
    if stored or size is None:
        return None
    if isinstance(size, tuple):
        return "both sides covered, bicubic, centre crop"
    return "short side bicubic, centre crop"


def of(entry: Mapping[str, Any]) -> Fit:
    """The fit of a manifest's images; those that others made are cut where they must be."""
    found = entry.get("fit")
    return found if found in ("pad", "squash") else "crop"
