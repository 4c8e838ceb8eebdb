"""python -m data.verify DATA: checks every shard of a data set against its manifest.

Of each shard: that it is there, its size, its sha256, that it is a whole tar, and that members.npy
has all of its samples; of each sample: the tar headers at the places that members.npy gives, that
input and label have one name, and that the label is a class. --decode reads every image or text
too; in a shard whose sha256 differs that is done anyway, to name the sample.
One line a problem on standard output, exit code 2 if there is any. What is no fault of the shards
is a note: equal inputs in two classes, or in train and test.
"""

import contextlib
import sys
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from selfdistill.data.errors import UserError, counted, printable
from selfdistill.data.formats import images
from selfdistill.data.shards import duplicates, manifest, tars
from selfdistill.data.shards.checking import check_shard
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.shards.tars import sha256_of
from selfdistill.data.sources import unpacked
from selfdistill.data.splits import SPLITS, UNLABELLED


def _table(file: Manifest) -> NDArray[np.int64]:
    """members.npy, its hash checked whatever its size.

    Raises:
        UserError: It is missing, broken, or another manifest's.
    """
    table = file.members
    place = manifest.join(file.root, file.members_file.file)
    if not manifest.is_remote(place) and sha256_of(Path(place)) != file.members_file.sha256:
        raise UserError(
            f"{place} is not the table that {file.place} names (its sha256 differs): fetch both"
            " again, or make them anew (python -m data.index --overwrite)"
        )
    return table


def _manifests(data: str, cache_dir: str | None) -> tuple[list[Manifest], list[str]]:
    """The manifests of a data set, or of one split, and what is wrong with them."""
    if manifest.is_remote(data):
        from selfdistill.data.remote.cache import NotThere

        found = []
        for address in [data, *(manifest.join(data, split) for split in SPLITS)]:
            with contextlib.suppress(NotThere):
                found.append(Manifest.load(address, cache_dir))
        if not found:
            raise UserError(f"no {manifest.FILE} at {data} or at its splits: check the address")
        return found, []
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(
            unpacked.cure(folder)
            or f"no data set at {data}: pack it first (python -m data.pack SOURCE {data})"
        )
    folders = [folder, *(folder / split for split in SPLITS)]
    loaded, problems = [], []
    for root in folders:
        there = [path.name for path in tars.beside(root)]
        if not (root / manifest.FILE).exists():
            if there:
                problems.append(
                    f"{root} has {len(there)} tars and no {manifest.FILE}: make one"
                    f" (python -m data.index {root})"
                )
            continue
        try:
            file = Manifest.load(str(root), cache_dir)
        except UserError as error:
            problems.append(str(error))
            continue
        loaded.append(file)
        if root.name in SPLITS and file.split != root.name:
            problems.append(
                f"{file.place} is of the split {file.split!r} and lies in {root.name}: put back"
                " the one that belongs there, or make it anew (python -m data.index --overwrite)"
            )
        if extra := sorted(set(there) - {shard.name for shard in file.shards}):
            problems.append(
                f"shard {root / extra[0]} is not in {file.place}"
                + (f", nor are {len(extra) - 1} more" if len(extra) > 1 else "")
                + ": remove what does not belong, or index all (python -m data.index --overwrite)"
            )
    if not loaded and not problems:
        raise UserError(
            unpacked.cure(folder)
            or f"no {manifest.FILE} in {data}: pack data into it (python -m data.pack SOURCE"
            f" {data})"
        )
    for file in loaded[1:]:
        if file.kind != loaded[0].kind:
            problems.append(
                f"{file.place} holds {file.kind}s and {loaded[0].place} {loaded[0].kind}s: they are"
                " of different data sets; put back the right one"
            )
    # Those without labels have no classes to compare.
    divided = [file for file in loaded if file.split != UNLABELLED]
    for file in divided[1:]:
        if file.classes != divided[0].classes:
            problems.append(
                f"{file.place} has other classes than {divided[0].place}: they are of different"
                " data sets; put back the right one, or pack both together (python -m data.pack)"
            )
    return loaded, problems


