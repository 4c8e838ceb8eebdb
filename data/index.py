"""WebDataset tars made elsewhere -> manifest.json and members.npy beside them.

    python -m data.index shards/birds                    # a folder with train/, val/, test/ of tars
    python -m data.index shards/birds/train              # one split
    python -m data.index shards/birds/train/a-*.tar      # some tars of a folder

Members are grouped as WebDataset groups them: the key ends at the first dot of the base name, the
extension is all that follows, neighbours with one key are one sample. A sample needs one image and,
for fine-tuning, a class: its number in .cls, .txt or .json ({"label": 3}), what stands under
another name in .json (--label_field), or the folder that it lies in (--label folder).
"""

import contextlib
import itertools
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from selfdistill.data import cli
from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats import depth
from selfdistill.data.formats.strays import is_stray
from selfdistill.data.packing.span import beside
from selfdistill.data.shards import away, manifest, store, tars
from selfdistill.data.shards.away import Mirror
from selfdistill.data.shards.classes import settle
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.shards.scan import FOLDER, Scanned, compressed, keep, kept, scan
from selfdistill.data.splits import SPLITS, UNLABELLED

#: What the pieces of a shared work are called.
_TARS = "tars"
# `range` is an option of the command.
_numbers = range


def _groups(places: Sequence[str], split: str | None) -> dict[str, list[Path]]:
    """The tars of each split, from what the user gave."""
    if not places:
        raise UserError("nothing to index: give tars, or the folder that holds them")
    paths = [Path(place) for place in places]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: give tars, or the folder that holds them")
    if len(paths) == 1 and paths[0].is_dir():
        groups = _folder(paths[0], split)
    else:
        groups = _tars(paths, split)
    for path in itertools.chain(*groups.values()):
        if not manifest.is_plain(path.name):
            plain = re.sub(r"[^\w.+=@-]+", "_", path.name)
            raise UserError(
                f"{path}: a shard's name may have letters, digits and . _ + = @ - only, so that it"
                f" is one in addresses and commands, too: rename it (mv {shlex.quote(path.name)}"
                f" {plain})"
            )
    return groups


def _folder(folder: Path, split: str | None) -> dict[str, list[Path]]:
    """The tars of each split in a folder: of tars, or of folders of splits."""
    inner = {name: _all_tars(folder / name) for name in SPLITS}
    inner = {name: paths for name, paths in inner.items() if paths}
    found = _all_tars(folder)
    if not found and split is None and inner:
        return inner
    if not found:
        raise UserError(f"{folder} has no tars (*.tar), nor has a train/ in it")
    if inner and split is None:
        raise UserError(
            f"{folder} holds tars and a folder {next(iter(inner))} of tars, too: index each folder"
            f" by itself, or move {found[0].name} to where it belongs"
        )
    return _tars(found, split)


def _all_tars(folder: Path) -> list[Path]:
    """A folder's tars; refuses compressed ones, which would be missing without a word."""
    packed = [
        path
        for kind in ("*.tar.*", "*.tgz", "*.tzst", "*.tbz2", "*.txz")
        for path in folder.glob(kind)
        if path.is_file() and not is_stray(path.name)
    ]
    if packed:
        name = min(packed).name
        raise UserError(f"{folder}: no tars (*.tar) to be read by place: {name} {compressed(name)}")
    return tars.beside(folder)


def _tars(paths: list[Path], split: str | None) -> dict[str, list[Path]]:
    """Tars of one folder, which is called after their split where none is given."""
    if folders := [path for path in paths if path.is_dir()]:
        raise UserError(f"{folders[0]} is a folder: give one folder, or tars only")
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError("a tar is given twice: name each once")
    # Where links lead means nothing: the caches of hubs are folders of links to files elsewhere.
    parents = {manifest.as_typed(path).parent for path in paths}
    if len(parents) > 1:
        raise UserError(
            f"the tars lie in {len(parents)} folders, and one manifest covers one: index each"
            " folder by itself, or move them together"
        )
    parent = parents.pop()
    name = split or (parent.name if parent.name in SPLITS else "train")
    if name not in SPLITS:
        raise UserError(
            f"--split {name}: the splits are {', '.join(SPLITS)}."
            + cli.nearest(name, SPLITS, prefix="")
        )
    return {name: paths}


