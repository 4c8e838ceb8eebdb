"""Inputs -> batches for a model, read and decoded by worker processes as training's are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from selfdistill.data.errors import BrokenData, printable
from selfdistill.data.inputs.base import Inputs
from selfdistill.data.inputs.packed import Packed
from selfdistill.data.loading.batches import Batches
from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.datasets import Samples
from selfdistill.data.loading.order import Ints
from selfdistill.engine.inference.model import Loaded

#: Beside what a codec makes of a batch: names and reasons of its inputs, a list entry each.
NAMES, ERRORS = "names", "errors"


class Listed(Samples):
    """Batches of inputs by their places; what cannot be read is left out of the tensors, and told.

    Args:
        inputs: all of them.
        model: for which.
    """

    def __init__(self, inputs: Inputs, model: Loaded) -> None:
        packed = isinstance(inputs, Packed)
        codec: Codec = model.codec
        if isinstance(inputs, Packed):
            codec = model.codec_of(inputs.manifest)
        super().__init__(cast(Any, None), codec, skip=True)
        self.inputs = inputs
        self.decode = codec.decode if packed else model.decode

    def batch(self, positions: Ints, room: NDArray[np.uint8] | None = None) -> dict[str, Any]:
        """The readable inputs' tensors, and of all names and errors ("" for none)."""
        arrays, kept, names, errors = [], [], [], []
        for position in positions:
            one = self.inputs.read(int(position))
            error = one.error
            if not error:
                try:
                    arrays.append(self.decode(cast(Any, one.content), one.name))
                    kept.append(one.name)
                except BrokenData as caught:
                    error = printable(" ".join(str(caught).split()))
            names.append(one.name)
            errors.append(error)
        found: dict[str, Any] = self.codec.collate(arrays, kept, room) if arrays else {}
        return found | {NAMES: names, ERRORS: errors, "broken": {}}


class ListedBatches(Batches):
    """One pass over some places of the inputs.

    Args:
        inputs: all of them.
        model: for which.
        places: int64 arrays, a batch each, in the order in which they are given.
        workers: processes that read and decode; 0 does it in this one.

    Yields:
        dict: what the codec gives of the inputs that can be read (nothing where none can), `names`
        and `errors`, lists of str of all.
    """

    def __init__(self, inputs: Inputs, model: Loaded, places: Sequence[Ints], workers: int) -> None:
        samples = Listed(inputs, model)
        pin = model.device.type == "cuda"
        told: Any = {"workers": workers, "pin": pin, "report": _said}
        super().__init__(cast(Any, inputs), samples, told)
        self.places = places

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return cast(Iterator[dict[str, Any]], self._run(lambda: iter(self.places)))


def _said(line: str) -> None:
    print(printable(f"note: {line}"), file=sys.stderr, flush=True)


def workers_of(model: Loaded, cores: int) -> int:
    """Processes that read ahead, as `Run.workers` chooses them for training."""
    if model.device.type == "cuda":
        return min(16, max(min(1, cores - 1), cores - 2))
    return min(1, torch.get_num_threads() - 1)