def verify(
    data: str,
    decode: bool = False,
    workers: int = 4,
    cache_dir: str | None = None,
    max_pixels: int = images.MOST_PIXELS,
) -> None:
    """Checks every shard of a data set: presence, size, sha256, tar headers, labels.

    Args:
        data: The data set's folder or URL, or that of one of its splits.
        decode: Decode every image, or read every text, too.
        workers: Shards that are checked at the same time.
        cache_dir: Where shards of a URL are kept on this machine.
        max_pixels: The largest image, in pixels; more are a problem.

    Raises:
        UserError: There are problems; each has been printed as a line of its own.
    """
    images.allow(max_pixels)
    if workers < 1:
        raise UserError(f"workers is {workers}: give 1 or more")
    files, problems = _manifests(data, cache_dir)
    for problem in problems:
        print(printable(problem), flush=True)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    unreadable = 0
    seen = duplicates.Inputs(next((file.classes for file in files if file.classes), []))
    # Lines on a terminal go above the bar; lines into a file go there as they are.
    tty = sys.stdout.isatty()
    total = sum(shard.bytes for file in files for shard in file.shards)
    with (
        Progress(
            *columns,
            console=console,
            transient=True,
            redirect_stdout=tty,
            disable=not console.is_terminal,
        ) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        task = progress.add_task("verifying", total=total)

        def report(problem: str) -> None:
            problems.append(problem)
            print(printable(problem), flush=True)

        try:
            for file in files:
                unreadable += _verify_split(
                    file, decode, pool, lambda n: progress.advance(task, n), report, seen
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        count = counted(len(problems), "problem", "problems")
        raise UserError(f"{data} has {count}: named above, with the cure")
    shards = sum(len(file.shards) for file in files)
    samples = sum(file.samples for file in files)
    splits = ", ".join(file.split for file in files)
    size = f"{samples} samples in {shards} shards, {total / 1e6:.1f} MB"
    what = (
        f"hashes, headers, labels and {files[0].kind}s" if decode else "hashes, headers and labels"
    )
    print(f"{data}: {splits}: {size}: {what} are right")
    if unreadable:
        print(
            f"note: {counted(unreadable, 'image has', 'images have')} a profile, text or EXIF that"
            " cannot be read: the pixels are whole, and are taken as they lie"
        )
    for note in seen.notes():
        print(printable(note))


def _verify_split(
    file: Manifest,
    decode: bool,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
    report: Callable[[str], None],
    seen: duplicates.Inputs,
) -> int:
    """Checks the shards of one split in threads; tells of problems in the shards' order.

    Returns:
        Images of which something beside the pixels could not be read.
    """
    table: NDArray[np.int64] | None = None
    try:
        table = _table(file)
    except UserError as error:
        report(str(error))
    counts = np.zeros(len(file.classes), np.int64)
    whole = table is not None
    places, unreadable = array("q"), 0
    jobs = pool.map(
        lambda shard: check_shard(file, shard, table, decode, advance), range(len(file.shards))
    )
    seen.begin(file.split, lambda number: _place_of(file, places, number))
    for shard, found in enumerate(jobs):
        counts += found.counts
        unreadable += found.unreadable
        for digest, label, number in found.inputs:
            seen.add(digest, label)
            places.append(int(file.starts[shard]) + number)
        for problem in found.problems:
            whole = False
            report(problem)
    if whole and counts.tolist() != file.class_counts:
        first = int(np.flatnonzero(counts != np.array(file.class_counts))[0])
        report(
            f"{file.place} counts {file.class_counts[first]} samples of class"
            f" {file.classes[first]!r}, the shards hold {counts[first]}: make it anew"
            " (python -m data.index --overwrite)"
        )
    return unreadable


def _place_of(file: Manifest, ids: Sequence[int], number: int) -> str:
    """Shard and name of a sample that was seen as the `number`-th of its split."""
    shard = int(np.searchsorted(file.starts, ids[number], side="right")) - 1
    return f"sample {ids[number] - file.starts[shard]} of {file.shards[shard].name}"


if __name__ == "__main__":
    from selfdistill.data.cli import run

    run(verify)
