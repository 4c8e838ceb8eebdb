"""Equal inputs with different classes, or in train and in another split: told, with examples."""

import hashlib
from array import array
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import counted
from selfdistill.data.formats.labels import Label
from selfdistill.data.splits import DIVIDED, UNLABELLED

# Eight bytes: among a hundred million inputs two are taken for equal with a chance of 1 in 3,700.
_BYTES = 8


def digest(content: bytes, *, text: bool = False) -> int:
    """A number that equal inputs share, and others hardly ever do; a text's spaces are alike."""
    if text:  # one at an end is seldom seen, by models or by people
        content = b" ".join(content.split())
    return int.from_bytes(hashlib.blake2b(content, digest_size=_BYTES).digest(), "big")


class Inputs:
    """What was seen of a data set's inputs: 24 bytes a sample.

    Args:
        classes: Their names, by number.
    """

    def __init__(self, classes: list[str]) -> None:
        self.classes = classes
        self._digests, self._labels = array("Q"), array("q")
        # Of samples with several labels each list of them has a number beyond the classes'.
        self._lists: dict[tuple[int, ...], int] = {}
        self._splits: list[tuple[str, int, Callable[[int], str]]] = []

    def begin(self, split: str, name: Callable[[int], str]) -> None:
        """What follows is of this split.

        Args:
            split: train, val, test or unlabelled.
            name: Of a sample, by its number among those that follow.
        """
        self._splits.append((split, len(self._digests), name))

    def add(self, digest: int, label: Label | None) -> None:
        """One sample more: its `digest`, and its class if it has one, or its classes."""
        self._digests.append(digest)
        if isinstance(label, tuple):
            label = self._lists.setdefault(label, len(self.classes) + len(self._lists))
        self._labels.append(-1 if label is None else label)

    def notes(self) -> list[str]:
        """A line for each kind of equal inputs that should not be; none where all is well."""
        runs = self._equal()
        labels = np.array(self._labels, np.int64)
        lines = []
        twofold = [run for run in runs if len({one for one in labels[run] if one >= 0}) > 1]
        if twofold:
            classed = [one for one in twofold[0] if labels[one] >= 0]
            other = next(one for one in classed if labels[one] != labels[classed[0]])
            lines.append(
                f"note: {_count(twofold)} in more than one class, such as"
                f" {self._named(classed[0])} and {self._named(other)}: no model can tell them"
                " apart: correct or remove them"
            )
        # What is scored should be new to the model: train, and what stages 1 and 2 see, are not.
        for seen in (DIVIDED[0], UNLABELLED):
            for scored in DIVIDED[1:]:
                both = []
                for run in runs:
                    by_split = {self._split(one)[0]: one for one in run}
                    # unlabelled holds the inputs of train, too: those are told of once
                    reported = seen == UNLABELLED and DIVIDED[0] in by_split
                    if seen in by_split and scored in by_split and not reported:
                        both.append((run, by_split[scored], by_split[seen]))
                if both:
                    _, one, other = both[0]
                    lines.append(
                        f"note: {_count([run for run, _, _ in both])} in {scored} and in {seen},"
                        f" such as {self._named(one)} and {self._named(other)}: the score on"
                        f" {scored} counts what was learnt by heart: remove them from one of the"
                        " two"
                    )
        return lines

    def _equal(self) -> list[NDArray[np.int64]]:
        """The samples of each input that comes more than once."""
        digests = np.array(self._digests, np.uint64)
        order = np.argsort(digests, kind="stable")
        ordered = digests[order]
        same = np.concatenate([[False], ordered[1:] == ordered[:-1], [False]])
        several = same[1:] | same[:-1]
        order, ordered = order[several], ordered[several]
        edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
        return np.split(order, edges) if len(order) else []

    def _split(self, sample: int) -> tuple[str, int, Callable[[int], str]]:
        """The split of a sample, as it was begun."""
        return next(split for split in reversed(self._splits) if split[1] <= sample)

    def _named(self, sample: int) -> str:
        split, begin, name = self._split(sample)
        label = int(self._labels[sample])
        own = [label] if 0 <= label < len(self.classes) else []
        if label >= len(self.classes) and self._lists:
            own = list(list(self._lists)[label - len(self.classes)])
        place = ", ".join([split, *(self.classes[one] for one in own)])
        return f"{name(int(sample) - begin)} ({place})"


def _count(runs: list[NDArray[np.int64]]) -> str:
    """How many inputs, and how many samples they are."""
    samples = sum(len(run) for run in runs)
    return f"{counted(len(runs), 'input', 'inputs')} ({samples} samples)"
