"""One shard against its manifest: what it lacks, what is damaged in it, what it holds besides."""

import functools
import hashlib
import mmap
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import UserError
from selfdistill.data.formats import images, labels, texts
from selfdistill.data.formats.labels import Label
from selfdistill.data.shards import duplicates, manifest, tars
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.shards.tars import BLOCK, parse_header, sha256_of

# Broken samples of one shard that are named; the rest is counted.
_NAMED = 5
_CHUNK = 8 * 2**20
_COPY = "copy it again from where it is whole, or make it anew (python -m data.pack --overwrite)"


class Found(NamedTuple):
    """What one shard showed.

    Attributes:
        problems: A line each.
        counts: int64 [C], samples of each class.
        hidden: Its sha256 is another, and no sample shows it.
        unreadable: Images of which something beside the pixels could not be read.
        inputs: Digest and label of each sample that could be read, and the number of that sample.
    """

    problems: list[str]
    counts: NDArray[np.int64]
    hidden: bool = False
    unreadable: int = 0
    inputs: Sequence[tuple[int, Label, int]] = ()


class _Names:
    """What lies in a shard: the names of the file that begins at an offset, links' too."""

    def __init__(self, members: Sequence[tars.Member]) -> None:
        self.at: dict[int, list[str]] = {}
        for member in members:
            if tars.of_sample(member.name):
                self.at.setdefault(member.offset, []).append(member.name)
        self.empty = {member.name for member in members if not member.size}
        self.all = {name for names in self.at.values() for name in names}

    def are_one(self, input_: int, label: int) -> bool:
        """Whether the files at two offsets are of one sample."""
        for name in self.at.get(input_, []):
            for other in self.at.get(label, []):
                suffix, stem = other.rpartition(".")[2], name.rpartition(".")[0]
                if other in (f"{stem}.{suffix}", f"{stem}.{labels.SEVERAL}"):
                    return True
                # WebDataset's key ends at the first dot; but what is left.cls to right.jpg?
                if _key(name) == _key(other) and f"{stem}.{suffix}" not in self.all:
                    return True
        return False

    def lost(self, file: Manifest, rows: NDArray[np.int64]) -> list[str]:
        """Keys of samples that no row has."""
        suffixes = images.SUFFIXES if file.kind == "image" else {f".{file.text['stored']}"}
        there = {
            _key(name)
            for name in self.all - self.empty
            if f".{name.rpartition('.')[2]}".lower() in suffixes
        }
        return sorted(there - {_key(n) for at in rows[:, 0].tolist() for n in self.at.get(at, [])})


def _key(name: str) -> str:
    split = tars.split_name(name)
    return name if split is None else split[0]


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
    names: _Names | None,
    file: Manifest,
    decode: Callable[[bytes], object] | None,
) -> tuple[int, Label, str]:
    """One sample's digest and label (-1 for none), and what is wrong with it ("" for nothing)."""
    at, size, label_at, label_size = row.tolist()
    name = ""
    try:
        name, content = _member(buffer, at, size)
        label: Label = -1
        if label_at >= 0:
            label_name, text = _member(buffer, label_at, label_size)
            if names is not None and not names.are_one(at, label_at):
                raise ValueError(f"its label is that of another sample, {label_name}")
            label = labels.parse_several(text) if file.several else labels.parse(text)
        elif label_at == manifest.IN_TABLE and not file.several:
            label = label_size
        own, classes = label if isinstance(label, tuple) else (label,), len(file.classes)
        if any(one >= classes or one < -1 for one in own):
            raise ValueError(f"its label {label} is outside the {classes} classes")
        if decode is not None:
            decode(content)
        return duplicates.digest(content, text=file.text.get("stored") == "txt"), label, ""
    except ValueError as error:
        return 0, -1, f"{name}: {error}" if name else str(error)


def _check_samples(
    file: Manifest,
    shard: int,
    path: Path,
    rows: NDArray[np.int64],
    names: _Names | None,
    decode: bool,
    on_unreadable: images.OnUnreadable = None,
) -> Iterator[tuple[int, Label, str]]:
    """Each sample's digest, label and problem; see `_check_sample`."""
    parse: Callable[[bytes], object] = functools.partial(
        images.read, on_unreadable=on_unreadable, span=file.span
    )
    if file.kind == "text":
        parse = functools.partial(texts.read, stored=file.text["stored"])
    with (
        path.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as buffer,
    ):
        for number, row in enumerate(rows):
            digest, label, wrong = _check_sample(
                buffer, row, names, file, parse if decode else None
            )
            yield digest, label, f"sample {number}, {wrong}" if wrong else ""


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
        from selfdistill.data.remote.cache import ShardCache

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
    inputs: list[tuple[int, Label, int]] = []
    unreadable: list[bool] = []
    names, broken = None, ""
    try:
        names = _Names(tars.scan(path))
    except tarfile.TarError as error:
        broken = f"shard {place} is no whole tar ({error}): {_COPY}"
    unindexed: list[str] = []
    if table is not None and size:
        rows = table[file.starts[shard] : file.starts[shard + 1]]
        samples = _check_samples(
            file, shard, path, rows, names, decode or not same, lambda: unreadable.append(True)
        )
        for number, (digest, label, problem) in enumerate(samples):
            if problem:
                wrong.append(problem)
            else:
                inputs.append((digest, label, number))
            if isinstance(label, tuple):
                counts[list(label)] += 1
            elif label >= 0:
                counts[label] += 1
        unindexed = [] if names is None else names.lost(file, rows)
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
    if broken and same:
        problems.append(broken)
    if unindexed and same and not wrong:
        problems.append(
            f"shard {place} holds {len(unindexed)} samples that members.npy lacks, such as"
            f" {unindexed[0]}: make it anew (python -m data.index --overwrite)"
        )
    return Found(problems, counts, unreadable=len(unreadable), inputs=inputs)


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
