"""Writes shards with WebDataset's own writer: which samples each holds follows from its number."""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import rng
from selfdistill.data.errors import UserError
from selfdistill.data.formats import labels
from selfdistill.data.packing.encoding import Kind
from selfdistill.data.shards import duplicates, manifest, tars
from selfdistill.data.sources.samples import Sample, Stream


@dataclass(frozen=True)
class Shard:
    """One shard, and what the index of its split needs of it.

    Attributes:
        number: It holds the samples from number * samples_per_shard on, in the split's order.
        info: Of its tar; None where all of its samples were unreadable, and there is none.
        members: int64 [n, 4], see `Manifest.members`.
        labels: Of each sample.
        digests: Of each input, see `duplicates`.
        left_out: The unreadable samples, and why.
        names: Of the samples, for messages; empty where they are not kept.
    """

    number: int
    info: manifest.ShardInfo | None
    members: NDArray[np.int64]
    labels: list[labels.Label | None]
    digests: list[int]
    left_out: list[str]
    names: Sequence[Sample] = ()


class _Placed(NamedTuple):
    """A sample, its place in the split's order, and what gives its member once it is made."""

    at: int
    sample: Sample
    made: Callable[[], tuple[str, bytes]]


def _encoded(samples: Iterable[tuple[int, Sample]], kind: Kind) -> Iterator[_Placed]:
    """Encodes and yields in order; what takes long in threads, a few samples at a time."""
    if not kind.slow:
        for at, sample in samples:
            yield _Placed(at, sample, functools.partial(kind.encode, sample))
        return
    threads = min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[tuple[int, Sample, Future[tuple[str, bytes]]]] = []
        try:
            for at, sample in samples:
                waiting.append((at, sample, pool.submit(kind.encode, sample)))
                if len(waiting) > 4 * threads:
                    first, oldest, made = waiting.pop(0)
                    yield _Placed(first, oldest, made.result)
            yield from (_Placed(at, sample, made.result) for at, sample, made in waiting)
        finally:
            for _, _, made in waiting:
                made.cancel()


def _key(number: int, key: str) -> str:
    """A WebDataset key: no dots (they begin the extension), unique, short enough for any tar."""
    readable = re.sub(r"[^A-Za-z0-9_-]+", "_", key)[-60:].strip("_")
    return f"{number:08d}-{readable}" if readable else f"{number:08d}"


def _label(sample: Sample, classes: int) -> tuple[str, bytes]:
    """Extension and bytes of a sample's label member.

    Raises:
        UserError: There are not so many classes.
    """
    own = labels.numbers(sample.label)
    if any(not 0 <= label < classes for label in own):
        raise UserError(
            f"{sample.name}: label {sample.label} is outside the {classes} classes: correct it"
        )
    if isinstance(sample.label, tuple):
        return labels.SEVERAL, labels.several(own)
    return "cls", str(own[0]).encode()


def index_tars(
    folder: Path, names: list[str]
) -> tuple[list[manifest.ShardInfo], NDArray[np.int64]]:
    """Shards and table of members of tars as `write_split` makes them, in this order."""
    shards, tables = [], []
    for name in names:
        path = folder / name
        rows: dict[str, list[int]] = {}
        for member in tars.scan(path):
            key, extension = tars.split_name(member.name) or (member.name, "")
            row = rows.setdefault(key, [-1, -1, -1, -1])
            at = 2 if extension in ("cls", labels.SEVERAL) else 0
            row[at : at + 2] = member.offset, member.size
        size = path.stat().st_size
        shards.append(manifest.ShardInfo(name, tars.sha256_of(path), size, len(rows)))
        tables.append(np.array(list(rows.values()), dtype=np.int64).reshape(-1, 4))
    return shards, np.concatenate(tables)


