"""The division of samples into splits: at random, class by class, or as whole groups."""

import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import rng
from selfdistill.data.errors import UserError
from selfdistill.data.formats.labels import Label
from selfdistill.data.sources.samples import Sample, Samples, Splits, Stream
from selfdistill.data.splits import DIVIDED

# Of groups, which are joined to splits: shares are met to a twentieth.
_FOLDS = 20
DEFAULT_SHARES = (0.8, 0.1, 0.1)


def parse_shares(text: str | None) -> tuple[float, ...]:
    """Shares of train, val and test from e.g. "0.8,0.1,0.1"."""
    if text is None:
        return DEFAULT_SHARES
    try:
        shares = tuple(float(part) for part in text.strip("()[] ").split(","))
    except ValueError:
        shares = ()
    if (
        not 1 <= len(shares) <= 3
        or min(shares) < 0
        or shares[0] == 0
        or not abs(sum(shares) - 1) <= 1e-6  # nor is nan
    ):
        raise UserError(
            f"--splits {text}: give shares of train, val and test that add up to 1,"
            " e.g. 0.8,0.1,0.1"
        )
    return shares


def _take(samples: Samples, rows: NDArray[np.bool_]) -> Samples:
    """Those that are True in `rows`, bool [n]."""
    if isinstance(samples, Stream):
        return samples.take(rows)
    return list(itertools.compress(samples, rows))


def groups(splits: Splits) -> set[str]:
    """The groups of val and test (`--group_column`)."""
    parts = (samples for split, (samples, _) in splits.items() if split in ("val", "test"))
    return {s.group for part in parts if isinstance(part, list) for s in part if s.group}


def strata(labels: Sequence[Label | None]) -> NDArray[np.int64]:
    """What samples are divided by: their class; of several the one that the fewest samples have.

    So each split gets its share of the rare classes, which would be lost among common ones. -1 is
    that of samples without a class.
    """
    counts = Counter(one for label in labels if isinstance(label, tuple) for one in label)

    def of(label: Label | None) -> int:
        if isinstance(label, tuple):
            return min(label, key=lambda one: (counts[one], one), default=-1)
        return -1 if label is None else label

    return np.array([of(label) for label in labels], dtype=np.int64)


