"""Step 4, numbers -> a batch: torch Datasets, whose items are whole micro-batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from selfdistill.data.errors import BrokenData, TryAgain, UserError
from selfdistill.data.formats.texts import Texts
from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.order import Ints, Order
from selfdistill.data.loading.reader import Reader, Record
from selfdistill.data.loading.shared_memory import Ring, carried
from selfdistill.data.loading.windows import Windows

# Makes arrays [b, ...] from positions int64 [b] and the batch that stands there.
Keyed = Callable[[Ints, dict[str, torch.Tensor]], dict[str, NDArray[Any]]]

# A broken sample is replaced by the next readable one of its partition, looked for this far ahead.
_TRIES = 64


class Samples(Dataset[dict[str, Any]], ABC):
    """Reads and decodes the samples of a batch; an error is returned, so that its line survives."""

    def __init__(
        self, reader: Reader, codec: Codec, skip: bool, windows: Windows | None = None
    ) -> None:
        self.reader = reader
        self.codec = codec
        self.skip = skip
        self.windows = windows
        self.ring: Ring | None = None

    def _sample(self, sample: int) -> tuple[NDArray[Any], Record]:
        if self.windows is None:
            record = self.reader.record(sample)
            return self.codec.decode(record.input, record.name), record
        window = self.windows.window(sample)
        record = self.reader.record(window.text)
        if window.parts == 1:
            return self.codec.decode(record.input, record.name), record
        assert isinstance(self.codec, Texts)
        return self.codec.window(record.input, record.name, window.pieces), record

    def _labels(self, records: list[Record]) -> torch.Tensor:
        """Class numbers int64 [b], -1 for none; of a set with several labels bool [b, C]."""
        manifest = self.reader.manifest
        if not manifest.several:
            return torch.tensor([r.label for r in records], dtype=torch.int64)
        found = torch.zeros(len(records), len(manifest.classes), dtype=torch.bool)
        for row, record in zip(found, records, strict=True):
            row[list(record.labels)] = True
        return found

    @abstractmethod
    def batch(self, positions: Ints, room: NDArray[np.uint8] | None = None) -> dict[str, Any]:
        """The batch at these positions, made in `room` as far as that is enough."""

    def __getitem__(self, numbered: tuple[int, Ints]) -> dict[str, Any]:
        number, positions = numbered
        try:
            batch = self.batch(positions, self.ring.room(number) if self.ring else None)
        except UserError as error:
            return {"error": str(error), "passing": isinstance(error, TryAgain)}
        noted, self.codec.noted = self.codec.noted[:1], []
        batch["noted"] = noted
        return self.ring.carry(number, batch) if self.ring else carried(batch)

    def _prefetches(self) -> bool:
        """Whether this process is the one that fetches ahead."""
        worker = torch.utils.data.get_worker_info()
        return self.reader.remote and (worker is None or worker.id == 0)


class Stream(Samples):
    """Batches of the endless stream."""

    def __init__(
        self,
        reader: Reader,
        codec: Codec,
        skip: bool,
        windows: Windows | None,
        order: Order,
        keyed: Keyed | None,
    ) -> None:
        super().__init__(reader, codec, skip, windows)
        self.order = order
        self.keyed = keyed
        self._ahead: list[list[int]] = []

    def batch(self, positions: Ints, room: NDArray[np.uint8] | None = None) -> dict[str, Any]:
        """The inputs, labels, positions, ids, the keyed numbers, and what was broken."""
        ids = self.order.ids(positions)
        self._prefetch(positions)
        inputs, records, broken = [], [], {}
        for row, position in enumerate(positions):
            reason = ""
            for attempt in range(_TRIES):
                try:
                    array, record = self._sample(int(ids[row]))
                    break
                except BrokenData as error:
                    if not self.skip:
                        raise
                    broken[int(ids[row])] = reason = str(error)
                    following = int(position) + (attempt + 1) * self.order.partitions
                    ids[row] = self.order.ids(np.array([following]))[0]
            else:
                raise UserError(f"{_TRIES} samples in a row are broken; the last: {reason}")
            inputs.append(array)
            records.append(record)
        out: dict[str, Any] = self.codec.collate(inputs, [r.name for r in records], room) | {
            "labels": self._labels(records),
            "positions": torch.from_numpy(positions.copy()),
            "ids": torch.from_numpy(ids),
        }
        if self.keyed is not None:
            out |= {
                k: torch.from_numpy(np.ascontiguousarray(v))
                for k, v in self.keyed(positions, out).items()
            }
        return out | {"broken": broken}

    def _prefetch(self, positions: Ints) -> None:
        """Remote shards of this window and the next are fetched ahead by the first worker."""
        if not self._prefetches():
            return
        _, first = np.unique(positions % self.order.partitions, return_index=True)
        ahead = [self.order.shards_ahead(int(positions[i])) for i in first]
        # The current window of every partition comes before anybody's next.
        windows = [w for nth in zip(*ahead, strict=True) for w in nth]
        if windows != self._ahead:
            self._ahead = windows
            self.reader.prefetch(list(dict.fromkeys(s for w in windows for s in w)))


class Rows(Samples):
    """Batches of one pass; ids of -1 pad the last ones."""

    def batch(self, positions: Ints, room: NDArray[np.uint8] | None = None) -> dict[str, Any]:
        """The inputs, labels, positions, ids, valid, and what was broken."""
        ids = positions.copy()
        self._prefetch(int(positions.max()))
        found: dict[int, tuple[NDArray[Any], Record]] = {}
        broken = {}
        for row, sample in enumerate(positions):
            if sample < 0:
                continue
            try:
                found[row] = self._sample(int(sample))
            except BrokenData as error:
                if not self.skip:
                    raise
                broken[int(sample)] = str(error)
        blank = self.codec.blank(next(iter(found.values()))[0] if found else None)
        if blank is None:
            blank = self.codec.blank(self._readable())
        assert blank is not None
        padding = blank, Record(b"", -1, "padding")
        rows = [found.get(row, padding) for row in range(len(ids))]
        return self.codec.collate([r[0] for r in rows], [r[1].name for r in rows], room) | {
            "labels": self._labels([r[1] for r in rows]),
            "positions": torch.from_numpy(positions.copy()),
            "ids": torch.from_numpy(ids),
            "valid": torch.tensor([row in found for row in range(len(ids))], dtype=torch.bool),
            "broken": broken,
        }

    def _readable(self) -> NDArray[Any]:
        """The array of the first sample that can be read."""
        split = self.windows or self.reader.manifest
        last = min(split.samples, _TRIES) - 1
        for sample in range(last):
            try:
                return self._sample(sample)[0]
            except BrokenData:
                if not self.skip:
                    raise
        return self._sample(last)[0]

    def _prefetch(self, sample: int) -> None:
        """The remote shards after this one are fetched ahead by the first worker."""
        if sample >= 0 and self._prefetches():
            starts = (self.windows or self.reader.manifest).starts
            shard = int(np.searchsorted(starts, sample, side="right")) - 1
            self.reader.prefetch(list(range(shard, min(shard + 3, len(starts) - 1))))