class _Writing:
    """A shard that is being written, under a name that tells so.

    Args:
        path: Of the tar, once it is whole.
        number: See `Shard`.
        keep: Keep the samples, for their names.
    """

    def __init__(self, path: Path, number: int, keep: bool) -> None:
        self.path, self.number, self.keep = path, number, keep
        self.draft = path.with_name(f".{path.name}.{os.getpid()}")
        self.samples: list[Sample] = []
        self.labels: list[labels.Label | None] = []
        self.digests: list[int] = []
        self.left_out: list[str] = []
        import webdataset  # it imports torch: seconds, for which no mistake need wait

        self._file = self.draft.open("wb")
        self._tar = webdataset.TarWriter(
            self._file, encoder=False, mtime=0, user="root", group="root"
        )

    def add(self, at: int, sample: Sample, extension: str, content: bytes, classes: int) -> None:
        """Writes a sample."""
        record: dict[str, str | bytes] = {"__key__": _key(at, sample.key), extension: content}
        if sample.label is not None:
            member, number = _label(sample, classes)
            record[member] = number
        self._tar.write(record)
        self.labels.append(sample.label)
        self.digests.append(duplicates.digest(content, text=extension == "txt"))
        if self.keep:
            self.samples.append(sample)

    def close(self) -> Shard:
        """The shard, whole and in its place."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())  # a record will say that it is there
        self._file.close()
        if not self.labels:
            self.draft.unlink()
            nothing = np.empty((0, 4), np.int64)
            return Shard(self.number, None, nothing, [], [], self.left_out)
        self.draft.rename(self.path)
        (info,), members = index_tars(self.path.parent, [self.path.name])
        known = (self.labels, self.digests, self.left_out, self.samples)
        return Shard(self.number, info, members, *known)

    def abort(self) -> None:
        """Leaves nothing."""
        with contextlib.suppress(OSError):  # such as a full disk, again
            self._tar.close()
        with contextlib.suppress(OSError):
            self._file.close()
        self.draft.unlink(missing_ok=True)


def write_shards(
    samples: Iterable[Sample],
    classes: int,
    folder: Path,
    *,
    kind: Kind,
    stem: str,
    samples_per_shard: int,
    skip_broken: bool = False,
    wanted: Callable[[int], bool] = lambda number: True,
    advance: Callable[[], object] = lambda: None,
) -> Iterator[Shard]:
    """Writes shards one after the other, whichever are wanted: the same bytes in any launch.

    A shard's samples follow from its number alone, and an unreadable one is missing in its own. A
    list of samples is shuffled first, always in the same way.

    Args:
        samples: See `write_split`.
        classes: Their number.
        folder: Where the tars go.
        kind: How samples are stored.
        stem: First part of the tars' names.
        samples_per_shard: Samples in a tar.
        skip_broken: See `write_split`.
        wanted: Which shards, by number.
        advance: Called after each sample.

    Raises:
        UserError: An unreadable sample, a wrong label.
    """
    keep = isinstance(samples, Sequence)
    if isinstance(samples, Stream):
        makers = enumerate(samples.makers())
        chosen = ((at, make()) for at, make in makers if wanted(at // samples_per_shard))
    else:
        if isinstance(samples, Sequence):
            samples = [samples[i] for i in rng.permutation(0, "pack", 0, len(samples))]
        chosen = ((at, s) for at, s in enumerate(samples) if wanted(at // samples_per_shard))
    now: _Writing | None = None
    try:
        for at, sample, made in _encoded(chosen, kind):
            number = at // samples_per_shard
            if now is not None and now.number != number:
                done, now = now.close(), None
                yield done
            now = now or _Writing(folder / f"{stem}-{number:06d}.tar", number, keep)
            try:
                extension, content = made()
            except ValueError as error:
                if not skip_broken:
                    raise UserError(
                        f"{sample.name}: the {kind.name} cannot be read: {error}: mend or"
                        f" remove it, or leave such {kind.name}s out with --skip_broken"
                    ) from None
                now.left_out.append(f"{sample.name}: {error}")
            else:
                now.add(at, sample, extension, content, classes)
            finally:
                advance()
        if now is not None:
            done, now = now.close(), None
            yield done
    finally:
        if now is not None:
            now.abort()