def index(
    *places: str,
    split: str | None = None,
    classes: str | None = None,
    image: str = "auto",
    label: str = "auto",
    label_field: str | None = None,
    unlabelled: bool = False,
    skip_incomplete: bool = False,
    range: str | None = None,
    workers: int = 4,
    part: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes manifest.json and members.npy beside WebDataset tars made elsewhere.

    Args:
        places: The tars of one split, or one folder: of tars, or of train/, val/, test/ with tars.
            A folder may lie in an object store (s3://bucket/tars): each tar is then fetched into a
            temporary folder ($TMPDIR chooses its disk) and removed when it is read.
        split: train, val or test; by default what the folder is called, else train.
        classes: Text file with a class name a line, in the order of the labels; by default the
            classes are called by their numbers, up to the greatest label.
        image: Extension of the inputs where a sample has several images.
        label: Extension of the label; by default the first of cls, txt and json that is there. Or
            `folder`: the name of the folder in the tar that the image lies in.
        label_field: Name in the label's JSON under which the class stands, by name or number.
        unlabelled: Take no labels, whatever files there are.
        skip_incomplete: Leave out samples without a picture, and say how many.
        range: LOW,HIGH, the values of pictures of more than 8 bits that are black and white, or
            auto, the smallest and largest of the tars; by default auto where 16-bit pictures use
            less than half of their range, else 0,65535.
        workers: Tars that are read at the same time.
        part: Read only the tars of this launch, of several that share the work: 3/64 is the third
            of 64. The last one writes the manifests; an interrupted one, launched again, goes on.
        overwrite: Replace a manifest that is there. Where data.pack wrote it, its names of classes
            and what it noted of the images stay.

    Raises:
        UserError: Names shard, sample and cure.
    """
    wanted = depth.parse(range)
    if workers < 1:
        raise UserError(f"workers is {workers}: give 1 or more")
    if label_field is not None and (unlabelled or label == FOLDER):
        raise UserError("--label_field is for labels in JSON: leave the other option out")
    if any(map(manifest.is_remote, places)) and (len(places) > 1 or places[0].endswith(".tar")):
        raise UserError(f"{places[0]}: of an object store give one folder's address alone")
    one_of = None if part is None else store.parse(part)
    if one_of is not None and overwrite:
        raise UserError("--part with --overwrite: remove the manifests that are to be replaced")
    with away.mirrored(places[0] if len(places) == 1 else ".", files=True) as mirror:
        groups = _groups([str(mirror.place)] if len(places) == 1 else places, split)
        for paths in groups.values():
            there = mirror.told(str(paths[0].parent / manifest.FILE))
            if not (paths[0].parent / manifest.FILE).exists():
                continue
            if one_of is not None:
                print(printable(f"part {part}: {there} is there: nothing is left to do"))
                return
            if not overwrite:
                raise UserError(f"{there} is there already: use it, or replace it (--overwrite)")
        todo = [
            (path, unlabelled or name == UNLABELLED)
            for name, paths in groups.items()
            for path in paths
        ]

        def read(job: tuple[Path, bool]) -> Scanned:
            with mirror.filled(job[0]):
                return scan(job[0], image, label, job[1], label_field, skip_incomplete)

        if one_of is None:
            _write_all(groups, list(_each(read, todo, workers)), classes, wanted, mirror)
            return
        settings: dict[str, Any] = {"image": image, "label": label, "label_field": label_field}
        settings |= {"unlabelled": unlabelled, "skip_incomplete": skip_incomplete}
        sizes = {
            name: [[p.name, p.stat().st_size] for p in paths] for name, paths in groups.items()
        }
        settings |= {"classes": classes, "range": range, "source": sizes}
        shared = mirror.store(manifest.as_typed(todo[0][0]).parent / ".index.parts")
        if joining := shared.joining():
            print(printable(f"part {part}: {joining}"))
            return
        shared.begin(settings)
        done = shared.done(_TARS)
        left = [n for n in _numbers(len(todo)) if one_of.has(n) and n not in done]
        found = _each(read, [todo[n] for n in left], workers)
        for number, scanned in zip(left, found, strict=True):
            keep(shared, _TARS, number, scanned)
        if missing := shared.missing(one_of, {_TARS: len(todo)}):
            print(printable(f"part {part}: {missing}"))
            return
        with shared.claimed() as folder:
            if folder is None:
                print(f"part {part}: another part, which was the last, writes the manifests")
                return
            all_ = [kept(shared, _TARS, number) for number in _numbers(len(todo))]
            _write_all(groups, all_, classes, wanted, mirror)
            shared.remove()


def _each(
    read: Callable[[tuple[Path, bool]], Scanned], todo: Sequence[tuple[Path, bool]], workers: int
) -> Iterator[Scanned]:
    """Reads tars side by side, and gives them in order, with a bar."""
    console = Console(stderr=True)
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from track(
                pool.map(read, todo),
                "indexing",
                len(todo),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write_all(
    groups: dict[str, list[Path]],
    scanned: Sequence[Scanned],
    classes: str | None,
    wanted: depth.Range | str | None,
    mirror: Mirror,
) -> None:
    """The manifests of all splits, from their tars in order."""
    root = manifest.as_typed(next(iter(groups.values()))[0]).parent.parent
    packed = _packed(groups)
    names, scanned = settle(classes, scanned, root, set(groups), list(packed.values()))
    spans = {name: one.span for name, one in packed.items() if wanted is None and one.span}
    span = None if len(spans) == len(groups) else _span(groups, scanned, wanted)
    at = 0
    for name, paths in groups.items():
        part, at = scanned[at : at + len(paths)], at + len(paths)
        entry = dict(packed[name].image) if name in packed else {"size": None}
        entry.pop("range", None)
        entry |= depth.entry(spans.get(name, span))
        # Labels of train's tars, which may be linked there, mean nothing in this split.
        _write(name, paths[0].parent, part, [] if name == UNLABELLED else names, entry, mirror)
    if packed:
        same = any(one.classes == names for one in packed.values() if names)
        kept = "names of classes, size, fit and range" if same else "size, fit and range"
        print(
            f"note: {kept} are those that data.pack noted (others: --classes FILE, --range"
            " LOW,HIGH; or pack anew)"
        )


def _packed(groups: dict[str, list[Path]]) -> dict[str, Manifest]:
    """The manifests of data.pack that are replaced, by split; broken ones tell nothing."""
    found = {}
    for name, paths in groups.items():
        with contextlib.suppress(UserError):
            before = Manifest.load(str(paths[0].parent))
            if "stored" in before.image:
                found[name] = before
    return found


def _span(
    groups: dict[str, list[Path]], scanned: Sequence[Scanned], wanted: depth.Range | str | None
) -> depth.Range | None:
    """The range of the pictures of more than 8 bits, and a line about it."""
    place = manifest.as_typed(next(iter(groups.values()))[0]).parent
    theirs = beside(place.parent, set(groups), wanted) if place.name in groups else None
    if theirs is not None:
        return theirs
    values = [s.values for s in scanned if s.values is not None]
    span, line = depth.choose(wanted, depth.joined(values) if values else None)
    if line:
        print(line)
    return span


def _write(
    split: str,
    folder: Path,
    scanned: Sequence[Scanned],
    names: list[str],
    entry: dict[str, Any],
    mirror: Mirror,
) -> None:
    """One split's manifest, and a line about it."""
    numbers = np.concatenate([s.labels for s in scanned])
    if len(numbers) == 0:
        others = next((s.extras[0] for s in scanned if s.extras), None)
        only = f", only files such as {others}" if others else ""
        raise UserError(f"{folder}: its tars hold no samples{only}: give tars with images")
    unlabelled = int((numbers < 0).sum())
    if 0 < unlabelled < len(numbers):
        shard, row = next((s, int(np.argmin(s.labels))) for s in scanned if (s.labels < 0).any())
        raise UserError(
            f"{unlabelled} of {len(numbers)} samples have no label, the first is sample {row} of"
            f" shard {folder / shard.shard.name}: label all, or index without labels (--unlabelled)"
        )
    counts = np.bincount(numbers[numbers >= 0], minlength=len(names)).tolist()
    manifest.write(
        folder,
        split=split,
        classes=names,
        class_counts=counts,
        shards=[s.shard for s in scanned],
        members=np.concatenate([s.rows for s in scanned]),
        image=entry,
    )
    mirror.publish(folder)
    kind = "no labels" if unlabelled else f"{len(names)} classes"
    place = mirror.told(str(folder))
    print(f"{place}: {split}, {len(numbers)} samples in {len(scanned)} shards, {kind}")
    for note in _passed_over(folder, scanned):
        print(printable(note))
    if empty := [name for name, count in zip(names, counts, strict=True) if count == 0]:
        note = f"note: {len(empty)} classes have no sample in {split}, the first is {empty[0]}"
        print(printable(note))
    if manifest.as_typed(folder).name != split:
        print(f"note: training looks for DATA/{split}: call the folder {split}, or link it there")


def _passed_over(folder: Path, scanned: Sequence[Scanned]) -> list[str]:
    """What of the tars, and of their folder, is not taken, a line each."""
    notes = []
    if incomplete := [(s.shard.name, key) for s in scanned for key in s.incomplete]:
        shard, key = incomplete[0]
        notes.append(
            f"note: {len(incomplete)} samples without a picture are left out, such as {key} of"
            f" {shard}"
        )
    unused = sum((s.unused for s in scanned), Counter[str]())
    if unused:
        kinds = ", ".join(f"{count} .{suffix}" for suffix, count in unused.most_common(5))
        notes.append(f"note: {unused.total()} files beside the pictures are not used ({kinds})")
    tarred = [name for s in scanned for name in s.extras]
    own = (manifest.FILE, manifest.MEMBERS, store.SETTINGS)
    others = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() != ".tar" and path.name not in own and path.is_file()
    )
    others = [name for name in others if not is_stray(name)]
    passed = ((tarred, "belong to no sample"), (others, "beside the tars are not read"))
    for names, where in passed:
        if names:
            suffixes = Counter(PurePosixPath(name).suffix or "no suffix" for name in names)
            kinds = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(5))
            notes.append(f"note: {len(names)} files {where} ({kinds}), such as {names[0]}")
    return notes


if __name__ == "__main__":
    cli.run(index)
