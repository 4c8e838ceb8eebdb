"""python -m data.verify DATA: checks every shard of a data set against its manifest.

Of each shard: that it is there, its size, its sha256; of each sample: the tar headers at the places
that members.npy gives, that input and label have one key, and that the label is a class. --decode
reads every image or text too; in a shard whose sha256 differs that is done anyway, to name the
sample.
One line a problem on standard output, exit code 2 if there is any.
"""

import contextlib
import functools
import hashlib
import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from data import images, labels, manifest, texts
from data.errors import UserError
from data.manifest import Manifest
from data.tars import BLOCK, parse_header, sha256_of, split_name

# Broken samples of one shard that are named; the rest is counted.
_NAMED = 5
_CHUNK = 8 * 2**20
# A tar header has room for so long a name; longer ones stand in a header of their own.
_NAME_ROOM = 100
_COPY = "copy it again from where it is whole, or make it anew (python -m data.pack --overwrite)"


class Found(NamedTuple):
    """What one shard showed.

    Attributes:
        problems: A line each.
        counts: int64 [C], samples of each class.
        hidden: Its sha256 is another, and no sample shows it.
    """

    problems: list[str]
    counts: NDArray[np.int64]
    hidden: bool = False


def _member(buffer: mmap.mmap, at: int, size: int) -> tuple[str, bytes]:
    """Name and bytes of a member.

    Raises:
        ValueError: There is none of this size there.
    """
    if at < BLOCK or size < 0 or at + size > len(buffer):
        raise ValueError("members.npy places it outside the shard")
    header = parse_header(buffer[at - BLOCK : at])
    if header.size != size:
        raise ValueError(f"the tar holds {header.size} bytes where members.npy says {size}")
    return header.name, buffer[at : at + size]


def _check_sample(
    buffer: mmap.mmap,
    row: NDArray[np.int64],
    classes: int,
    decode: Callable[[bytes], object] | None,
) -> tuple[int, str]:
    """One sample's label (-1 for none), and what is wrong with it ("" for nothing)."""
    at, size, label_at, label_size = row.tolist()
    name = ""
    try:
        name, content = _member(buffer, at, size)
        label = -1
        if label_at >= 0:
            label_name, text = _member(buffer, label_at, label_size)
            if max(len(name), len(label_name)) < _NAME_ROOM:
                key, label_key = split_name(name), split_name(label_name)
                if key is None or label_key is None or key[0] != label_key[0]:
                    raise ValueError(f"its label is that of another sample, {label_name}")
            label = labels.parse(text)
            if label >= classes:
                raise ValueError(f"its label {label} is outside the {classes} classes")
        if decode is not None:
            decode(content)
        return label, ""
    except ValueError as error:
        return -1, f"{name}: {error}" if name else str(error)


def _check_samples(
    file: Manifest, shard: int, path: Path, table: NDArray[np.int64], decode: bool
) -> Iterator[tuple[int, str]]:
    """Each sample's label and problem; see `_check_sample`."""
    rows = table[file.starts[shard] : file.starts[shard + 1]]
    parse: Callable[[bytes], object] = images.read
    if file.kind == "text":
        parse = functools.partial(texts.read, stored=file.text["stored"])
    with (
        path.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
    ):
        for number, row in enumerate(rows):
            label, wrong = _check_sample(buffer, row, len(file.classes), parse if decode else None)
            yield label, f"sample {number}, {wrong}" if wrong else ""


