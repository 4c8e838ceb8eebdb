"""python -m data.pack SOURCE OUT: images or texts -> WebDataset shards with an index.

SOURCE is one of
  a folder of class folders            SOURCE/CLASS/*.jpg        divided by --splits
  a folder with splits                 SOURCE/{train,val,test}/CLASS/*.jpg
  a CSV file with a header             path,label[,split]        paths relative to the file
  a folder of images without classes   with --unlabelled
  JSON Lines, CSV or TSV of texts      columns text, label[, text_pair][, id][, split]
  a .txt of texts without labels       one a line
  a folder of such files               SOURCE/{train,val,test}.{jsonl,csv,tsv,txt}
  a folder of `datasets` saved to disk where that library is installed
  .parquet, or a folder of such        a column of images or text, and label
  a known data set as published        recognised by its files, or named with --layout
  a .tar, .tgz, .tar.zst or .zip of one of these

OUT/{train,val,test}/ then hold shards NAME-SPLIT-000000.tar, manifest.json and members.npy.
"""

from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats import depth, fitting, images
from selfdistill.data.formats.channels import Channels
from selfdistill.data.formats.channels import parse as parse_channels
from selfdistill.data.formats.depth import Range
from selfdistill.data.formats.texts import Stored
from selfdistill.data.packing import parts
from selfdistill.data.packing.encoding import (
    MAX_WORDS,
    ImageModality,
    Kind,
    TextModality,
    choose_size,
)
from selfdistill.data.packing.span import beside, same_fit
from selfdistill.data.packing.span import find as find_span
from selfdistill.data.packing.whole import Whole, write_whole
from selfdistill.data.packing.writer import Packed, check_replaceable, write_split
from selfdistill.data.shards import away, duplicates, manifest, store
from selfdistill.data.shards.classes import renumbered
from selfdistill.data.sources import division, label_checks, layouts, parquet
from selfdistill.data.sources import images as image_sources
from selfdistill.data.sources import texts as text_sources
from selfdistill.data.sources.samples import Columns, Sample, Samples, Splits
from selfdistill.data.splits import DIVIDED, SPLITS, UNLABELLED, Metric

