"""One set of shards that several launches write: `data.pack SOURCE OUT --part 3/64`.

Which samples a shard holds follows from its number, so that any launch can write any shard, and the
set is the same for any number of parts. Finished shards wait in a folder beside OUT, each with a
record of what its index needs; whichever launch finishes the last one joins them, without reading
them again, and moves their folders to OUT. An OUT in an object store gets each shard as it is
finished, and its index in the end.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from rich.progress import Progress

from selfdistill.data import records
from selfdistill.data.errors import UserError, counted
from selfdistill.data.formats import depth
from selfdistill.data.formats.labels import Label, numbers
from selfdistill.data.packing.shard import Shard, write_shards
from selfdistill.data.packing.unlabelled import join_train
from selfdistill.data.packing.whole import Whole
from selfdistill.data.packing.writer import Packed, check, make_folder, stem, write_index
from selfdistill.data.shards import duplicates
from selfdistill.data.shards.away import Mirror
from selfdistill.data.shards.manifest import Manifest, ShardInfo
from selfdistill.data.shards.store import SETTINGS, Part, Store
from selfdistill.data.splits import DIVIDED, UNLABELLED


def check_options(*, overwrite: bool, span: depth.Range | str | None) -> None:
    """Refuses what needs the whole set.

    Raises:
        UserError: It does.
    """
    if overwrite:
        raise UserError("--part with --overwrite: parts would replace each other's: remove OUT")
    if span == "auto":
        raise UserError("--range auto looks at all pictures, --part at its own: give LOW,HIGH")


def write_part(
    whole: Whole,
    part: Part,
    replaced: Iterable[str],
    seen: duplicates.Inputs,
    progress: Progress,
    mirror: Mirror,
) -> list[Packed] | str:
    """Writes the shards of a part that are not written yet, and joins the set if it was the last.

    Args:
        whole: What all parts have in common.
        part: Which one this is.
        replaced: Splits of which OUT may hold none of another set.
        seen: Told of every input of the set, if this part joins it.
        progress: Where to show how far it is.
        mirror: Of OUT.

    Returns:
        What the whole set is, if it is complete; else a line that says what is missing.

    Raises:
        UserError: Other parts were made of another source, or with other options; an unreadable
            sample; OUT holds another set.
    """
    place = whole.out.parent / f".{whole.out.name}.{'-'.join(whole.splits)}.parts"
    store = mirror.store(place, empty=list(whole.splits))
    mirror.refresh()  # the source may have taken long to list
    if _is_complete(whole, replaced):
        return f"{whole.out} is complete: nothing is left to do"
    if joining := store.joining():
        return joining
    store.begin(whole.settings)
    for split, (samples, classes) in whole.splits.items():
        check(split, whole.samples_per_shard)
        make_folder(store.folder / split)
        wanted = {n for n in range(whole.shards(split)) if part.has(n)} - store.done(split)
        sizes = [min(whole.samples_per_shard, len(samples) - _first(whole, n)) for n in wanted]
        task = progress.add_task(split, total=sum(sizes))
        shards = write_shards(
            samples,
            len(classes),
            store.folder / split,
            kind=whole.kind,
            stem=stem(whole.name, split),
            samples_per_shard=whole.samples_per_shard,
            skip_broken=whole.skip_broken,
            wanted=wanted.__contains__,
            advance=functools.partial(progress.advance, task),
        )
        for shard in shards if wanted else ():
            _keep(store, split, shard)
    missing = store.missing(part, {split: whole.shards(split) for split in whole.splits})
    return missing or _join(whole, store, seen)


def _first(whole: Whole, shard: int) -> int:
    return shard * whole.samples_per_shard


def _is_complete(whole: Whole, replaced: Iterable[str]) -> bool:
    """Whether the set stands in OUT.

    Raises:
        UserError: Another one does, or a split that this one does not have.
    """
    there = [whole.out / split for split in replaced if (whole.out / split).exists()]
    for folder in there:
        with contextlib.suppress(FileNotFoundError, UserError):
            told = records.read_object(folder / SETTINGS)
            if folder.name in whole.splits and told == whole.settings:
                continue
        raise UserError(f"{folder} exists: give another folder, or remove it")
    return len(there) == len(whole.splits)


def _keep(store: Store, split: str, shard: Shard) -> None:
    """Writes a shard's record. Lengths: -1 without a label, 0 with one, n + 1 with a list of n."""
    mark = store.stow(split, store.folder / split / shard.info.name) if shard.info else ""
    lengths = [
        len(label) + 1 if isinstance(label, tuple) else -1 if label is None else 0
        for label in shard.labels
    ]
    store.keep(
        split,
        shard.number,
        {"info": shard.info, "left_out": shard.left_out, "mark": mark},
        members=shard.members,
        digests=np.array(shard.digests, np.uint64),
        lengths=np.array(lengths, np.int64),
        labels=np.array([n for label in shard.labels for n in numbers(label)], np.int64),
    )


