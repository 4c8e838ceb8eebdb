"""What `sd.embed` and `sd.evaluate` give: tables and arrays that say in a line what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import pandas
    from numpy.typing import NDArray

#: Figures that a line has room for.
_SHOWN = 4


@dataclass(frozen=True, repr=False, eq=False)
class Features:
    """What `embed` gives; `ids, vectors = sd.embed(...)` takes it apart.

    Attributes:
        ids: a table: what each row is of; inputs that could not be read are left out.
        vectors: fp32, as `selfdistill embed` writes them to .npy.
        nearest: with `nearest=N` a table: name, rank (1 is the nearest), neighbour, cosine.
    """

    ids: pandas.DataFrame
    vectors: NDArray[np.float32]
    nearest: pandas.DataFrame | None = None

    def __iter__(self) -> Iterator[Any]:
        return iter((self.ids, self.vectors))

    def __repr__(self) -> str:
        near = "" if self.nearest is None else f", nearest {len(self.nearest)} rows"
        shape = " x ".join(map(str, self.vectors.shape))
        return f"<Features: ids {len(self.ids)} rows, vectors {shape}{near}>"


class Scores(NamedTuple):
    """What `evaluate` gives.

    Attributes:
        figures: a table: figure, value, and low and high, its bootstrap interval.
        classes: a table: class, precision, recall, f1, support, predicted.
        confusion: int64 [C, C], rows true, columns predicted; None with several labels a sample.
    """

    figures: pandas.DataFrame
    classes: pandas.DataFrame
    confusion: NDArray[np.int64] | None

    def __repr__(self) -> str:
        rows = zip(self.figures["figure"][:_SHOWN], self.figures["value"][:_SHOWN], strict=True)
        named = ", ".join(f"{name} {value:.4g}" for name, value in rows)
        samples = f", {self.confusion.sum()} samples" if self.confusion is not None else ""
        return f"<Scores: {named}; {len(self.classes)} classes{samples}>"

    def _repr_html_(self) -> str:
        return str(self.figures.to_html(index=False))