# Unreadable files that are named; the rest is counted.
_NAMED = 10
_BARS = (
    TextColumn("{task.description:>5}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)

__all__ = ["Packed", "Sample", "choose_size", "pack", "write_split"]


class _Found(NamedTuple):
    """What a source holds: its splits, what the user should know of it, and how it is scored."""

    splits: Splits
    notes: list[str]
    kind: Literal["image", "text"]
    metric: Metric | None = None
    known: bool = False


def _find(
    root: Path,
    layout: str | None,
    options: layouts.Options,
    columns: Columns,
    unlabelled: bool,
    split: str | None,
) -> _Found:
    """The samples of a known data set, of plain folders or of files of texts."""
    if layout is None and root.is_dir():
        layout = layouts.detect(root)
    if layout is not None:
        known = layouts.load(layout, root, options)
        classes = [] if unlabelled else known.classes
        found: Splits = {
            one: ([s._replace(label=None) for s in samples] if unlabelled else samples, classes)
            for one, samples in known.splits.items()
        }
        notes = [f"layout {known.name}", *known.notes]
        return _Found(found, notes, known.kind, known.metric, known=True)
    if options != layouts.Options():
        raise UserError(
            f"{root} is none of the known data sets ({', '.join(layouts.NAMES)}), which"
            " --fold, --trainval and --keep_banner are for: drop them, or name it (--layout)"
        )
    notes = []
    if root.exists() and text_sources.recognise(root, columns):
        found = text_sources.find(root, columns, unlabelled=unlabelled, notes=notes)
        return _Found(found, notes, "text")
    found = image_sources.find(
        root, unlabelled=unlabelled, split=split, columns=columns, notes=notes
    )
    return _Found(found, notes, "image")


def _extra(root: Path, found: _Found, columns: Columns, notes: list[str]) -> Samples:
    """What --unlabelled PATH adds to train."""
    if "train" not in found.splits:
        raise UserError(
            f"--unlabelled {root} goes with a train split, the source has only"
            f" {', '.join(found.splits)}: drop the option"
        )
    held = division.groups(found.splits)
    if found.kind == "text":
        return text_sources.find_extra(root, columns, held, notes)
    return image_sources.find_extra(root, notes, grouped=bool(held))


def _kind(
    found: _Found,
    size: images.Size | None,
    keep_original: bool,
    span: Range | None,
    chosen: Channels | None,
    metric: Metric | None,
    max_words: int,
    fit: fitting.Fit = "crop",
    of_parts: bool = False,
) -> Kind:
    """How the samples are stored; refuses options of the other kind."""
    if found.kind == "image":
        _refuse("texts", "images", metric=metric is not None, max_words=max_words != MAX_WORDS)
        return ImageModality(size, keep_original, span, chosen, how=fit, of_parts=of_parts)
    _refuse(
        "images", "texts", size=size is not None, keep_original=keep_original, fit=fit != "crop"
    )
    stored: Stored = "json" if text_sources.has_pairs(found.splits) else "txt"
    return TextModality(stored, metric or found.metric, max_words)


def _refuse(meant: str, held: str, **options: bool) -> None:
    """Refuses options, where they are given, that are for another kind than the source holds."""
    for name, given in options.items():
        if given:
            raise UserError(f"--{name} is for {meant}, the source holds {held}: drop it")


def pack(
    source: str,
    out: str,
    size: images.Size | None = None,
    fit: fitting.Fit = "crop",
    keep_original: bool = False,
    range: str | None = None,
    channels: str | None = None,
    splits: str | None = None,
    unlabelled: bool | str = False,
    split: str | None = None,
    layout: str | None = None,
    fold: int = 1,
    trainval: bool = False,
    val_fraction: float = 0.0,
    keep_banner: bool = False,
    name: str | None = None,
    path_column: str = "path",
    text_column: str = "text",
    pair_column: str = "text_pair",
    label_column: str = "label",
    label_separator: str | None = None,
    group_column: str | None = None,
    metric: Metric | None = None,
    max_words: int = MAX_WORDS,
    max_pixels: int = images.MOST_PIXELS,
    samples_per_shard: int = 1000,
    part: str | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    overwrite: bool = False,
) -> list[Packed]:
    """Packs images or texts into WebDataset shards with an index.

    Args:
        source: Folder of class folders, folder with {train,val,test}/CLASS, CSV with
            path,label[,split], file or folder of texts, or a known data set as published,
            extracted or not.
        out: The data set's folder, e.g. shards/cub, or its address in an object store, e.g.
            s3://bucket/cub. Shards are then made in a temporary folder ($TMPDIR chooses its disk)
            and uploaded one by one, the manifests last; launched again, it goes on.
        size: Side in pixels; images are fitted to this square (short side bicubic, centre crop) and
            stored as PNG. By default their own if they are squares of one size up to 224, else 224.
            224x448 is a rectangle, height x width, that they are scaled to cover.
        fit: Images of another ratio than `size`: crop cuts what is beyond it at both ends, pad
            scales them into it and adds borders in ImageNet's mean colour, squash scales each side
            for itself. All splits of OUT, and exports, do the same.
        keep_original: Store the files as they are; training then fits them each time.
        range: LOW,HIGH, the values of pictures of more than 8 bits that are black and white, or
            auto, the smallest and largest of the set; by default auto where 16-bit pictures use
            less than half of their range, else 0,65535. Later splits of OUT get the same.
        channels: Of TIFFs with several pages, or more channels than colours: the number of the one
            to take, or of three for red, green and blue, such as 3,2,1.
        splits: Shares of train, val and test where the source has no splits; default 0.8,0.1,0.1,
            taken class by class at random, and 1,0,0 without labels.
        unlabelled: Without a value, take all without labels, whatever folders images lie in.
            With a path, pack the source as ever, and beside it a split `unlabelled`, which the
            first two stages train on, of the inputs of train and the images or texts of that path.
        split: Pack everything as this one split (train, val or test) of `out`.
        layout: Known data set whose official splits are taken, where it is not recognised itself:
            aircraft, cub, xray, dtd, dogs, flowers, cifar100, elpv, scierc, acl_arc, chemprot
            or tweeteval.
        fold: Of DTD's ten published divisions, which to take.
        trainval: Train on a known data set's official train and val images together.
        val_fraction: Where the source has splits but no val: part of train to set aside as val,
            class by class at random; by default none.
        keep_banner: Keep the 20 rows of copyright notice below FGVC Aircraft's pictures, which the
            data set's authors ask to remove.
        name: First part of the shards' names; by default that of `out`.
        path_column: Column of an image's file in a CSV, or of images in Parquet.
        text_column: Column of the text.
        pair_column: Column of the second text of a pair; it need not be there.
        label_column: Column of the label. In JSON and Parquet it may be a list of several.
        label_separator: What stands between several labels of one sample, such as ";".
        group_column: Column of what must stay in one split: the patient, the recording, the author.
        metric: What texts are scored by: accuracy, macro_f1 or micro_f1; known data sets bring
            theirs, others are scored by accuracy.
        max_words: The longest text, in words; more are an error, since a model would read the
            first few hundred tokens only.
        max_pixels: The largest image, in pixels; a small file may say that it holds more than
            memory does.
        samples_per_shard: Samples in a tar.
        part: Write only the shards of this launch, of several that share the work: 3/64 is the
            third of 64, on any machines, in any order. The last one joins them; launched again, an
            interrupted one goes on. The set is the same for any number of parts.
        seed: Of the division into splits.
        skip_broken: Leave unreadable samples out, and say how many.
        overwrite: Replace shards that are in `out`.
    """
    images.allow(max_pixels)
    wanted, chosen = depth.parse(range), parse_channels(channels)
    console = Console(stderr=True)
    for word, place in (("SOURCE", source), ("OUT", out), ("--unlabelled", unlabelled)):
        if place == "":
            raise UserError(f"{word} is empty, as of a variable that is not set: give a path")
    for place in (source, unlabelled):
        away.refuse(str(place), "packing reads")
    out_dir, root = Path(out), Path(source)
    extra = unlabelled if isinstance(unlabelled, str) else None
    if split is not None and split not in DIVIDED:
        raise UserError(f"there is no split {split!r}: give one of {', '.join(DIVIDED)}")
    if extra is not None and split not in (None, "train"):
        raise UserError(
            f"--unlabelled {extra} goes with the train split, --split {split} packs another one:"
            " give one of them"
        )
    for changing, given in (("size", size), ("channels", chosen)):
        if keep_original and given is not None:
            raise UserError(
                f"--keep_original stores files as they are, --{changing} changes them: give one"
            )
    if label_separator == "":
        raise UserError("--label_separator is empty: give what stands between labels, such as ';'")
    if out_dir.is_file():
        raise UserError(f"{out} is a file: give a folder")
    if root.exists() and out_dir.resolve() == root.resolve():
        raise UserError(f"{out} is the source itself: give another folder for the shards")
    replaced = SPLITS if split is None else (split,) if extra is None else ("train", UNLABELLED)
    remote = manifest.is_remote(out)
    one_of = None if part is None and not remote else store.parse(part or "1/1")
    if part is not None:
        parts.check_options(overwrite=overwrite, span=wanted)
    if remote and overwrite:
        raise UserError(f"--overwrite: {out} may be read meanwhile: remove it, or give another")
    for one in replaced if one_of is None else ():
        check_replaceable(out_dir / one, overwrite)
    columns = Columns(
        *(path_column, text_column, pair_column, label_column),
        group=group_column,
        separator=label_separator,
    )
    options = layouts.Options(fold=fold, trainval=trainval, keep_banner=keep_banner)
    with (
        away.mirrored(out) as mirror,
        layouts.opened(root, mirror.folder.parent) as unpacked,
        parquet.opened(unpacked, mirror.folder.parent, columns) as folder,
    ):
        out_dir = mirror.folder
        if split == "train" and extra is None and (out_dir / UNLABELLED).exists():
            raise UserError(
                f"{out_dir / UNLABELLED} holds the inputs of the old train split too: make it anew"
                " (--unlabelled PATH), or remove it"
            )
        if part is not None and folder.resolve() != root.resolve():
            raise UserError(f"--part: every part would unpack {source} anew: unpack it first")
        found = _find(folder, layout, options, columns, unlabelled is True, split)
        inside = root.is_dir() and out_dir.resolve().is_relative_to(root.resolve())
        if found.kind == "image" and not found.known and inside:  # all of its folders count
            raise UserError(
                f"{out} lies in the source {source}, which would take it for a class the next time:"
                " give a folder outside of it"
            )
        if unlabelled is True and splits is None and split is None and "" in found.splits:
            splits = "1,0,0"  # stages 1 and 2 read train alone, and nothing is scored
        divided = division.settle(
            found.splits, root, splits, split, seed, val_fraction, found.notes
        )
        if split is not None:
            divided = renumbered(divided, split, out_dir)
        if group_column is not None and not any(
            isinstance(part, list) and any(s.group is not None for s in part)
            for part, _ in divided.values()
        ):
            raise UserError(
                "--group_column is for tables with labels (.csv, .tsv, .jsonl) that have such a"
                " column: drop it"
            )
        if label_separator is not None and not any(
            isinstance(part, list) and part and isinstance(part[0].label, tuple)
            for part, _ in divided.values()
        ):
            raise UserError(
                "--label_separator is for tables with labels (.csv, .tsv, .jsonl): drop it"
            )
        if not found.known:
            found.notes.extend(label_checks.check(divided))
        own = dict(divided)
        if extra is not None:
            additional = _extra(Path(extra), found._replace(splits=divided), columns, found.notes)
            divided[UNLABELLED] = additional, []
        span = None
        if found.kind == "text":
            _refuse("images", "texts", range=wanted is not None, channels=chosen is not None)
        elif part is not None:
            span = beside(out_dir, set(replaced), wanted)
            span = wanted if span is None and isinstance(wanted, tuple) else span
        else:
            with Progress(*_BARS, console=console, transient=True) as progress:
                span, note = find_span(divided, out_dir, set(replaced), wanted, chosen, progress)
            found.notes.extend([note] if note else [])
        if found.kind == "image" and not keep_original and size is None:
            size = choose_size(own, span, chosen)
            found.notes.append(f"size {size} x {size} pixels (another one: --size)")
        if found.kind == "image":
            same_fit(out_dir, set(replaced), fit)
            others = "|".join(one for one in fitting.FITS if one != fit)
            found.notes.append(
                f"fit {fit}: of another ratio, {fitting.WORDS[fit]} (--fit {others})"
            )
        for note in found.notes:
            console.print(printable(note), highlight=False, markup=False, soft_wrap=True)
        kind = _kind(
            found._replace(splits=divided),
            *(size, keep_original, span, chosen, metric, max_words, fit, part is not None),
        )
        whole = Whole(
            out_dir,
            divided,
            kind,
            name or manifest.as_typed(out_dir).name,
            samples_per_shard,
            skip_broken,
            {
                "seed": seed,
                "max_words": max_words,
                "max_pixels": max_pixels,
                "channels": channels,
                "keep_banner": keep_banner,
            },
        )
        seen = duplicates.Inputs(next((names for _, names in divided.values() if names), []))
        with Progress(*_BARS, console=console) as progress:
            done: list[Packed] | str
            if one_of is None:
                done = write_whole(whole, replaced, seen, progress)
            else:
                done = parts.write_part(whole, one_of, replaced, seen, progress, mirror)
    if isinstance(done, str):
        print(printable(mirror.told(done if part is None else f"part {part}: {done}")))
        return []
    for p in done:
        skipped = f", {p.skipped} unreadable {kind.name}s left out" if p.skipped else ""
        print(
            f"{mirror.told(str(out_dir / p.split))}: {p.samples} samples, {p.classes} classes,"
            f" {p.shards} shards, {p.bytes / 1e6:.1f} MB{skipped}"
        )
        for line in p.left_out[:_NAMED]:
            print(printable(f"note: left out: {line}"))
        if p.skipped > _NAMED:
            print(f"note: and {p.skipped - _NAMED} more")
    for note in (*kind.notes(), *seen.notes()):
        print(printable(note))
    return done


if __name__ == "__main__":
    from selfdistill.data.cli import run

    run(pack)
