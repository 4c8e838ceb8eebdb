"""Between steps 4 and 5: a batch comes from a worker to the trainer in shared memory.

torch hands a tensor over as a file in shared memory, which costs a millisecond or so however small
it is. Here a batch's large arrays lie in memory that both processes have from the start, and its
small ones go through the pipe. Handing a batch over takes 6 to 8 microseconds an image at 64
pixels; torch's way takes 36 to 45 (docs/performance-log.md, the loader).
"""

import itertools
import mmap
import weakref
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

_SMALL = 2**15  # bytes, above which an array that lies in the ring stays there
_BY_PIPE = 2**20  # bytes, up to which the pipe is cheaper than torch's way

_numbers = itertools.count()
_rings: weakref.WeakValueDictionary[int, "Ring"] = weakref.WeakValueDictionary()


class Ring:
    """Memory for the batches that are on their way; batch n lies in slot n mod `slots`.

    A slot needs no message when it becomes free. There are more slots than batches on their way,
    and a batch is requested only after the previous batch of its slot was taken out. The ring is
    made before the workers are forked. Pages that no batch fills take no memory.

    Args:
        slots: More than the batches that the workers are asked for ahead.
        nbytes: Of a slot.
    """

    def __init__(self, slots: int, nbytes: int) -> None:
        self.slots, self.nbytes = slots, nbytes
        self.number = next(_numbers)
        self._memory = mmap.mmap(-1, slots * nbytes)
        _rings[self.number] = self

    def room(self, batch: int) -> NDArray[np.uint8]:
        """The memory of a batch's slot."""
        return self.view(batch % self.slots * self.nbytes, "|u1", (self.nbytes,))

    def view(self, at: int, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The array that begins at a byte."""
        size = int(np.prod(shape, dtype=np.int64))
        return np.frombuffer(self._memory, dtype, size, at).reshape(shape)

    def carry(self, batch: int, entries: dict[str, Any]) -> dict[str, Any]:
        """What a worker sends of its batch; `received` undoes it.

        Args:
            batch: Its number in the stream.
            entries: Tensors and others. A large one lies in the slot already, or is copied behind
                what does as far as there is room; the others go as `carried` has it.
        """
        room, first = self.room(batch), batch % self.slots * self.nbytes
        begin = room.ctypes.data
        large = {
            name: value
            for name, value in entries.items()
            if isinstance(value, torch.Tensor) and value.nbytes > _SMALL and value.is_contiguous()
        }
        places = {name: value.data_ptr() - begin for name, value in large.items()}
        there = {name: at for name, at in places.items() if 0 <= at < self.nbytes}
        end = max((at + large[name].nbytes for name, at in there.items()), default=0)
        out = dict(entries)
        for name, value in large.items():
            at = there.get(name, -(-end // 64) * 64)
            if name not in there:
                if value.nbytes <= _BY_PIPE or at + value.nbytes > self.nbytes:
                    continue
                end = at + value.nbytes
                room[at:end] = value.numpy().reshape(-1).view(np.uint8)
            out[name] = InRing(self.number, first + at, value.numpy().dtype.str, tuple(value.shape))
        return carried(out)


class InRing(NamedTuple):
    """An array that a worker left in a ring."""

    ring: int
    at: int
    dtype: str
    shape: tuple[int, ...]

    def tensor(self) -> torch.Tensor:
        """A copy: another batch will lie there."""
        return torch.from_numpy(_rings[self.ring].view(*self[1:]).copy())

    def pin_memory(self, *_: Any) -> torch.Tensor:
        """A copy in page-locked memory, made by DataLoader's thread."""
        return torch.from_numpy(_rings[self.ring].view(*self[1:])).pin_memory()


class ByPipe(NamedTuple):
    """An array that is sent as its bytes."""

    array: NDArray[Any]

    def tensor(self) -> torch.Tensor:
        """Without a copy."""
        return torch.from_numpy(self.array)

    def pin_memory(self, *_: Any) -> torch.Tensor:
        """In page-locked memory, where DataLoader's thread puts what has this method."""
        return torch.from_numpy(self.array).pin_memory()


def carried(entries: dict[str, Any]) -> dict[str, Any]:
    """What a worker sends of a batch without a ring."""

    def of(value: Any) -> Any:
        small = isinstance(value, torch.Tensor) and value.nbytes <= _BY_PIPE
        return ByPipe(value.numpy()) if small else value

    return {name: of(value) for name, value in entries.items()}


def received(entries: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A batch of tensors, of what a worker sent."""
    return {k: v.tensor() if isinstance(v, InRing | ByPipe) else v for k, v in entries.items()}
