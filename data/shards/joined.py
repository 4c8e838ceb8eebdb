"""Several sets that are read as one: the target, and others of which a share is mixed in."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import UserError
from selfdistill.data.formats import fitting
from selfdistill.data.formats.images import sides, typed
from selfdistill.data.shards.manifest import Manifest


class Share(NamedTuple):
    """A set that is mixed in: where it lies, and its share of all samples that are drawn."""

    place: str
    share: float


def parse(text: str) -> list[Share]:
    """The sets of text such as "shards/general:0.3,shards/other:0.05".

    Raises:
        UserError: A share is missing or none; nothing is left for the target.
    """
    found = []
    for part in text.split(","):
        place, _, number = part.strip().rpartition(":")
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not place or not 0 < share < 1:
            raise UserError(
                f"--data.mix {part.strip()}: give each set its share of the samples, between 0 and"
                " 1, such as shards/general:0.3"
            )
        found.append(Share(place, share))
    if sum(one.share for one in found) >= 1:
        total = sum(one.share for one in found)
        raise UserError(
            f"--data.mix {text}: the shares add up to {total:g}, which leaves nothing for the"
            " target: give less than 1 in all"
        )
    return found


class Joined(Manifest):
    """The splits of several sets as one split without labels; ids number them one after the other.

    Args:
        manifests: The target's first.
        shares: Of the others.

    Attributes:
        shares: Of each set, the target's among them, which is what the others leave.
        sizes: Shards of each set.

    Raises:
        UserError: They are of different kinds, sizes or fits; a set comes twice.
    """

    def __init__(self, manifests: Sequence[Manifest], shares: Sequence[float]) -> None:
        first = manifests[0]
        self._sets = list(manifests)
        self.shares = [1 - sum(shares), *shares]
        self.sizes = [len(one.shards) for one in manifests]
        self.root = " + ".join(one.root for one in manifests)
        self.place, self.cache_dir = first.place, first.cache_dir
        told = [[one.hash, share] for one, share in zip(manifests, self.shares, strict=True)]
        self.hash = hashlib.sha256(json.dumps(told).encode()).hexdigest()
        self.kind, self.split, self.columns = first.kind, first.split, first.columns
        self.classes, self.class_counts, self.several, self.labelled = [], [], False, 0
        self.image, self.size, self.span, self.text = (
            first.image,
            first.size,
            first.span,
            first.text,
        )
        self.members_file = first.members_file
        self.shards = [shard for one in manifests for shard in one.shards]
        self.samples = sum(one.samples for one in manifests)
        for number, other in enumerate(manifests):
            self._agrees(other, [one.hash for one in manifests[:number]])

    def _agrees(self, other: Manifest, before: list[str]) -> None:
        if other.hash in before:
            raise UserError(f"--data.mix: {other.root} is given twice: name each set once")
        mine, theirs = _stored(self), _stored(other)
        if mine != theirs:
            raise UserError(
                f"--data.mix: {other.root} holds {theirs}, {self._sets[0].root} {mine}: pack both"
                " in the same way"
            )

    def shard_place(self, shard: int) -> str:
        """See `Manifest`."""
        for one in self._sets:
            if shard < len(one.shards):
                return one.shard_place(shard)
            shard -= len(one.shards)
        raise IndexError(shard)

    @functools.cached_property
    def members(self) -> Any:
        """See `Manifest`: rows by number or slice, without labels; mapped, not copied."""
        return _Stacked([one.members for one in self._sets])

    @property
    def sets(self) -> list[Manifest]:
        """See `Manifest`."""
        return self._sets

    def epoch(self, counts: NDArray[np.int64]) -> int:
        """See `Manifest`: as many as are drawn while the target's are drawn once."""
        return math.ceil(int(counts[: self.sizes[0]].sum()) / self.shares[0])


class _Stacked:
    """Tables of members one after the other, without labels."""

    def __init__(self, tables: Sequence[NDArray[np.int64]]) -> None:
        self._tables = tables
        self._starts = np.cumsum([0, *(len(table) for table in tables)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: Any) -> NDArray[np.int64]:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        if isinstance(rows, slice):
            begin, end, _ = rows.indices(len(self))
            parts = [
                table[max(begin - start, 0) : max(end - start, 0)]
                for table, start in zip(self._tables, self._starts.tolist(), strict=False)
            ]
            found = np.concatenate(parts)
        else:
            table = int(np.searchsorted(self._starts, rows, side="right")) - 1
            found = self._tables[table][rows - int(self._starts[table])].copy()
        found[..., 2:] = -1
        return found[..., columns]


def _stored(manifest: Manifest) -> str:
    """What must be the same for all, in words."""
    if manifest.kind == "text":
        return "pairs of texts" if manifest.text.get("pairs") else "texts"
    # Without a size all are fitted as they are read, in the target's way.
    own = f"of their own sizes, fit {fitting.of(manifest.image)}"
    size = own if manifest.size is None else f"of {typed(sides(manifest.size))}"
    span = manifest.span
    return f"images {size}" + (f", range {span[0]:g} to {span[1]:g}" if span else "")


def mixed(first: Manifest, mix: str | None, load: Callable[[str], Manifest]) -> Manifest:
    """The target, with what is mixed in.

    Args:
        first: The target's split.
        mix: Text of --data.mix.
        load: The split of a set.
    """
    if not mix:
        return first
    shares = parse(mix)
    return Joined([first, *(load(one.place) for one in shares)], [one.share for one in shares])
