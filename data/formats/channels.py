"""TIFFs of several pages, or of more channels than colours: what becomes grey, or red, green, blue.

Microscopes write a channel a page, drones the infrared as a fourth channel. Which of them a model
should see is asked (--channels), and never the first taken in silence. Pages of fewer pixels, which
are marked so (NewSubfileType), and masks are no pictures of their own.
"""

from collections.abc import Callable, Sequence

from PIL import Image, ImageFile

from selfdistill.data.errors import UserError

#: Numbers from 1; one for grey or a page as it is, three for red, green and blue.
Channels = tuple[int, ...]

#: First bytes of TIFFs, and of those of more than 4 GB.
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_SUBFILE, _EXTRA = 254, 338
_REDUCED, _MASK = 1, 4
#: Pages of a file, of which most may be reduced ones.
LOOKED_AT = 64


class Ambiguous(ValueError):
    """A file of several pictures, of which none was chosen."""


def parse(text: str | None) -> Channels | None:
    """The option --channels: a number, or three with commas between; None where it is not given.

    Raises:
        UserError: It is something else.
    """
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.strip("()[] ").split(","))
    except ValueError:
        found = ()
    if len(found) not in (1, 3) or not all(1 <= one <= 2**16 for one in found):
        raise UserError(
            f"--channels {text}: give a page's or channel's number, or three of them for red, green"
            " and blue, such as 1,2,3"
        )
    return found


def extra(image: ImageFile.ImageFile) -> int:
    """How many channels of a TIFF are neither grey, nor colours, nor transparency.

    Args:
        image: As Pillow opened it.
    """
    tags = getattr(image, "tag_v2", {})
    kinds = tags.get(_EXTRA, ())
    kinds = kinds if isinstance(kinds, tuple) else (kinds,)
    return sum(kind == 0 for kind in kinds)


def counts(image: ImageFile.ImageFile) -> bool:
    """Whether a page is a picture of its own, neither a reduced one nor a mask.

    Args:
        image: As Pillow opened it, at that page.
    """
    kind = getattr(image, "tag_v2", {}).get(_SUBFILE, 0)
    return not (isinstance(kind, int) and kind & (_REDUCED | _MASK))


def pages(reopen: Callable[[], ImageFile.ImageFile], broken: tuple[type[Exception], ...]) -> bool:
    """Whether a TIFF has more pages than one that count.

    Args:
        reopen: Opens it.
        broken: What Pillow raises at a page that it cannot read, which is none.
    """
    image, found = reopen(), 0
    try:
        for page in range(LOOKED_AT):
            image.seek(page)
            found += counts(image)
            if found > 1:
                return True
    except broken:
        return False
    return True


def ask(what: str) -> Ambiguous:
    """The error where nothing is chosen."""
    return Ambiguous(
        f"it has {what}: say which to take when packing (data.pack --channels 1, or 1,2,3 for red,"
        " green and blue)"
    )


def merged(parts: Sequence[Image.Image]) -> Image.Image:
    """One page as it is, or three of grey as red, green and blue.

    Raises:
        Ambiguous: They do not fit together.
    """
    if len(parts) == 1:
        return parts[0]
    if any(part.mode != "L" for part in parts):
        raise Ambiguous("its pages have colours: take one of them (--channels 1)")
    if len({part.size for part in parts}) > 1:
        raise Ambiguous("its pages are of different sizes: take one of them (--channels 1)")
    return Image.merge("RGB", parts)


def picked(image: Image.Image, channels: Channels) -> Image.Image:
    """Channels of a picture in mode L or RGB.

    Raises:
        Ambiguous: It has no such channel, or none that is read here.
    """
    bands = image.split()
    if max(channels) > len(bands):
        raise Ambiguous(
            f"of its channels the first {len(bands)} are read here, not {max(channels)}: write"
            " those that you want into a file of their own"
        )
    return merged([bands[one - 1] for one in channels])
