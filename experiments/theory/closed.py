"""The paper's closed forms for the simplified model, and the bounds made of them.

All is in the basis of the left singular vectors u_i of [I_p ⊗ Phi] = U S V^T (dp×np): a vector is
its coefficients u_i^T vec(W), where vec(W) is the rows of W end to end (the columns of W^T), so
that [I_p ⊗ Phi]^T vec(W) is the rows of W Phi end to end. The first n·p coefficients lie in the
column space, which samples see; the others do not.

A function of t has a twin that gives its drop from t to t + 1. Written as a difference of two
values, a drop of 1e-40 beside a value of 1 would be 0; here it is a sum of small products.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from selfdistill.experiments.theory.problems import Array, Problem


@dataclass(frozen=True)
class Coefficients:
    """A problem in the basis U.

    Attributes:
        u: the basis, dp×dp, one column a vector.
        s: singular values, np of them.
        k: ỹ_i / s_i with ỹ = V^T vec[f_0], f_0 what w_{0,0} predicts; np of them.
        q: of v in Y = Z v, what reproduces the labels, np of them.
        damping: n lambda / s_i², np of them.
        off: u_i^T vec(w_{0,0}) for i > np; P w_{0,0} of Lemma 1, dp − np of them.
        init: u_i^T vec(w_init), all dp.
        left: e^{−s_i² T}, what fine-tuning leaves of the start, np of them.
    """

    u: Array
    s: Array
    k: Array
    q: Array
    damping: Array
    off: Array
    init: Array
    left: Array


def _left(s: Array, time: float) -> Array:
    """e^{−s_i² T}."""
    return np.asarray(np.exp(-(s**2) * time))


def coefficients(problem: Problem) -> Coefficients:
    """Takes a problem into the basis U.

    Args:
        problem: Phi of full rank with d > n.

    Returns:
        Its coefficients.
    """
    p = problem.y.shape[0]
    n = problem.phi.shape[1]
    u, s, v_t = np.linalg.svd(np.kron(np.eye(p), problem.phi), full_matrices=True)
    return Coefficients(
        u=u,
        s=s,
        k=v_t @ (problem.w_00 @ problem.phi).reshape(-1) / s,
        q=v_t @ problem.y.reshape(-1) / s,
        damping=n * problem.lam / s**2,
        off=u[:, n * p :].T @ problem.w_00.reshape(-1),
        init=u.T @ problem.w_init.reshape(-1),
        left=_left(s, problem.time),
    )


def at_time(c: Coefficients, time: float) -> Coefficients:
    """The same problem, fine-tuned for another T, in the units of Problem.time."""
    return dataclasses.replace(c, left=_left(c.s, time))


def weights(c: Coefficients, found: Array) -> Array:
    """vec(W), dp numbers, of coefficients in the basis U."""
    return np.asarray(c.u @ found)


def _shrunk(c: Coefficients, t: int) -> Array:
    """(ỹ_i/s_i) (1 + n lambda / s_i²)^{−t}."""
    return np.asarray(c.k * (1 + c.damping) ** -t)


def teacher(c: Coefficients, t: int) -> Array:
    """Lemma 1: the coefficients of w_{t,0}.

    Args:
        c: the problem.
        t: round of self-distillation, from 0.

    Returns:
        dp numbers; those off the column space are P w_{0,0} at t = 0 and 0 afterwards.
    """
    return np.concatenate([_shrunk(c, t), c.off if t == 0 else np.zeros_like(c.off)])


def finetuned(c: Coefficients, t: int) -> Array:
    """The flow: c_i(t,T) = q_i (1 − e^{−s_i² T}) + c_i(t,0) e^{−s_i² T} for i ≤ np; others stay.

    Args:
        c: the problem.
        t: round of self-distillation, from 0.

    Returns:
        The coefficients of w_{t,T}, dp numbers.
    """
    start = teacher(c, t)
    seen = c.s.size
    return np.concatenate([c.q * (1 - c.left) + start[:seen] * c.left, start[seen:]])


def g1(c: Coefficients) -> float:
    """Theorem 2: G1 = sum q_i² (1 − e^{−s_i² T})²."""
    return float(np.sum((c.q * (1 - c.left)) ** 2))


def psi1(c: Coefficients, t: int) -> float:
    """Theorem 2: sum (ỹ_i/s_i)² (1 + n lambda/s_i²)^{−2t} e^{−2 s_i² T}."""
    return float(np.sum((_shrunk(c, t) * c.left) ** 2))


def psi1_drop(c: Coefficients, t: int) -> float:
    """psi1(t) − psi1(t + 1)."""
    gone = -np.expm1(-2 * np.log1p(c.damping))
    return float(np.sum((_shrunk(c, t) * c.left) ** 2 * gone))


def vanishing(c: Coefficients, t: int) -> float:
    """Theorem 2: 1{t=0} B with B = sum_{i>np} (u_i^T w_{0,0})²."""
    return float(np.sum(c.off**2)) if t == 0 else 0.0


def g2(c: Coefficients) -> float:
    """Theorem 2: G2 = ||w_init||."""
    return float(np.linalg.norm(c.init))


def norm_printed(c: Coefficients, t: int) -> float:
    """sqrt(G1 + psi1(t) + 1{t=0} B), put for ||w_{t,T}|| in Theorem 2 as it is printed.

    It leaves out the cross term of :func:`cross_term`, and is no bound where that is over 0.
    """
    return float(np.sqrt(g1(c) + psi1(c, t) + vanishing(c, t)))


def norm_printed_drop(c: Coefficients, t: int) -> float:
    """norm_printed(t) − norm_printed(t + 1)."""
    drop = psi1_drop(c, t) + vanishing(c, t)
    return drop / (norm_printed(c, t) + norm_printed(c, t + 1))


def psi(c: Coefficients, t: int) -> float:
    """Theorem 2 as printed: sqrt(G1 + psi1(t) + 1{t=0} B) + G2."""
    return norm_printed(c, t) + g2(c)


def cross_term(c: Coefficients, t: int) -> float:
    """2 sum q_i c_i(t,0) (1 − e^{−s_i² T}) e^{−s_i² T} = ||w_{t,T}||² − norm_printed(t)²."""
    return float(2 * np.sum(c.q * (1 - c.left) * _shrunk(c, t) * c.left))


def zeta(c: Coefficients, t: int) -> float:
    """Theorem 1, our derivation: sqrt((sqrt(G1) + sqrt(psi1(t)))² + 1{t=0} B), over ||w_{t,T}||.

    In the column space w_{t,T} is the sum of two vectors, of norms sqrt(G1) and sqrt(psi1(t)); the
    triangle inequality bounds it without the cross term, and what is off that space is at right
    angles to both. The hypotheses x -> W phi(x) with ||W|| <= zeta(t) hold that of round t, and
    their Rademacher complexity grows in proportion to zeta(t).
    """
    return float(np.sqrt((np.sqrt(g1(c)) + np.sqrt(psi1(c, t))) ** 2 + vanishing(c, t)))


def zeta_drop(c: Coefficients, t: int) -> float:
    """zeta(t) − zeta(t + 1)."""
    seen = psi1_drop(c, t)
    roots = np.sqrt(psi1(c, t)) + np.sqrt(psi1(c, t + 1))
    squares = seen + 2 * np.sqrt(g1(c)) * seen / roots + vanishing(c, t)
    return float(squares / (zeta(c, t) + zeta(c, t + 1)))


def psi_mended(c: Coefficients, t: int) -> float:
    """Theorem 2 with a bound that holds: zeta(t) + G2."""
    return zeta(c, t) + g2(c)


def norm(c: Coefficients, t: int) -> float:
    """||w_{t,T}||, exact."""
    return float(np.linalg.norm(finetuned(c, t)))


def distance(c: Coefficients, t: int) -> float:
    """||w_init − w_{t,T}||, exact."""
    return float(np.linalg.norm(finetuned(c, t) - c.init))


def _squares_drop(c: Coefficients, t: int, origin: Array) -> float:
    """||w_{t,T} − o||² − ||w_{t+1,T} − o||² = sum (difference of w) (sum of w − o)."""
    seen = c.s.size
    moved = _shrunk(c, t) * -np.expm1(-np.log1p(c.damping)) * c.left
    mean = (finetuned(c, t) + finetuned(c, t + 1))[:seen] - 2 * origin[:seen]
    off = float(np.sum(c.off * (c.off - 2 * origin[seen:]))) if t == 0 else 0.0
    return float(np.sum(moved * mean)) + off


def norm_drop(c: Coefficients, t: int) -> float:
    """norm(t) − norm(t + 1); below 0 where the norm grows."""
    return _squares_drop(c, t, np.zeros_like(c.init)) / (norm(c, t) + norm(c, t + 1))


def distance_drop(c: Coefficients, t: int) -> float:
    """distance(t) − distance(t + 1); below 0 where the distance grows."""
    return _squares_drop(c, t, c.init) / (distance(c, t) + distance(c, t + 1))