def divide(samples: Samples, shares: tuple[float, ...], seed: int) -> dict[str, Samples]:
    """Divides samples at random into splits, class by class.

    Args:
        samples: All of them.
        shares: Of train, val and test.
        seed: Another seed, another division.

    Returns:
        Per split its samples in their old order. A class of n gives each split its share of n
        rounded (boundaries are rounded, so nothing is lost); train gets at least one of each.
        Groups stay whole, and the shares are met as nearly as they allow. Samples with several
        labels go by the rarest (`strata`).
    """
    if isinstance(samples, list) and any(sample.group is not None for sample in samples):
        return _divide_groups(samples, shares, seed)
    if isinstance(samples, Stream):
        labels = np.full(len(samples), -1)
    else:
        labels = strata([s.label for s in samples])
    owner = np.zeros(len(samples), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        rows = rows[rng.permutation(seed, f"split {label}", 0, len(rows))]
        bounds = np.rint(np.cumsum(shares) * len(rows)).astype(int)
        bounds = np.maximum(bounds, max(1, bounds[0]))
        for i in range(1, len(shares)):
            owner[rows[bounds[i - 1] : bounds[i]]] = i
    found: dict[str, Samples] = {}
    for i, split in enumerate(DIVIDED):
        rows = owner == i
        if rows.any():
            found[split] = _take(samples, rows)
    return found


def _divide_groups(
    samples: list[Sample], shares: tuple[float, ...], seed: int
) -> dict[str, Samples]:
    """`divide` for samples in groups: folds of whole groups with about equal classes, joined.

    Each split that has a share gets one fold at least. Where classes are too small for folds that
    meet the shares, single groups are what is joined.

    Raises:
        UserError: there are fewer groups than splits.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # a second to import

    names = [f"{s.group}" if s.group else f"\0{i}" for i, s in enumerate(samples)]
    groups = np.unique(names, return_inverse=True)[1]
    labels = strata([s.label for s in samples])
    count, wanted = int(groups.max()) + 1, sum(share > 0 for share in shares)
    if count < wanted:
        raise UserError(
            f"--group_column: {count} groups cannot fill {wanted} splits: add some, or give fewer"
            " shares (--splits)"
        )
    if wanted == 1:
        return {DIVIDED[0]: samples}
    most = int(np.unique(labels, return_counts=True)[1].max())  # more folds than that it refuses
    parts = []
    if most >= min(_FOLDS, count) > 1:
        folds = StratifiedGroupKFold(min(_FOLDS, count), shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of classes with fewer samples than folds
            parts = [rows for _, rows in folds.split(labels, labels, groups) if len(rows)]
    if len(parts) < wanted:  # then no class is in all of them
        parts = _in_line(groups, labels, seed)
    sizes = np.diff(np.rint(np.cumsum(shares) * len(parts)).astype(int), prepend=0)
    for empty in np.flatnonzero((sizes == 0) & (np.array(shares) > 0)):
        sizes[np.argmax(sizes)] -= 1
        sizes[empty] += 1
    found: dict[str, Samples] = {}
    for split, size, end in zip(DIVIDED, sizes, np.cumsum(sizes), strict=False):
        if rows := [row for part in parts[end - size : end] for row in part.tolist()]:
            found[split] = [samples[row] for row in sorted(rows)]
    return found


def _in_line(
    groups: NDArray[np.int64], labels: NDArray[np.int64], seed: int
) -> list[NDArray[np.int64]]:
    """The rows of each group, at random, but so that any stretch has its share of each class.

    Of each class one group comes before all others. A group counts for the class of its first row.
    """
    rows = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    order = rng.permutation(seed, "groups", 0, len(rows))
    classes = labels[[rows[one][0] for one in order]]
    place = np.empty(len(rows))
    for one in np.unique(classes):
        mine = np.flatnonzero(classes == one)
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
        place[mine[0]] = 0
    return [rows[one] for one in order[np.argsort(place, kind="stable")]]


def _left_empty(
    parts: dict[str, Samples], shares: tuple[float, ...], notes: list[str] | None, cure: str
) -> None:
    """Notes the splits that have a share, and got nothing."""
    for split, share in zip(DIVIDED, shares, strict=False):
        if notes is not None and share > 0 and split not in parts:
            notes.append(
                f"note: {split} gets no sample ({share:.6g} of each class is less than one): add"
                f" samples, or {cure}"
            )


def hold_out(found: Splits, fraction: float, seed: int, notes: list[str] | None = None) -> Splits:
    """Sets part of train aside as val, of each class the same fraction, where there is no val.

    Args:
        found: A source's own splits.
        fraction: Between 0 and 1.
        seed: Another seed, another choice.
        notes: See `settle`.

    Returns:
        The splits, with a val.

    Raises:
        UserError: The fraction is out of range, there is nothing to divide, or a val already.
    """
    cure = ""
    if not 0 < fraction < 1:
        cure = "give a number between 0 and 1, such as 0.1"
    elif "" in found:
        cure = "it is for sources with splits of their own; divide this one with --splits"
    elif "val" in found:
        cure = "the source has a val split; drop the option, or join val to train (--trainval)"
    elif "train" not in found:
        cure = f"the source has no train split, only {', '.join(found)}; drop the option"
    if cure:
        raise UserError(f"--val_fraction {fraction}: {cure}")
    samples, classes = found["train"]
    shares = (1 - fraction, fraction)
    parts = divide(samples, shares, seed)
    _left_empty(parts, shares, notes, "give another --val_fraction")
    return {**found, **{split: (part, classes) for split, part in parts.items()}}


def settle(
    found: Splits,
    root: Path,
    shares: str | None,
    split: str | None,
    seed: int,
    val_fraction: float = 0.0,
    notes: list[str] | None = None,
) -> Splits:
    """Divides what is not divided yet, or takes one split.

    Args:
        found: From `find` or a layout.
        root: Where it is from, for messages.
        shares: Text of --splits.
        split: Take everything as this split, or this one of several.
        seed: Of the division.
        val_fraction: Part of train to set aside as val; 0 for none.
        notes: Gets a line for each split that has a share, and got nothing.

    Returns:
        Per split its samples and classes.

    Raises:
        UserError: The options contradict the source or each other.
    """
    if shares is not None and split is not None:
        raise UserError("--splits divides, --split packs everything as one: give one of them")
    if "" in found and len(found) > 1:
        lost = next(iter(found[""][0])).name
        raise UserError(f"{lost} has no split, as others have: give it one, or take all theirs out")
    parsed = parse_shares(shares)
    if shares is not None and "" not in found:
        has = ", ".join(found)
        raise UserError(f"{root} has splits of its own ({has}): leave --splits out")
    if val_fraction:
        found = hold_out(found, val_fraction, seed, notes)
    if split is not None:
        if "" not in found and split not in found:
            has = ", ".join(found)
            raise UserError(f"{root} has no split {split!r}, it has {has}: give one of these")
        return {split: found.get(split) or found[""]}
    if "" not in found:
        return found
    samples, classes = found[""]
    parts = divide(samples, parsed, seed)
    _left_empty(parts, parsed, notes, "give other --splits, or folders train/, val/ and test/")
    return {s: (part, classes) for s, part in parts.items()}
