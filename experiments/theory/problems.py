"""Random problems of the paper's simplified model, on which its theory is checked.

The model is f(x, w) = W phi(x). Everything here is stated as matrices, from the definitions; the
closed forms (theory_closed) and the numerical solutions (theory_oracles) each make of it what they
need, so that they share no code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import UserError

Array = NDArray[np.float64]

#: How the pre-trained weights w_init and the further pre-trained w_{0,0} lie to each other.
#: independent: two normal draws. near: w_{0,0} = w_init + 0.3 normal, as further pre-training
#: starts from w_init. zero: w_init = 0, where the distance is the norm of w_{t,T} itself; as well
#: the model in which all weights are measured from w_init.
Start = Literal["independent", "near", "zero"]
#: Whether the labels have to do with the teacher. independent: of other normal weights. aligned: of
#: w_{0,0} + 0.5 normal, so that the teacher predicts them in part.
Labels = Literal["independent", "aligned"]
STARTS: tuple[Start, ...] = get_args(Start)
LABELS: tuple[Labels, ...] = get_args(Labels)
#: Times of fine-tuning, in units of 1 / mean(s_i²): from hardly begun to converged.
TIMES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)

#: The flow's matrix exponential is of this size at most, so that a problem takes milliseconds.
_MOST_WEIGHTS = 256


@dataclass(frozen=True)
class Problem:
    """One draw of the simplified model.

    Attributes:
        phi: features Phi, d×n, of full rank, one column a sample, d > n.
        w_init: pre-trained weights, p×d.
        w_00: further pre-trained weights w_{0,0} (the first teacher), p×d.
        y: labels, p×n, one column a sample.
        lam: the ridge weight lambda of self-distillation, over 0.
        time: T, how long the gradient flow of fine-tuning runs.
    """

    phi: Array
    w_init: Array
    w_00: Array
    y: Array
    lam: float
    time: float


@dataclass(frozen=True)
class Sizes:
    """Sizes of the problems; what is None is drawn for each: n 2..6, d n+1..n+6, p 1..3.

    Attributes:
        n: samples.
        d: features, more than samples.
        p: outputs.

    Raises:
        UserError: a size is below 1, d is not over n, or d·p is too large.
    """

    n: int | None = None
    d: int | None = None
    p: int | None = None

    def __post_init__(self) -> None:
        for name, size in (("n", self.n), ("d", self.d), ("p", self.p)):
            if size is not None and size < 1:
                raise UserError(f"option --{name}: a size must be at least 1, not {size}")
        if self.d is not None and self.d <= (self.n or 2):
            least = (self.n or 2) + 1
            raise UserError(
                f"option --d: the theory needs more features than samples, d > n,"
                f" but d is {self.d}: give at least {least}"
            )
        weights = (self.d or (self.n or 6) + 6) * (self.p or 3)  # the most that may be drawn
        if weights > _MOST_WEIGHTS:
            raise UserError(
                f"options --n, --d and --p make up to {weights} weights, which takes too long:"
                f" choose d·p of at most {_MOST_WEIGHTS}"
            )

    def draw(self, rng: np.random.Generator) -> tuple[int, int, int]:
        """Draws what is None; returns n, d, p."""
        most = 6 if self.d is None else min(6, self.d - 1)
        n = self.n or int(rng.integers(2, most + 1))
        d = self.d or int(rng.integers(n + 1, n + 7))
        return n, d, self.p or int(rng.integers(1, 4))


def mean_square(phi: Array) -> float:
    """Mean of the squared singular values of Phi (d×n): its scale of lambda·n and of 1 / T."""
    return float(np.sum(phi**2) / phi.shape[1])


def draw(
    seed: int, index: int, start: Start, labels: Labels, time: float, sizes: Sizes | None = None
) -> Problem:
    """Draws a problem; all starts, labels and times of one index share their normal draws.

    Args:
        seed: of all problems, not negative.
        index: the problem's number, from 0.
        start: how w_init and w_{0,0} lie.
        labels: whether the labels have to do with w_{0,0}.
        time: T in units of 1 / mean(s_i²).
        sizes: of the problem; drawn by default.

    Returns:
        Phi normal, scaled by 1/sqrt(d); n·lambda/mean(s_i²) log-uniform in 1e-3..10. Labels are
        made by weights, which is no loss: as Phi has full rank and d > n, every Y can be.
    """
    rng = np.random.default_rng([seed, index])
    n, d, p = (sizes or Sizes()).draw(rng)
    phi = rng.standard_normal((d, n)) / np.sqrt(d)
    first, second, third = rng.standard_normal((3, p, d))
    lam = float(10 ** rng.uniform(-3, 1)) * mean_square(phi) / n
    w_init = np.zeros((p, d)) if start == "zero" else first
    w_00 = w_init + 0.3 * second if start == "near" else second
    behind = w_00 + 0.5 * third if labels == "aligned" else third
    return Problem(phi, w_init, w_00, behind @ phi, lam, time / mean_square(phi))
