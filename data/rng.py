"""Random numbers that depend on (seed, purpose, position) alone.

A run on 1, 2 or 4 ranks, with any number of workers, or resumed in the middle, sees the same masks
and flips, because none of them comes from a generator that has a history. The bits are
Philox4x64-10's (Salmon et al., 2011), which numpy keeps fixed between its versions; only raw bits
are used here, since numpy's *distributions* may change.
"""

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=1024)
def _key(seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")


def bits(seed: int, purpose: str, position: int) -> np.random.Philox:
    """The Philox bit generator of one position.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, e.g. ``"mask"``; other purposes give independent numbers.
        position: Position in the stream, at least 0.

    Returns:
        A bit generator; 2**128 draws separate neighbouring positions.
    """
    counter = np.array([0, 0, position, 0], dtype=np.uint64)
    return np.random.Philox(key=_key(seed, purpose), counter=counter)


def generator(seed: int, purpose: str, position: int) -> np.random.Generator:
    """A numpy generator of one position; see `bits`."""
    return np.random.Generator(bits(seed, purpose, position))


def uniform(seed: int, purpose: str, positions: NDArray[np.int64], n: int) -> NDArray[np.float32]:
    """Uniform numbers in [0, 1) for each position.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for.
        positions: int64 [b], positions in the stream.
        n: Numbers for each position.

    Returns:
        float32 [b, n], multiples of 2**-24.
    """
    out = np.empty((len(positions), n), dtype=np.float32)
    for row, position in zip(out, positions, strict=True):
        row[:] = (bits(seed, purpose, int(position)).random_raw(n) >> np.uint64(40)) * 2.0**-24
    return out


def permutation(seed: int, purpose: str, position: int, n: int) -> NDArray[np.int64]:
    """A permutation of 0..n-1, the same on every machine and numpy version.

    Args:
        seed: The run's seed.
        purpose: What it is for.
        position: Which one of them, at least 0.
        n: Its length.

    Returns:
        int64 [n].
    """
    raw = np.atleast_1d(bits(seed, purpose, position).random_raw(n))
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)
