"""Where images come from: class folders, split folders, CSV files."""

import os
from pathlib import Path

from data import tables
from data.cli import nearest
from data.errors import UserError
from data.images import SUFFIXES
from data.manifest import DIVIDED
from data.sources import ALIASES, Row, Sample, Splits, grouped


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """All image files below a folder, in order of their paths."""
    found = []
    for base, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES:
                found.append(Path(base, file))
    return sorted(found)


def _unlabelled(folder: Path) -> list[Sample]:
    return [Sample(str(p.relative_to(folder).with_suffix("")), p, None) for p in _images(folder)]


def _class_folders(folder: Path, classes: list[str], whole: bool) -> list[Sample]:
    """Samples of folder/CLASS; with `whole`, a class without images is an error."""
    samples: list[Sample] = []
    for extra in _folders(folder):
        if extra.name not in classes and _images(extra):
            raise UserError(
                f"{extra} is a class that the training images do not have: add such images there,"
                " or remove the folder"
            )
    for label, name in enumerate(classes):
        found = _images(folder / name)
        if whole and not found:
            raise UserError(
                f"class {name!r} has no images in {folder / name}: put some there, or remove the"
                " folder"
            )
        samples += [
            Sample(f"{name}/{p.relative_to(folder / name).with_suffix('')}", p, label)
            for p in found
        ]
    return samples


def _class_names(folder: Path) -> list[str]:
    classes = [p.name for p in _folders(folder)]
    if not classes:
        has = (
            "images but no class folders" if _images(folder) else "neither class folders nor images"
        )
        raise UserError(
            f"{folder} holds {has}: put images into one folder a class, or pack them without labels"
            " (--unlabelled)"
        )
    return classes


def split_folders(root: Path) -> dict[str, Path]:
    """The split folders of a root all of whose folders are such; empty otherwise."""
    found: dict[str, Path] = {}
    for folder in _folders(root):
        split = ALIASES.get(folder.name.lower())
        if split is None:
            return {}
        if split in found:
            raise UserError(f"{found[split]} and {folder} are both the split {split!r}: merge them")
        found[split] = folder
    return {s: found[s] for s in DIVIDED if s in found}


def from_split_folders(folders: dict[str, Path], unlabelled: bool) -> Splits:
    """Samples of {train,val,test}/CLASS; the first split's folders are the classes."""
    if unlabelled:
        return {split: (_unlabelled(folder), []) for split, folder in folders.items()}
    first = next(iter(folders))
    classes = _class_names(folders[first])
    return {
        split: (_class_folders(folder, classes, whole=split == first), classes)
        for split, folder in folders.items()
    }


def from_csv(path: Path, unlabelled: bool) -> Splits:
    """Samples of a CSV with the columns path, label (unless unlabelled) and, if it likes, split."""
    cure = "correct the file"
    header, lines = tables.read(path)
    wanted = ["path"] if unlabelled else ["path", "label"]
    for column in wanted:
        if column not in header:
            raise UserError(
                f"{path} has no column {column!r} (it has {', '.join(header) or 'none'}"
                f"{tables.separator_hint(header)}):"
                f" begin it with the line {','.join(wanted)}[,split]; or, if it holds texts, name"
                " their column with --text_column"
            )
    rows: list[Row] = []
    seen: dict[Path, int] = {}
    for line, row in lines:
        where = f"{path} line {line}"
        image = path.parent / row["path"]
        if not row["path"].strip():
            raise UserError(f"{where} has no path: {cure}")
        if not image.is_file():
            raise UserError(
                f"{where}: there is no image {image}: paths are relative to the CSV: {cure}"
            )
        if image in seen:
            raise UserError(f"{where}: {row['path']} stands in line {seen[image]} too: {cure}")
        seen[image] = line
        label = None if unlabelled else row["label"].strip()
        if label == "":
            raise UserError(
                f"{where}: {row['path']} has no label: {cure}, or pack with --unlabelled"
            )
        split = tables.split_of(row, where)
        rows.append(Row(split, where, os.path.splitext(row["path"])[0], image, label))
    if not rows:
        raise UserError(f"{path} has no rows below its header: add one an image")
    return grouped(rows)


def find(root: Path, *, unlabelled: bool = False, split: str | None = None) -> Splits:
    """The samples of class folders, split folders or a CSV.

    Args:
        root: Folder or CSV file.
        unlabelled: Leave labels away.
        split: Everything is to become this split, so a folder `train` is a class like any other.

    Returns:
        Per split its samples and classes; the split "" where the source is not divided.

    Raises:
        UserError: The source is missing, empty or contradicts itself.
    """
    if not root.exists():
        beside = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        hint = nearest(root.name, beside, "") or " Give a folder or a file of images or texts."
        raise UserError(f"there is no {root}.{hint}")
    if root.is_file():
        if root.suffix.lower() != ".csv":
            raise UserError(
                f"{root} is neither a folder, an archive, a .csv of images nor a file of texts"
                " (.jsonl, .csv, .tsv, .txt): give one"
            )
        found = from_csv(root, unlabelled)
    elif split is None and (folders := split_folders(root)):
        found = from_split_folders(folders, unlabelled)
    elif unlabelled:
        found = {"": (_unlabelled(root), [])}
    else:
        classes = _class_names(root)
        found = {"": (_class_folders(root, classes, whole=True), classes)}
    found = {s: v for s, v in found.items() if v[0]}
    if not found:
        known = " ".join(sorted(SUFFIXES))
        raise UserError(f"{root} has no images: give a folder of them ({known})")
    return found


def find_extra(root: Path) -> list[Sample]:
    """All images of a folder, without labels.

    Args:
        root: The folder.

    Returns:
        The samples.

    Raises:
        UserError: There are none.
    """
    if not root.is_dir():
        wrong = "is no folder" if root.exists() else "does not exist"
        raise UserError(f"--unlabelled {root} {wrong}: give a folder of images, as the source has")
    samples = _unlabelled(root)
    if not samples:
        known = " ".join(sorted(SUFFIXES))
        raise UserError(f"--unlabelled {root} has no images: give a folder of them ({known})")
    return samples
