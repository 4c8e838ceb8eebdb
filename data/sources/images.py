"""Where images come from: class folders, split folders, CSV files."""

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError, counted
from selfdistill.data.formats.images import SUFFIXES
from selfdistill.data.formats.strays import is_stray
from selfdistill.data.sources import several, tables
from selfdistill.data.sources.samples import Columns, Row, Sample, Splits, grouped, names_of
from selfdistill.data.splits import ALIASES, DIVIDED

# Whole numbers below 0, which hubs write where there is no label.
_NEGATIVE = re.compile(r"-\d+(\.0*)?")


class _Walk:
    """The images below folders, each of which is walked once, and what lies there besides.

    Attributes:
        others: Files that are no images of a known kind, and their suffixes.
        empty: Folders without any file.
    """

    def __init__(self, suffixes: Collection[str] = SUFFIXES) -> None:
        self.suffixes = suffixes
        self.others: dict[Path, str] = {}
        self.empty: list[Path] = []
        self._found: dict[Path, list[Path]] = {}

    def folders(self, root: Path) -> list[Path]:
        """The folders in a folder that may be classes or splits; not other programs' leavings."""
        found = []
        for path in sorted(p for p in root.iterdir() if p.is_dir() and not is_stray(p.name)):
            if self.images(path) or not self._is_empty(path):
                found.append(path)
        return found

    def _is_empty(self, folder: Path) -> bool:
        # A link to a folder counts as something: where it leads was walked, or is refused.
        for base, folders, files in os.walk(folder):
            if files or any(os.path.islink(os.path.join(base, name)) for name in folders):
                return False
        if folder not in self.empty:
            self.empty.append(folder)
        return True

    def images(self, folder: Path) -> list[Path]:
        """All image files below a folder, in order of their paths.

        Raises:
            UserError: A folder cannot be listed, or a link leads back to a folder above it.
        """
        if folder not in self._found:
            self._found[folder] = sorted(self._walk(folder))
        return self._found[folder]

    def _walk(self, folder: Path) -> Iterator[Path]:
        linked: dict[Path, Path] = {}
        for base, folders, files in os.walk(folder, followlinks=True, onerror=_unlisted):
            folders[:] = sorted(f for f in folders if not is_stray(f))
            for inner in (Path(base, name) for name in folders):
                if not inner.is_symlink():
                    continue
                place = inner.resolve()
                if Path(base).resolve().is_relative_to(place):
                    raise UserError(f"{inner} is a link to a folder that it lies in: remove it")
                # Links to folders of links could lead to more places than there is time for.
                if linked.setdefault(place, inner) != inner:
                    raise UserError(
                        f"{linked[place]} and {inner} are links to one folder: remove one of them"
                    )
            for file in files:
                if is_stray(file):
                    continue
                suffix = os.path.splitext(file)[1].lower()
                if suffix in self.suffixes:
                    yield Path(base, file)
                else:
                    self.others[Path(base, file)] = suffix or "no suffix"

    def notes(self) -> list[str]:
        """What was passed over, a line each."""
        found = []
        if self.others:
            kinds = Counter(self.others.values()).most_common(5)
            listed = ", ".join(f"{count} {suffix}" for suffix, count in kinds)
            first = next(path for path, suffix in self.others.items() if suffix == kinds[0][0])
            found.append(
                f"note: left out: {counted(len(self.others), 'file', 'files')} of no known kind of"
                f" images ({listed}), such as {first}"
            )
        if self.empty:
            more = f", nor are {len(self.empty) - 1} more" if len(self.empty) > 1 else ""
            found.append(f"note: {self.empty[0]} is empty and no class{more}")
        return found