def _sha256(path: Path, advance: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    return digest.hexdigest()


def _local(file: Manifest, shard: int) -> Path:
    """A shard's file on this machine; remote ones come through the node's cache.

    Raises:
        UserError: It is missing or cannot be fetched whole.
    """
    info, place = file.shards[shard], file.shard_place(shard)
    if manifest.is_remote(place):
        from data.cache import ShardCache  # and with it torch: seconds that local shards need not

        return ShardCache(file.cache_dir).path(place, info.sha256, info.bytes)
    path = Path(place)
    if not path.is_file():
        raise UserError(
            f"shard {place} is missing: put it back, or fetch the manifest.json that belongs to the"
            " shards in this folder"
        )
    return path


def check_shard(
    file: Manifest,
    shard: int,
    table: NDArray[np.int64] | None,
    decode: bool,
    advance: Callable[[int], None],
) -> Found:
    """Checks one shard.

    Args:
        file: The split's manifest.
        shard: Its number.
        table: The split's members.npy; None if that is broken itself.
        decode: Decode the images, or read the texts.
        advance: Told of bytes that were read.

    Returns:
        Its problems, a line each.
    """
    info, place = file.shards[shard], file.shard_place(shard)
    counts = np.zeros(len(file.classes), np.int64)
    try:
        path = _local(file, shard)
    except UserError as error:
        advance(info.bytes)
        return Found([str(error)], counts)
    size = path.stat().st_size
    if size != info.bytes:
        advance(info.bytes)
        lost = ""
        if table is not None and size < info.bytes:
            ends = table[file.starts[shard] : file.starts[shard + 1]]
            gone = np.flatnonzero((ends[:, 0] + ends[:, 1]).clip(ends[:, 2] + ends[:, 3]) > size)
            lost = f", samples {gone[0]} to {len(ends) - 1} are not whole" if len(gone) else ""
        kind = "is cut off, or of another data set" if size < info.bytes else "is another file"
        return Found(
            [f"shard {place} {kind}: {size} bytes, not {info.bytes}{lost}: {_COPY}"], counts
        )
    same = _sha256(path, advance) == info.sha256
    wrong: list[str] = []
    if table is not None and size:
        for label, problem in _check_samples(file, shard, path, table, decode or not same):
            if problem:
                wrong.append(problem)
            if label >= 0:
                counts[label] += 1
    if not same and not wrong:
        return Found(
            [
                f"shard {place}: its sha256 is not the manifest's, though every sample can be read"
                f" (another data set's, or bytes that no checksum in it covers): {_COPY}"
            ],
            counts,
            hidden=True,
        )
    why = "the shard's sha256 is " + ("the manifest's" if same else "not the manifest's")
    cure = _COPY if not same else "make it anew (python -m data.pack --overwrite, or data.index)"
    problems = [f"shard {place}, {problem} ({why}): {cure}" for problem in wrong[:_NAMED]]
    if len(wrong) > _NAMED:
        problems.append(f"shard {place}: {len(wrong) - _NAMED} more samples like these: {cure}")
    return Found(problems, counts)


def check_hashes(file: Manifest, shards: Sequence[int], *, hidden_only: bool = False) -> None:
    """Hashes local shards, and looks closer at one that is not the manifest's.

    Args:
        file: The split's manifest.
        shards: Numbers of the shards.
        hidden_only: Leave out damage that a loader meets by itself, and skips where it may.

    Raises:
        UserError: Names the first damaged shard, and the sample where that can be told.
    """

    def check(shard: int) -> Found | None:
        info, path = file.shards[shard], Path(file.shard_place(shard))
        whole = path.is_file() and path.stat().st_size == info.bytes
        if whole and sha256_of(path) == info.sha256:
            return None
        return check_shard(file, shard, file.members, False, lambda _: None)

    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(check, shards):
            if found is not None and found.problems and (found.hidden or not hidden_only):
                pool.shutdown(cancel_futures=True)
                raise UserError(found.problems[0])


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
        from data.cache import NotThere  # see `_local`

        found = []
        for address in [data, *(manifest.join(data, split) for split in manifest.SPLITS)]:
            with contextlib.suppress(NotThere):
                found.append(Manifest.load(address, cache_dir))
        if not found:
            raise UserError(f"no {manifest.FILE} at {data} or at its splits: check the address")
        return found, []
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(
            manifest.not_packed(folder)
            or f"no data set at {data}: pack it first (python -m data.pack SOURCE {data})"
        )
    folders = [folder, *(folder / split for split in manifest.SPLITS)]
    loaded, problems = [], []
    for root in folders:
        tars = sorted(path.name for path in root.glob("*.tar"))
        if not (root / manifest.FILE).exists():
            if tars:
                problems.append(
                    f"{root} has {len(tars)} tars and no {manifest.FILE}: make one"
                    f" (python -m data.index {root})"
                )
            continue
        try:
            file = Manifest.load(str(root), cache_dir)
        except UserError as error:
            problems.append(str(error))
            continue
        loaded.append(file)
        if root.name in manifest.SPLITS and file.split != root.name:
            problems.append(
                f"{file.place} is of the split {file.split!r} and lies in {root.name}: put back"
                " the one that belongs there, or make it anew (python -m data.index --overwrite)"
            )
        if extra := sorted(set(tars) - {shard.name for shard in file.shards}):
            problems.append(
                f"shard {root / extra[0]} is not in {file.place}"
                + (f", nor are {len(extra) - 1} more" if len(extra) > 1 else "")
                + ": remove what does not belong, or index all (python -m data.index --overwrite)"
            )
    if not loaded and not problems:
        raise UserError(
            manifest.not_packed(folder)
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
    divided = [file for file in loaded if file.split != manifest.UNLABELLED]
    for file in divided[1:]:
        if file.classes != divided[0].classes:
            problems.append(
                f"{file.place} has other classes than {divided[0].place}: they are of different"
                " data sets; put back the right one, or pack both together (python -m data.pack)"
            )
    return loaded, problems


def verify(data: str, decode: bool = False, workers: int = 4, cache_dir: str | None = None) -> None:
    """Checks every shard of a data set: presence, size, sha256, tar headers, labels.

    Args:
        data: The data set's folder or URL, or that of one of its splits.
        decode: Decode every image, or read every text, too.
        workers: Shards that are checked at the same time.
        cache_dir: Where shards of a URL are kept on this machine.

    Raises:
        UserError: There are problems; each has been printed as a line of its own.
    """
    files, problems = _manifests(data, cache_dir)
    for problem in problems:
        print(problem, flush=True)
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
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
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        task = progress.add_task("verifying", total=total)

        def report(problem: str) -> None:
            problems.append(problem)
            print(problem, flush=True)

        try:
            for file in files:
                _verify_split(file, decode, pool, lambda n: progress.advance(task, n), report)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{data} has {count}: named above, with the cure")
    shards = sum(len(file.shards) for file in files)
    samples = sum(file.samples for file in files)
    splits = ", ".join(file.split for file in files)
    size = f"{samples} samples in {shards} shards, {total / 1e6:.1f} MB"
    what = (
        f"hashes, headers, labels and {files[0].kind}s" if decode else "hashes, headers and labels"
    )
    print(f"{data}: {splits}: {size}: {what} are right")


def _verify_split(
    file: Manifest,
    decode: bool,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
    report: Callable[[str], None],
) -> None:
    """Checks the shards of one split in threads; tells of problems in the shards' order."""
    table: NDArray[np.int64] | None = None
    try:
        table = _table(file)
    except UserError as error:
        report(str(error))
    counts = np.zeros(len(file.classes), np.int64)
    whole = table is not None
    jobs = pool.map(
        lambda shard: check_shard(file, shard, table, decode, advance), range(len(file.shards))
    )
    for found in jobs:
        counts += found.counts
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


if __name__ == "__main__":
    from data.cli import run

    run(verify)
