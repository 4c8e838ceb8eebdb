"""python -m data.pack SOURCE OUT: folders of images, or a CSV -> WebDataset shards with an index.

SOURCE is one of
  a folder of class folders            SOURCE/CLASS/*.jpg        divided by --splits
  a folder with splits                 SOURCE/{train,val,test}/CLASS/*.jpg
  a CSV file with a header             path,label[,split]        paths relative to the file
  a folder of images without classes   with --unlabelled
  a known data set as published        recognised by its files, or named with --layout
  a .tar, .tgz or .zip of one of these

OUT/{train,val,test}/ then hold shards NAME-SPLIT-000000.tar, manifest.json and members.npy.
"""

import io
import itertools
import os
import shutil
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data import layouts, manifest, sources
from data.errors import UserError
from data.kinds import DEFAULT_SIZE, ImageKind, content_of
from data.manifest import DIVIDED, UNLABELLED
from data.shards import Packed, check_replaceable, replace, write_split
from data.sources import Sample, Splits
from data.unlabelled import join_train

__all__ = ["Packed", "Sample", "choose_size", "pack", "write_split"]


def choose_size(splits: Splits) -> int:
    """The side to fit images to when none is asked for.

    Args:
        splits: The samples.

    Returns:
        The images' own side where the first 64 of each split are squares of one size up to 224
        pixels; else 224, that of the published models.
    """
    sizes: set[tuple[int, int]] = set()
    for samples, _ in splits.values():
        for sample in itertools.islice(samples, 64):
            try:
                sizes.add(Image.open(io.BytesIO(content_of(sample))).size)
            except (OSError, ValueError, Image.DecompressionBombError):
                return DEFAULT_SIZE
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
    return width if width == height <= DEFAULT_SIZE else DEFAULT_SIZE


def _find(
    root: Path, layout: str | None, options: layouts.Options, unlabelled: bool, split: str | None
) -> tuple[Splits, list[str]]:
    """The samples of a known data set or of plain folders, and what the user should know."""
    if layout is None and root.is_dir():
        layout = layouts.detect(root)
    if layout is None:
        if options != layouts.Options():
            raise UserError(
                f"{root} is none of the known data sets ({', '.join(layouts.NAMES)}), which"
                " --fold, --trainval and --keep_banner are for: drop them, or name it (--layout)"
            )
        return sources.find(root, unlabelled=unlabelled, split=split), []
    known = layouts.load(layout, root, options)
    classes = [] if unlabelled else known.classes
    found: Splits = {
        one: ([s._replace(label=None) for s in samples] if unlabelled else samples, classes)
        for one, samples in known.splits.items()
    }
    return found, [f"layout {known.name}", *known.notes]


def _extra(root: Path, found: Splits) -> sources.Samples:
    """What --unlabelled PATH adds to train."""
    if "train" not in found:
        raise UserError(
            f"--unlabelled {root} goes with a train split, the source has only"
            f" {', '.join(found)}: drop the option"
        )
    return sources.find_extra(root)


def _renumbered(found: Splits, split: str, out_dir: Path) -> Splits:
    """A split that joins others takes their numbers of the classes, which go by name."""
    samples, classes = found[split]
    for other in DIVIDED:
        if other == split or not classes or not (out_dir / other / manifest.FILE).is_file():
            continue
        theirs = manifest.Manifest.load(str(out_dir / other)).classes
        unknown = [c for c in classes if c not in theirs]
        if unknown:
            raise UserError(
                f"class {unknown[0]!r} is not among the {len(theirs)} classes of {out_dir / other}:"
                " correct its name, or pack all splits together"
            )
        number = [theirs.index(c) for c in classes]
        moved = [s if s.label is None else s._replace(label=number[s.label]) for s in samples]
        return {split: (moved, theirs)}
    return found