def _unlisted(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be listed ({error.strerror}): change its permissions")


def files_below(root: Path, suffixes: Collection[str]) -> tuple[list[Path], Counter[str]]:
    """All files of some kinds below a folder, in the order of their paths.

    Args:
        root: The folder; links to folders are followed.
        suffixes: Lower-case extensions of what is wanted.

    Returns:
        The files; how many others there are, by their extensions.

    Raises:
        UserError: A folder cannot be listed, or links lead in a circle or to one folder twice.
    """
    found = _Walk(suffixes)
    return found.images(root), Counter(found.others.values())


def _unlabelled(folder: Path, walk: _Walk) -> list[Sample]:
    found = walk.images(folder)
    return [Sample(str(p.relative_to(folder).with_suffix("")), p, None) for p in found]


def _class_folders(folder: Path, classes: list[str], whole: bool, walk: _Walk) -> list[Sample]:
    """Samples of folder/CLASS; with `whole`, a class without images is an error."""
    samples: list[Sample] = []
    for extra in walk.folders(folder):
        if extra.name not in classes and walk.images(extra):
            raise UserError(
                f"{extra} is a class that the training images do not have: add such images there,"
                f" or remove the folder.{nearest(extra.name, classes, '')}"
            )
    for label, name in enumerate(classes):
        found = walk.images(folder / name) if (folder / name).is_dir() else []
        if whole and not found:
            raise UserError(
                f"class {name!r} has no images in {folder / name}{_texts(walk)}: put some there, or"
                " remove the folder"
            )
        samples += [
            Sample(f"{name}/{p.relative_to(folder / name).with_suffix('')}", p, label)
            for p in found
        ]
    return samples


def _class_names(folder: Path, walk: _Walk) -> list[str]:
    classes = [p.name for p in walk.folders(folder)]
    if not classes:
        has = f"neither class folders nor images{_texts(walk)}"
        if walk.images(folder):
            has = "images but no class folders"
            if ".cls" in walk.others.values():
                has += " (labels as in a WebDataset tar: python -m data.index takes such tars)"
        raise UserError(
            f"{folder} holds {has}: put images into one folder a class, or pack them without labels"
            " (--unlabelled)"
        )
    _refuse_loose(folder, walk, "class folders", "put each into the folder of its class")
    return classes


def _refuse_loose(folder: Path, walk: _Walk, kind: str, cure: str) -> None:
    """Refuses images that lie beside folders of classes or splits; notes other files there."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not is_stray(p.name))
    for path in files:
        if (suffix := path.suffix.lower()) not in walk.suffixes:
            walk.others[path] = suffix or "no suffix"
    if loose := [path for path in files if path.suffix.lower() in SUFFIXES]:
        raise UserError(
            f"{folder} holds {kind} and {len(loose)} images beside them, such as {loose[0].name}:"
            f" {cure}"
        )


def split_folders(root: Path, walk: _Walk) -> dict[str, Path]:
    """The split folders of a root; empty where its folders are classes.

    Raises:
        UserError: Two folders are of one split, or some are splits and others have images, too.
    """
    found: dict[str, Path] = {}
    others = []
    for folder in walk.folders(root):
        split = ALIASES.get(folder.name.lower())
        if split is None:
            others.append(folder)
        elif split in found:
            raise UserError(f"{found[split]} and {folder} are both the split {split!r}: merge them")
        else:
            found[split] = folder
    others = [folder for folder in others if walk.images(folder)]
    # One alone may be a class, pass/ and test/, if its images are not in folders of classes.
    nested = any(walk.images(inner) for one in found.values() for inner in walk.folders(one))
    if others and len(found) < 2 and not nested:
        return {}
    if others and found:
        raise UserError(
            f"{root} holds splits ({', '.join(p.name for p in found.values())}) and"
            f" {others[0].name} with images, too: move that away; or, if all are classes, pack them"
            " as one split (--split train)"
        )
    return {s: found[s] for s in DIVIDED if s in found}


def from_split_folders(folders: dict[str, Path], unlabelled: bool, walk: _Walk) -> Splits:
    """Samples of {train,val,test}/CLASS; the first split's folders are the classes."""
    if unlabelled:
        return {split: (_unlabelled(folder, walk), []) for split, folder in folders.items()}
    first = next(iter(folders))
    classes = _class_names(folders[first], walk)
    for folder in folders.values():
        loose = "put each into the folder of its class, or move this split away"
        _refuse_loose(folder, walk, "a split of class folders", loose)
    return {
        split: (_class_folders(folder, classes, split == first, walk), classes)
        for split, folder in folders.items()
    }


def from_csv(
    path: Path, unlabelled: bool, columns: Columns, notes: list[str] | None = None
) -> Splits:
    """Samples of a CSV with columns of paths, labels (unless unlabelled) and, perhaps, splits."""
    cure = "correct the file"
    header, lines = tables.read(path)
    wanted = [columns.path] if unlabelled else [columns.path, columns.label]
    wanted += [columns.group] if columns.group else []
    for column in wanted:
        if column not in header:
            raise UserError(
                f"{path} has no column {column!r} (it has {', '.join(header) or 'none'}):"
                f" begin it with the line {','.join(wanted)}[,split], or name yours with"
                " --path_column and --label_column; or, if it holds texts, with --text_column"
            )
    rows: list[Row] = []
    outside: list[str] = []
    seen: dict[Path, int] = {}
    for line, row in lines:
        where = f"{path} line {line}"
        given = row[columns.path].strip()
        if not given:
            raise UserError(f"{where} has no path: {cure}")
        image = path.parent / given
        if not image.is_file():
            image = _spelt(path.parent, given)
        if not image.is_file():
            raise UserError(
                f"{where}: there is no image {image}: paths are relative to the CSV: {cure}."
                f"{_beside(image)}"
            )
        if image in seen:
            raise UserError(f"{where}: {given} stands in line {seen[image]} too: {cure}")
        seen[image] = line
        label = None
        if not unlabelled:
            label = several.separated(row[columns.label], columns.separator, where)
        if label == "":
            raise UserError(f"{where}: {given} has no label: {cure}, or pack with --unlabelled")
        none = next((one for one in names_of(label) if _NEGATIVE.fullmatch(one)), None)
        if none is not None:
            raise UserError(
                f"{where}: its label {none} stands for none: correct it, or pack without labels"
                " (--unlabelled)"
            )
        split = tables.split_of(row, where)
        within = os.path.relpath(image, path.parent)
        if within.startswith(".."):
            outside.append(given)
        key = os.path.splitext(within.replace("../", ""))[0]
        group = row[columns.group].strip() or None if columns.group else None
        rows.append(Row(split, where, key, image, label, group))
    if not rows:
        raise UserError(f"{path} has no rows below its header: add one an image")
    several.check(rows, None if unlabelled else columns.separator, path)
    if notes is not None and outside:
        notes.append(
            f"note: {len(outside)} images lie outside the folder of {path.name}, such as"
            f" {outside[0]}: they are packed, too"
        )
    if notes is not None and (ignored := [c for c in header if c not in (*wanted, "split")]):
        notes.append(f"note: of {path.name} these columns are ignored: {', '.join(ignored)}")
    return grouped(rows)


def _spelt(folder: Path, given: str) -> Path:
    """A path as another system writes it: Windows' separators, macOS's letters with marks apart."""
    path = folder / given.replace("\\", "/")
    forms = (folder / unicodedata.normalize(form, given) for form in ("NFC", "NFD"))
    return next((one for one in (path, *forms) if one.is_file()), path)


def _beside(image: Path) -> str:
    """A hint at a file of another case, or with the suffix that a table leaves out."""
    names = sorted(p.name for p in image.parent.iterdir()) if image.parent.is_dir() else []
    meant = image.name.casefold()
    near = [name for name in names if meant in (name.casefold(), Path(name).stem.casefold())]
    return f" There is {near[0]}" if near else ""


def find(
    root: Path,
    *,
    unlabelled: bool = False,
    split: str | None = None,
    columns: Columns | None = None,
    notes: list[str] | None = None,
) -> Splits:
    """The samples of class folders, split folders or a CSV.

    Args:
        root: Folder or CSV file.
        unlabelled: Leave labels away.
        split: Everything is to become this split, so a folder `train` is a class like any other.
        columns: Names of the CSV's columns.
        notes: Gets a line for each thing that was passed over.

    Returns:
        Per split its samples and classes; the split "" where the source is not divided.

    Raises:
        UserError: The source is missing, empty or contradicts itself.
    """
    walk = _Walk()
    if not root.exists():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        hint = nearest(root.name, beside, "") or " Give a folder or a file of images or texts."
        raise UserError(f"there is no {root}.{hint}")
    if not root.is_dir() and not root.is_file():
        raise UserError(f"{root} is neither a folder nor a regular file: give one")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise UserError(
                f"{root} is neither a folder, an archive, a .csv of images nor a file of texts"
                " (.jsonl, .csv, .tsv, .txt): give one"
            )
        found = from_csv(root, unlabelled, columns or Columns(), notes)
    elif split is None and (folders := split_folders(root, walk)):
        _refuse_loose(root, walk, "splits", "put each into its split, or move them away")
        found = from_split_folders(folders, unlabelled, walk)
    elif unlabelled:
        found = {"": (_unlabelled(root, walk), [])}
    else:
        classes = _class_names(root, walk)
        found = {"": (_class_folders(root, classes, True, walk), classes)}
    found = {s: v for s, v in found.items() if v[0]}
    if not found:
        known = " ".join(sorted(SUFFIXES))
        raise UserError(f"{root} has no images{_texts(walk)}: give a folder of them ({known})")
    if notes is not None:
        notes += walk.notes()
    return found


def _texts(walk: _Walk) -> str:
    """What to say where files of texts were found in place of images."""
    texts = ".txt" in walk.others.values()
    how = "texts, one a file, are packed as JSON Lines with columns text and label"
    return f" ({how})" if texts else ""


def find_extra(
    root: Path, notes: list[str] | None = None, *, grouped: bool = False
) -> list[Sample]:
    """All images of a folder, without labels.

    Args:
        root: The folder.
        notes: Gets a line for each thing that was passed over.
        grouped: Whether val and test have groups of their own, of which a folder says nothing.

    Returns:
        The samples.

    Raises:
        UserError: There are none.
    """
    if not root.is_dir():
        wrong = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"--unlabelled {root} {wrong}: give a folder of images, as the source has")
    walk = _Walk()
    samples = _unlabelled(root, walk)
    if notes is not None:
        notes += walk.notes()
        told = f"note: {root} may hold images of groups that val or test have: a folder tells none"
        notes += [told] * grouped
    if not samples:
        known = " ".join(sorted(SUFFIXES))
        raise UserError(f"--unlabelled {root} has no images: give a folder of them ({known})")
    return samples
