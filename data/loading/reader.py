"""Step 2, number -> bytes: from local tars by offset, from remote ones by the node's cache.

What is caught here, without hashing local shards at every start (`data.verify` does that): a
missing shard; one whose size is not the manifest's; a tar header that fails its checksum or names
another size; a label that is no number or outside the classes; and, once decoded, any flipped byte
of a PNG (by the CRC of its chunks). What is not: a digit of a label that turned into another valid
one, and flipped bytes in the pixels of a format without checksums (JPEG, WebP under
--keep_original): for those the engine hashes the shards once before it trains (--data.check).
Remote shards are checked against their sha256 when they are fetched.
"""

import bisect
import functools
import os
import stat
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import PASSING, BrokenData, TryAgain, UserError
from selfdistill.data.files import LARGEST
from selfdistill.data.formats import labels
from selfdistill.data.remote.cache import Report, ShardCache
from selfdistill.data.remote.fetch import Away
from selfdistill.data.shards.manifest import FILE, IN_TABLE, MEMBERS, Manifest, is_remote
from selfdistill.data.shards.tars import BLOCK, parse_header

# Read label and input in one go when no more than this lies between them.
_GAP = 64 * 1024
# Beyond so many local shards they are checked when first opened, not all at the start.
_CHECKED_AT_START = 20_000


class Record(NamedTuple):
    """A sample: the input's bytes, its label (-1 for none), and a name for messages.

    Of a set with several labels a sample `label` is -1, and `labels` has them all, in order.
    """

    input: bytes
    label: int
    name: str
    labels: tuple[int, ...] = ()


def _refused(place: str, error: OSError, verb: str = "opened") -> UserError:
    """Why a shard cannot be opened or read: for now, or until somebody mends it."""
    what = f"shard {place} cannot be {verb}: {error.strerror}"
    if error.errno in PASSING:
        return TryAgain(f"{what}: launch again, or see to the file system")
    return BrokenData(
        f"{what}: put it back, or pack the data anew (python -m data.pack --overwrite)"
    )