def pack(
    source: str,
    out: str,
    size: int | None = None,
    keep_original: bool = False,
    splits: str | None = None,
    unlabelled: bool | str = False,
    split: str | None = None,
    layout: str | None = None,
    fold: int = 1,
    trainval: bool = False,
    val_fraction: float = 0.0,
    keep_banner: bool = False,
    name: str | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    skip_broken: bool = False,
    overwrite: bool = False,
) -> None:
    """Packs images into WebDataset shards with an index.

    Args:
        source: Folder of class folders, folder with {train,val,test}/CLASS, CSV with
            path,label[,split], or a known data set as published, extracted or not.
        out: The data set's folder, e.g. shards/cub.
        size: Side in pixels; images are fitted to this square (short side bicubic, centre crop) and
            stored as PNG. By default their own if they are squares of one size up to 224, else 224.
        keep_original: Store the files as they are; training then fits them each time.
        splits: Shares of train, val and test where the source has no splits; default 0.8,0.1,0.1,
            taken class by class at random.
        unlabelled: Without a value: take all images without labels, whatever folders they lie in.
            With the path of a folder: pack the source as ever, and beside it a split `unlabelled`,
            which the first two stages train on: the inputs of train and the images of that folder.
        split: Pack everything as this one split (train, val or test) of `out`.
        layout: Known data set whose official splits are taken, where it is not recognised itself:
            aircraft, cub, xray, dtd, dogs, flowers or cifar100.
        fold: Of DTD's ten published divisions, which to take.
        trainval: Train on a known data set's official train and val images together.
        val_fraction: Where the source has splits but no val: part of train to set aside as val,
            class by class at random; by default none.
        keep_banner: Keep the 20 rows of copyright notice below FGVC Aircraft's pictures, which the
            data set's authors ask to remove.
        name: First part of the shards' names; by default that of `out`.
        samples_per_shard: Samples in a tar.
        seed: Of the division into splits.
        skip_broken: Leave unreadable images out, and say how many.
        overwrite: Replace shards that are in `out`.
    """
    console = Console(stderr=True)
    out_dir, root = Path(out), Path(source)
    extra = unlabelled if isinstance(unlabelled, str) else None
    if split is not None and split not in DIVIDED:
        raise UserError(f"there is no split {split!r}: give one of {', '.join(DIVIDED)}")
    if extra is not None and split not in (None, "train"):
        raise UserError(
            f"--unlabelled {extra} goes with the train split, --split {split} packs another one:"
            " give one of them"
        )
    if keep_original and size is not None:
        raise UserError("--keep_original stores files as they are, --size changes them: give one")
    if out_dir.is_file():
        raise UserError(f"{out} is a file: give a folder")
    if root.exists() and out_dir.resolve() == root.resolve():
        raise UserError(f"{out} is the source itself: give another folder for the shards")
    replaced = (
        manifest.SPLITS if split is None else (split,) if extra is None else ("train", UNLABELLED)
    )
    for one in replaced:
        check_replaceable(out_dir / one, overwrite)
    if split == "train" and extra is None and (out_dir / UNLABELLED).exists():
        raise UserError(
            f"{out_dir / UNLABELLED} holds the inputs of the old train split too: make it anew"
            " (--unlabelled PATH), or remove it"
        )
    options = layouts.Options(fold=fold, trainval=trainval, keep_banner=keep_banner)
    with layouts.opened(root, out_dir.parent) as folder:
        found, notes = _find(folder, layout, options, unlabelled is True, split)
        found = sources.settle(found, root, splits, split, seed, val_fraction)
        if split is not None:
            found = _renumbered(found, split, out_dir)
        for note in notes:
            console.print(note, highlight=False)
        if not keep_original and size is None:
            size = choose_size(found)
            console.print(f"size {size} x {size} pixels (another one: --size)")
        kind = ImageKind(size, keep_original)
        if extra is not None:
            found[UNLABELLED] = _extra(Path(extra), found), []
        staging = out_dir.parent / f".{out_dir.name}.{os.getpid()}.partial"
        columns = (
            TextColumn("{task.description:>5}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        try:
            with Progress(*columns, console=console) as progress:
                done = [
                    write_split(
                        samples,
                        classes,
                        staging,
                        split=one,
                        name=name or out_dir.resolve().name,
                        kind=kind,
                        samples_per_shard=samples_per_shard,
                        skip_broken=skip_broken,
                        progress=progress,
                    )
                    for one, (samples, classes) in found.items()
                ]
            if extra is not None:
                done[-1] = join_train(staging, done[-1])
            out_dir.mkdir(parents=True, exist_ok=True)
            for one in replaced:
                if one in found:
                    replace(staging / one, out_dir / one)
                elif (out_dir / one).exists():  # of the data set that is being replaced
                    shutil.rmtree(out_dir / one)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    for p in done:
        skipped = f", {p.skipped} unreadable {kind.name}s left out" if p.skipped else ""
        print(
            f"{out_dir / p.split}: {p.samples} samples, {p.classes} classes, {p.shards} shards,"
            f" {p.bytes / 1e6:.1f} MB{skipped}"
        )


if __name__ == "__main__":
    from data.cli import run

    run(pack)