def _kept(store: Store, split: str, number: int) -> Shard:
    """A shard, from its record."""
    told, arrays = store.kept(split, number)
    labels: list[Label | None] = []
    flat = iter(arrays["labels"].tolist())
    for length in arrays["lengths"].tolist():
        own = tuple(next(flat) for _ in range(length - 1 if length else 1))
        labels.append(None if length < 0 else own if length else own[0])
    info = told["info"]
    return Shard(
        number,
        None if info is None else ShardInfo(*info),
        arrays["members"],
        labels,
        arrays["digests"].tolist(),
        told["left_out"],
    )


def _changed(whole: Whole, store: Store, split: str) -> list[int]:
    """Recorded shards that are not, or no more, what was stowed."""
    if (there := store.stowed(split)) is None:
        return []
    changed = []
    for number in range(whole.shards(split)):
        told, _ = store.kept(split, number)
        if told["info"] is not None:
            info = ShardInfo(*told["info"])
            if there.get(info.name) != (info.bytes, told["mark"]):
                changed.append(number)
    return changed


def _join(whole: Whole, store: Store, seen: duplicates.Inputs) -> list[Packed] | str:
    """Writes the indices, and moves the splits to OUT.

    Killed in the midst of it, it leaves some of them there, and goes on with the others.
    """
    with store.claimed() as folder:
        if folder is None:
            return "another part, which was the last, joins the shards"
        left = [split for split in whole.splits if not (whole.out / split).exists()]
        done = {split: _packed(whole.out / split) for split in whole.splits if split not in left}
        if changed := [(split, n) for split in left for n in _changed(whole, store, split)]:
            for split, number in changed:
                store.forget(split, number)
            return (
                f"{counted(len(changed), 'shard is', 'shards are')} not as written, the first in"
                f" {whole.out / changed[0][0]}: launch any part again, which writes it anew"
            )
        for split in left:
            for draft in (folder / split).glob(".*"):  # of parts that were killed
                draft.unlink()
            (folder / split / SETTINGS).write_text(json.dumps(whole.settings, indent=1) + "\n")
            done[split] = _index(whole, store, split, seen)
            if split == UNLABELLED and DIVIDED[0] in left:
                done[split] = join_train(store, done[split])
        make_folder(whole.out)
        for split in reversed(left):  # train last, which `unlabelled` is made of
            store.publish(split, whole.out / split)
        store.remove()
    return [done[split] for split in whole.splits]


def _packed(folder: Path) -> Packed:
    """What a split is that was moved before."""
    found = Manifest.load(str(folder))
    size = sum(shard.bytes for shard in found.shards)
    return Packed(found.split, found.samples, len(found.classes), len(found.shards), size, [])


def _index(whole: Whole, store: Store, split: str, seen: duplicates.Inputs) -> Packed:
    """Writes the index of one split."""

    def shards() -> Iterator[Shard]:
        for number in range(whole.shards(split)):
            yield _kept(store, split, number)

    return write_index(
        store.folder / split,
        shards(),
        split=split,
        classes=whole.splits[split][1],
        kind=whole.kind.name,
        entry=whole.kind.entry(),
        seen=seen,
    )