class Reader:
    """Reads samples by id.

    Args:
        manifest: The split.
        cache_dir: Folder of fetched shards; by default the one that the manifest names.
        cache_gb: Limit of that folder in GB (1e9 bytes).
        max_open: Shards kept open.
        report: See `ShardCache`.
        verify: See `ShardCache`.
    """

    def __init__(
        self,
        manifest: Manifest,
        cache_dir: str | None = None,
        cache_gb: float | None = None,
        max_open: int = 64,
        report: Report | None = None,
        verify: bool = False,
    ) -> None:
        self.manifest = manifest
        self.max_open = max_open
        self.remote = any(is_remote(manifest.shard_place(s)) for s in range(len(manifest.shards)))
        self.cache: ShardCache | None = None
        if self.remote:
            place = cache_dir or manifest.cache_dir
            self.cache = ShardCache(place, cache_gb, report, verify)
        self._open: OrderedDict[int, int] = OrderedDict()
        self._failed: dict[int, str] = {}
        self._pid = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, and without what is made of the manifest."""
        made = ("_starts", "_places", "_sizes", "_all_labelled")
        kept = {k: v for k, v in self.__dict__.items() if k not in made}
        return {**kept, "_open": OrderedDict()}

    def close(self) -> None:
        """Closes the open shards."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        # A loader that is dropped instead of closed must not use up the process's descriptors.
        # At the end of the program modules are gone, and what is open closes by itself.
        try:  # noqa: SIM105
            self.close()
        except (AttributeError, OSError):
            pass

    @property
    def opened(self) -> list[int]:
        """The shards that are open, least recently used first."""
        return list(self._open)

    def check_shards(self) -> None:
        """Looks whether the local shards are there and have the right size.

        Raises:
            BrokenData: Names the first that is not.
        """
        if len(self.manifest.shards) <= _CHECKED_AT_START:
            for shard in range(len(self.manifest.shards)):
                place = self.manifest.shard_place(shard)
                if not is_remote(place):
                    self._check_size(shard, place, None)

    def _check_size(self, shard: int, place: str, fd: int | None) -> None:
        try:
            status = os.stat(place) if fd is None else os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "it is no regular file")
            found = status.st_size
        except OSError as error:
            raise _refused(place, error) from None
        wanted = self.manifest.shards[shard].bytes
        if found != wanted:
            what = "is cut off" if found < wanted else "is another file"
            raise BrokenData(
                f"shard {place} {what}: {found} bytes where {self.manifest.place} says {wanted}:"
                " copy it again, or pack the data anew (python -m data.pack --overwrite)"
            )

    def _descriptor(self, shard: int) -> int:
        """A file descriptor of a shard's local copy; fetches remote ones."""
        if self._pid != os.getpid():  # forked: the parent keeps its own descriptors
            self._open, self._pid = OrderedDict(), os.getpid()
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if shard in self._failed:
            raise BrokenData(self._failed[shard])
        info = self.manifest.shards[shard]
        place = self.manifest.shard_place(shard)
        try:
            if self.cache is not None and is_remote(place):
                self._release()
                fd = self.cache.open(place, info.sha256, info.bytes)
            else:
                try:
                    fd = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                except OSError as error:
                    self._check_size(shard, place, None)
                    raise _refused(place, error) from None
                try:
                    self._check_size(shard, place, fd)
                except UserError:
                    os.close(fd)
                    raise
        except Away as error:  # no fault of the shard's: it is neither skipped nor given up
            raise TryAgain(str(error)) from None
        except BrokenData as error:
            self._failed[shard] = str(error)
            raise
        self._open[shard] = fd
        if len(self._open) > self.max_open:
            os.close(self._open.popitem(last=False)[1])
        return fd

    def _release(self) -> None:
        """Closes what the cache has dropped: as long as it is open its blocks are not free."""
        for shard in [s for s, fd in self._open.items() if not os.fstat(fd).st_nlink]:
            os.close(self._open.pop(shard))

    def prefetch(self, shards: list[int]) -> None:
        """Fetches remote shards in the background, in this order; older wishes are dropped."""
        if self.cache is not None:
            infos = [(self.manifest.shard_place(s), self.manifest.shards[s]) for s in shards]
            self.cache.prefetch([(p, i.sha256, i.bytes) for p, i in infos if is_remote(p)])

    def read(self, ids: NDArray[np.int64]) -> list[Record]:
        """Reads samples.

        Args:
            ids: int64 [b], sample ids.

        Returns:
            One record for each, in this order.

        Raises:
            BrokenData: Names shard, sample and cure.
        """
        return [self.record(int(i)) for i in ids]

    def record(self, sample: int) -> Record:
        """Reads one sample; see `read`."""
        # A microsecond is a quarter of a percent of a small image's whole cost: hence lists and a
        # plain array where a memory map's own indexing takes ten times as long.
        shard = bisect.bisect_right(self._starts, sample) - 1
        at, size, label_at, label_size = self.manifest.members[sample].tolist()
        fd = self._descriptor(shard)
        name = f"sample {sample - self._starts[shard]}"
        if fault := self._fault(shard, at, size, label_at, label_size):
            raise self._broken(shard, name, fault)
        span, label = (at - BLOCK, at + size), -1
        several: tuple[int, ...] = ()
        try:
            if label_at < 0:
                parts = [(os.pread(fd, span[1] - span[0], span[0]), 0)]
            else:
                label_span = (label_at - BLOCK, label_at + label_size)
                low, high = min(span[0], label_span[0]), max(span[1], label_span[1])
                if high - low <= size + label_size + _GAP:
                    whole = os.pread(fd, high - low, low)
                    parts = [(whole, span[0] - low), (whole, label_span[0] - low)]
                else:
                    parts = [(os.pread(fd, b - a, a), 0) for a, b in (span, label_span)]
        except OSError as error:
            raise _refused(self._places[shard], error, "read") from None
        try:
            content, name = self._member(*parts[0], size)
            if label_at == IN_TABLE:
                label = label_size
            elif label_at >= 0:
                label, several = self._label(self._member(*parts[1], label_size)[0])
        except ValueError as error:
            raise self._broken(shard, name, str(error)) from None
        return Record(content, label, f"shard {self._places[shard]}, {name}", several)

    def label(self, sample: int) -> int:
        """Reads the label of a sample alone, where each has one; -1 for none. See `read`."""
        shard = bisect.bisect_right(self._starts, sample) - 1
        at, size, label_at, label_size = self.manifest.members[sample].tolist()
        name = f"sample {sample - self._starts[shard]}"
        if fault := self._fault(shard, at, size, label_at, label_size):
            raise self._broken(shard, name, fault)
        if label_at < 0:
            return int(label_size)  # IN_TABLE, or -1
        part = os.pread(self._descriptor(shard), BLOCK + label_size, label_at - BLOCK)
        try:
            return self._label(self._member(part, 0, label_size)[0])[0]
        except ValueError as error:
            raise self._broken(shard, name, str(error)) from None

    def _broken(self, shard: int, name: str, fault: str) -> BrokenData:
        return BrokenData(
            f"shard {self._places[shard]}, {name}: {fault}: check the shards"
            " (python -m data.verify) and fetch or pack this one anew, or allow some to be"
            " skipped (--data.skip_broken 0.01)"
        )

    def _fault(self, shard: int, at: int, size: int, label_at: int, label_size: int) -> str:
        """What is wrong with a row of the table of members, which may come from elsewhere."""
        end = self._sizes[shard]
        if not (0 <= size <= LARGEST and BLOCK <= at <= end - size):
            return f"{MEMBERS} places it at byte {at}, with {size} bytes, in a shard of {end}"
        if label_at == -1 and self._all_labelled:
            return f"{MEMBERS} has no label for it, and {FILE} says that all samples have one"
        if label_at == IN_TABLE and self.manifest.several:
            return f"{MEMBERS} has one label for it, and {FILE} says that samples have several"
        if label_at == IN_TABLE:
            classes = len(self.manifest.classes)
            wrong = not 0 <= label_size < classes
            return f"its label {label_size} is outside the {classes} classes" if wrong else ""
        fits = 0 <= label_size <= labels.LARGEST and BLOCK <= label_at <= end - label_size
        if label_at != -1 and not fits:
            return (
                f"{MEMBERS} places its label at byte {label_at}, with {label_size} bytes, in a"
                f" shard of {end}"
            )
        return ""

    @functools.cached_property
    def _sizes(self) -> list[int]:
        """Bytes of each shard."""
        return [info.bytes for info in self.manifest.shards]

    @functools.cached_property
    def _all_labelled(self) -> bool:
        return bool(self.manifest.samples == self.manifest.labelled > 0)

    @functools.cached_property
    def _starts(self) -> list[int]:
        """Id of each shard's first sample, and N."""
        return [int(start) for start in self.manifest.starts]

    @functools.cached_property
    def _places(self) -> list[str]:
        """Path or URL of each shard."""
        return [self.manifest.shard_place(shard) for shard in range(len(self.manifest.shards))]

    @staticmethod
    def _member(part: bytes, at: int, size: int) -> tuple[bytes, str]:
        """A member's bytes and name, its header being at `at` of a part of the shard."""
        begin = at + BLOCK
        if len(part) < begin + size:
            raise ValueError("the shard ends within it")
        header = parse_header(part[at:begin])
        if header.size != size:
            raise ValueError(f"the tar holds {header.size} bytes where the manifest says {size}")
        return part[begin : begin + size], header.name

    def _label(self, text: bytes) -> tuple[int, tuple[int, ...]]:
        """The class number from a label member, or the numbers, as `Record` has them."""
        if self.manifest.several:
            several = labels.parse_several(text)
            label = several[-1] if several else -1
        else:
            several, label = (), labels.parse(text)
        if label >= len(self.manifest.classes):
            raise ValueError(
                f"its label {label} is outside the {len(self.manifest.classes)} classes"
                f" of {self.manifest.place}"
            )
        return (-1, several) if self.manifest.several else (label, ())
