"""Numerical solutions of the simplified model, straight from its definitions.

No singular value decomposition, no closed form, and nothing of theory_closed: these are what the
closed forms are compared with.
"""

from __future__ import annotations

import numpy as np
from scipy.integrate import solve_ivp
from scipy.linalg import expm, solve

from selfdistill.experiments.theory.problems import Array, Problem


def distill(problem: Problem, teacher: Array) -> Array:
    """One round of self-distillation: solves the normal equations of its ridge regression.

    The minimum of (1/n) sum_i ||W phi_i − W' phi_i||² + lambda ||W||² has the gradient
    (2/n) (W Phi − W' Phi) Phi^T + 2 lambda W = 0, that is (Phi Phi^T / n + lambda I) W^T =
    Phi (W' Phi)^T / n.

    Args:
        problem: Phi (d×n) and lambda.
        teacher: W', the weights of the round before, p×d.

    Returns:
        W, p×d.
    """
    d, n = problem.phi.shape
    matrix = problem.phi @ problem.phi.T / n + problem.lam * np.eye(d)
    seen = teacher @ problem.phi
    return np.asarray(solve(matrix, problem.phi @ seen.T / n, assume_a="pos").T)


def rounds(problem: Problem, last: int) -> Array:
    """w_{t,0} for t = 0..last by distilling again and again.

    Returns:
        (last + 1)×p×d; the first is w_{0,0} as it is.
    """
    found = [problem.w_00]
    for _ in range(last):
        found.append(distill(problem, found[-1]))
    return np.stack(found)


def flow_exact(problem: Problem, starts: Array) -> Array:
    """Fine-tuning from several weights by the matrix exponential of the whole linear system.

    vec(W) is the rows of W end to end, d·p numbers. L(W) = ½ ||W Phi − Y||² has the gradient
    (W Phi − Y) Phi^T, so that d vec(W)/dt = −(I_p ⊗ Phi Phi^T) vec(W) + vec(Y Phi^T). The
    constant is one more row and column of the exponentiated matrix.

    Args:
        problem: Phi, Y and T.
        starts: weights at time 0, k×p×d.

    Returns:
        Weights at time T, k×p×d.
    """
    k, p, d = starts.shape
    system = np.zeros((p * d + 1, p * d + 1))
    system[:-1, :-1] = -np.kron(np.eye(p), problem.phi @ problem.phi.T)
    system[:-1, -1] = (problem.y @ problem.phi.T).reshape(-1)
    states = np.vstack([starts.reshape(k, p * d).T, np.ones(k)])
    return np.asarray((expm(system * problem.time) @ states)[:-1].T.reshape(k, p, d))


def flow_steps(problem: Problem, starts: Array) -> Array:
    """Fine-tuning from several weights by integrating the gradient flow in small steps.

    An explicit Runge-Kutta method of order 8 (scipy's DOP853), whose steps adapt to a relative
    tolerance of 1e-12.

    Args:
        problem: Phi, Y and T.
        starts: weights at time 0, k×p×d.

    Returns:
        Weights at time T, k×p×d.
    """

    def slope(_: float, flat: Array) -> Array:
        weights = flat.reshape(starts.shape)
        return np.asarray(-((weights @ problem.phi - problem.y) @ problem.phi.T).reshape(-1))

    done = solve_ivp(
        slope, (0.0, problem.time), starts.reshape(-1), method="DOP853", rtol=1e-12, atol=1e-13
    )
    assert done.success, done.message
    return np.asarray(done.y[:, -1].reshape(starts.shape))


def relative_error(found: Array, expected: Array) -> float:
    """||found − expected|| / ||expected||, Frobenius; both of one shape."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
