"""What an official layout hands to the packer, and the small readers that layouts share."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from selfdistill.data.errors import UserError
from selfdistill.data.files import read
from selfdistill.data.sources.samples import Sample
from selfdistill.data.splits import Metric


@dataclass(frozen=True)
class Layout:
    """A data set read in its official layout.

    Attributes:
        name: The layout's name.
        classes: Names of the classes; their index is the label.
        splits: The official splits, in the official order.
        notes: What the user should know, a line each: where splits and the paper's table differ.
        kind: What the samples are.
        metric: How texts are scored.
    """

    name: str
    classes: list[str]
    splits: dict[str, list[Sample]]
    notes: list[str] = field(default_factory=list)
    kind: Literal["image", "text"] = "image"
    metric: Metric | None = None


@dataclass(frozen=True)
class Options:
    """Choices that some layouts offer; each layout reads those that concern it.

    Attributes:
        fold: DTD's published fold, 1 to 10.
        trainval: Train on the official train and validation images together.
        keep_banner: Keep the 20 rows of copyright notice below each of FGVC Aircraft's pictures.
    """

    fold: int = 1
    trainval: bool = False
    keep_banner: bool = False


def find(root: Path, places: Iterable[str], wanted: Iterable[str]) -> Path | None:
    """The first of some folders that has all the wanted files.

    Args:
        root: What the user gave.
        places: Folders to try, relative to `root`; ``"."`` is `root` itself.
        wanted: Paths inside the folder.

    Returns:
        The folder, or None.
    """
    wanted = list(wanted)
    for place in places:
        if all((root / place / name).exists() for name in wanted):
            return root / place
    return None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The non-empty lines of a text file, with their numbers from 1.

    Raises:
        UserError: The file is missing or is not text.
    """
    try:
        text = read(path, "extract the official archive again").decode()
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: extract the official archive again, whole, without moving files"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file: extract the official archive again") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Lines of ``WORD REST``, as in ``1025794 707-320`` or ``12 001.Albatross/a.jpg``.

    Raises:
        UserError: A line has one word only.
    """
    for number, line in lines(path):
        first, _, rest = line.partition(" ")
        if not rest:
            raise UserError(
                f"{path}, line {number}: {line!r} has one word where two are expected:"
                " extract the official archive again"
            )
        yield first, rest.strip()


def number_of(names: list[str], name: str, where: Path) -> int:
    """Index of a class name.

    Raises:
        UserError: The list of classes does not have it.
    """
    try:
        return names.index(name)
    except ValueError:
        raise UserError(
            f"{where}: class {name!r} is not in the list of classes:"
            " extract the official archive again"
        ) from None


def files(folder: Path, names: Iterable[tuple[str, int]]) -> list[Sample]:
    """Samples of image files in a folder.

    Args:
        folder: Where the images are.
        names: For each image its path inside `folder`, and its label.

    Raises:
        UserError: Some are missing: says how many, and names the first.
    """
    found = [(name, label, folder / name) for name, label in names]
    outside = [name for name, _, _ in found if name.startswith("/") or ".." in Path(name).parts]
    if outside:
        raise UserError(f"{folder}: its lists name {outside[0]!r}, outside of it: do not use them")
    missing = [path for _, _, path in found if not path.is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(found)} images are missing, the first is {missing[0]}:"
            " extract the official archive again, whole"
        )
    return [Sample(str(Path(name).with_suffix("")), path, label) for name, label, path in found]
