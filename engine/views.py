"""Views of the data: the random numbers of masks and flips, keyed by position in the stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from data import keyed


@dataclass(frozen=True)
class MaskNoise:
    """Noise whose ranks choose the visible patches; `noise` fp32 [b, patches]."""

    seed: int
    patches: int

    def __call__(self, positions: np.ndarray, _: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Noise of the given stream positions, int64 [b]."""
        return {"noise": keyed.uniform(self.seed, "mask", positions, self.patches)}


@dataclass(frozen=True)
class Flips:
    """Horizontal flips with probability 1/2; `flip` bool [b]."""

    seed: int

    def __call__(self, positions: np.ndarray, _: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Flips of the given stream positions, int64 [b]."""
        return {"flip": keyed.uniform(self.seed, "flip", positions, 1)[:, 0] < 0.5}
