"""The theory check: closed forms against numerical solutions, bounds, counts, and its mistakes."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.linalg import expm

from selfdistill.data.errors import UserError
from selfdistill.experiments.theory import __main__ as theory
from selfdistill.experiments.theory import checks as theory_checks
from selfdistill.experiments.theory import closed, oracles
from selfdistill.experiments.theory.problems import LABELS, STARTS, TIMES, Problem, Sizes, draw
from tests.kit.command import call

ROUNDS = 4
TOLERANCE = 1e-8
problems = st.builds(
    draw,
    seed=st.integers(0, 2**32),
    index=st.integers(0, 10**6),
    start=st.sampled_from(STARTS),
    labels=st.sampled_from(LABELS),
    time=st.sampled_from(TIMES) | st.floats(1e-3, 100),
)
tried = settings(max_examples=40, deadline=None, derandomize=True)


def closed_weights(problem: Problem, found: np.ndarray) -> np.ndarray:
    return closed.weights(closed.coefficients(problem), found).reshape(problem.w_00.shape)


@tried
@given(problems)
def test_lemma_1_is_the_ridge_regression_of_every_round(problem: Problem) -> None:
    c = closed.coefficients(problem)
    for t, expected in enumerate(oracles.rounds(problem, ROUNDS)):
        found = closed_weights(problem, closed.teacher(c, t))
        assert oracles.relative_error(found, expected) < TOLERANCE, t


def test_at_round_0_the_part_that_samples_do_not_see_is_kept() -> None:
    problem = draw(3, 0, "independent", "independent", 1.0)
    # P without an SVD of ours: what is left of a row when Phi's columns have explained theirs.
    seen = problem.phi @ np.linalg.lstsq(problem.phi, problem.w_00.T, rcond=None)[0]
    unseen = problem.w_00 - seen.T
    assert np.linalg.norm(unseen) > 0.5
    c = closed.coefficients(problem)
    np.testing.assert_allclose(closed_weights(problem, closed.teacher(c, 0)), problem.w_00)
    only = np.concatenate([np.zeros_like(c.k), c.off])
    np.testing.assert_allclose(closed_weights(problem, only), unseen, atol=1e-12)
    assert not closed.teacher(c, 1)[c.s.size :].any()


@tried
@given(problems)
def test_the_oracle_is_at_the_minimum_of_the_distillation_loss(problem: Problem) -> None:
    """By autograd of the loss as the paper writes it, so that oracle and lemma share no mistake."""
    phi, teacher = torch.from_numpy(problem.phi), torch.from_numpy(problem.w_00)
    w = torch.from_numpy(oracles.distill(problem, problem.w_00)).requires_grad_()
    seen = ((w @ phi - teacher @ phi) ** 2).sum(0).mean()
    (seen + problem.lam * (w**2).sum()).backward()
    assert w.grad is not None
    scale = np.linalg.norm(problem.w_00) * np.linalg.norm(problem.phi) ** 2
    assert float(w.grad.norm()) < 1e-12 * scale


@tried
@given(problems)
def test_the_flow_is_that_of_the_matrix_exponential_and_of_small_steps(problem: Problem) -> None:
    c = closed.coefficients(problem)
    starts = oracles.rounds(problem, ROUNDS)
    exact, steps = oracles.flow_exact(problem, starts), oracles.flow_steps(problem, starts)
    for t in range(ROUNDS + 1):
        found = closed_weights(problem, closed.finetuned(c, t))
        assert oracles.relative_error(found, exact[t]) < TOLERANCE, t
        assert oracles.relative_error(found, steps[t]) < TOLERANCE, t


@tried
@given(problems)
def test_the_bounds_are_made_of_what_the_paper_says(problem: Problem) -> None:
    """G1, psi1, B and G2 as norms of matrices, with no singular value decomposition."""
    c = closed.coefficients(problem)
    left = expm(-problem.phi @ problem.phi.T * problem.time)
    onto = problem.phi @ np.linalg.solve(problem.phi.T @ problem.phi, problem.phi.T)
    fits = np.linalg.lstsq(problem.phi.T, problem.y.T, rcond=None)[0].T  # v, least norm
    g1 = np.sum((fits - fits @ left) ** 2)
    b = np.sum((problem.w_00 - problem.w_00 @ onto) ** 2)
    g2 = np.linalg.norm(problem.w_init)
    starts = oracles.rounds(problem, ROUNDS)
    for t, end in enumerate(oracles.flow_exact(problem, starts)):
        psi1 = np.sum((starts[t] @ onto @ left) ** 2)
        off = b if t == 0 else 0.0
        expected = {
            closed.psi: np.sqrt(g1 + psi1 + off) + g2,
            closed.zeta: np.sqrt((np.sqrt(g1) + np.sqrt(psi1)) ** 2 + off),
            closed.norm: np.linalg.norm(end),
            closed.distance: np.linalg.norm(end - problem.w_init),
        }
        for function, value in expected.items():
            assert function(c, t) == pytest.approx(value, rel=TOLERANCE), (function.__name__, t)
        squares = closed.norm_printed(c, t) ** 2 + closed.cross_term(c, t)
        assert squares == pytest.approx(np.sum(end**2), rel=TOLERANCE)


@tried
@given(problems)
def test_drops_are_differences(problem: Problem) -> None:
    c = closed.coefficients(problem)
    for value, drop in (
        (closed.psi, closed.norm_printed_drop),
        (closed.psi_mended, closed.zeta_drop),
        (closed.norm, closed.norm_drop),
        (closed.distance, closed.distance_drop),
    ):
        for t in range(ROUNDS):
            expected = value(c, t) - value(c, t + 1)
            assert drop(c, t) == pytest.approx(expected, rel=1e-9, abs=1e-12 * value(c, 0))


@pytest.fixture(scope="module")
def cases() -> list[theory_checks.Case]:
    """100 problems of seed 0, at T from short to long."""
    return theory_checks.cases(0, 100, ROUNDS, Sizes(), TIMES[1::2])


def test_what_is_counted_is_the_problem_that_it_names(cases: list[theory_checks.Case]) -> None:
    """Drawn again from what a counter-example is reported with, and solved numerically."""
    for case in cases[::101]:
        problem = draw(0, case.index, case.start, case.labels, case.time)
        assert ((case.d, case.n), case.p) == (problem.phi.shape, len(problem.y))
        ends = oracles.flow_exact(problem, oracles.rounds(problem, ROUNDS))
        for name, origin in (("norm", 0 * problem.w_init), ("distance", problem.w_init)):
            expected = [np.linalg.norm(end - origin) for end in ends]
            np.testing.assert_allclose(case.values[name], expected, rtol=TOLERANCE)


def test_psi_drops_most_at_round_1_even_where_nothing_is_off_the_column_space() -> None:
    """It is log-convex in t, so that B is not needed for that."""
    for index in range(100):
        problem = draw(0, index, "independent", "independent", TIMES[index % len(TIMES)])
        c = closed.coefficients(problem)
        c = dataclasses.replace(c, off=0 * c.off)
        for drop in (closed.norm_printed_drop, closed.zeta_drop):
            drops = [drop(c, t) for t in range(ROUNDS)]
            assert drops == sorted(drops, reverse=True)
            assert len(set(drops)) == ROUNDS


def test_zeta_and_psi_strictly_decrease_and_most_at_round_1(
    cases: list[theory_checks.Case],
) -> None:
    assert len({c.index for c in cases}) == 100
    for case in cases:
        for name in ("zeta", "psi"):
            assert case.decreases(name), case
            assert case.drops_most_first(name), case
    # Where fine-tuning has converged, a drop is too small to be seen beside the value.
    unseen = [c for c in cases if np.any(np.diff(c.values["psi"]) >= 0)]
    assert unseen
    assert {c.time for c in unseen} == {TIMES[-1]}


def test_what_we_call_bounds_are_some(cases: list[theory_checks.Case]) -> None:
    for case in cases:
        assert case.excess("norm", "zeta") <= 1 + 1e-12
        assert case.excess("distance", "psi_mended") <= 1 + 1e-12
        # (a + b)² <= 2 (a² + b²): the printed form is never too small by more.
        assert case.excess("distance", "psi") <= np.sqrt(2)


def test_the_printed_bound_fails_where_the_cross_term_says_so(
    cases: list[theory_checks.Case],
) -> None:
    from_zero = [c for c in cases if c.start == "zero" and c.time <= 1]
    broken = {id(c) for c in from_zero if c.excess("distance", "psi") > 1 + 1e-12}
    crossed = {id(c) for c in from_zero if np.any(c.values["cross_term"] > 1e-9)}
    assert crossed
    assert crossed <= broken
    # And by how much in the simplest problem: n = p = 1, v and w_{0,0} the same, half fine-tuned.
    phi = np.array([[1.0], [0.0]])
    w = np.array([[1.0, 0.0]])
    c = closed.coefficients(Problem(phi, np.zeros((1, 2)), w, w @ phi, 1.0, float(np.log(2))))
    assert closed.distance(c, 0) == pytest.approx(1)
    assert closed.psi(c, 0) == pytest.approx(np.sqrt(0.5))
    assert closed.zeta(c, 0) == pytest.approx(1)
    # One round halves what is seen (n lambda = s² = 1); half of it is left: 0.5 + 0.25.
    assert closed.distance(c, 1) == pytest.approx(0.75)
    assert closed.psi(c, 1) == pytest.approx(np.sqrt(0.25 + 0.0625))


def test_near_a_start_the_exact_distance_grows_at_round_1() -> None:
    """Off the column space the weights leave w_{0,0}, near w_init, for 0."""
    phi = np.array([[1.0], [0.0]])
    near = np.array([[0.0, 1.0]])
    c = closed.coefficients(Problem(phi, near, near, np.zeros((1, 1)), 1.0, 1.0))
    assert closed.distance(c, 0) == pytest.approx(0)
    assert closed.distance(c, 1) == pytest.approx(1)
    assert closed.psi(c, 0) > closed.psi(c, 1)


def test_counts_are_of_what_they_say() -> None:
    ones = np.ones(3)
    falls, late = np.array([0.2, 0.1]), np.array([0.1, 0.2])
    names = ("norm_printed", "zeta", "norm", "psi", "psi_mended", "distance", "cross_term")
    case = theory_checks.Case(
        0, "zero", "aligned", 1.0, 2, 3, 1, 1.0, dict.fromkeys(names, ones),
        {"psi": falls, "zeta": falls, "norm": falls, "distance": late},
    )  # fmt: skip
    broken = dataclasses.replace(
        case,
        index=1,
        values=case.values | {"distance": np.array([1.0, 1.5, 1.0])},
        drops=case.drops | {"distance": np.array([-0.5, 0.5])},
    )
    found = theory_checks.tally([case, broken, broken])
    assert (found["cases"], found["problems"], found["psi_decreases"]) == (3, 2, 3)
    assert found["psi_fails_to_bound_distance"] == 2
    assert found["psi_fails_to_bound_distance_problems"] == 1
    assert (found["distance_decreases"], found["distance_grows_at_1"]) == (1, 2)
    assert (found["distance_drops_most_at_1"], found["norm_decreases"]) == (0, 3)
    assert found["distance_over_psi"]["max"] == 1.5
    examples = theory_checks.counter_examples([case, broken])
    assert examples["psi bounds the distance"]["index"] == 1
    assert examples["a decreasing distance drops most at t = 1"]["index"] == 0
    assert "the exact norm decreases" not in examples


def test_the_command_repeats_and_does_not_overwrite_other_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--problems", 2, "--seed", 5, "--output", tmp_path / "out"]
    assert call(theory.main, *words) == 0
    printed = capsys.readouterr().out
    assert "psi(t) strictly" in printed
    assert "…" not in printed  # a heading or figure cut short
    first = (tmp_path / "out/theory.json").read_bytes()
    record = json.loads(first)
    assert record["settings"]["seed"] == 5
    assert record["all"]["cases"] == 2 * len(STARTS) * len(LABELS) * len(TIMES)
    assert record["errors"]["lemma_1"]["comparisons"] == 2 * 5
    assert "| near, aligned | 12 |" in (tmp_path / "out/theory.md").read_text(encoding="utf-8")
    with Image.open(tmp_path / "out/theory.png") as picture:
        assert picture.width > 1000
    assert call(theory.main, *words) == 0
    assert (tmp_path / "out/theory.json").read_bytes() == first
    capsys.readouterr()
    assert call(theory.main, *words, "--rounds", 3) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert (tmp_path / "out/theory.json").read_bytes() == first


def test_a_broken_closed_form_is_told_and_ends_in_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = closed.teacher
    monkeypatch.setattr(closed, "teacher", lambda c, t: right(c, t) * (1 + 1e-6 * t))
    assert call(theory.main, "--problems", 1, "--output", tmp_path) == 1
    assert capsys.readouterr().out.count("FAILED") >= 2
    assert "NO" in (tmp_path / "theory.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--problems", "0"], "--problems must be at least 1, not 0"),
        (["--rounds", "1"], "--rounds must be at least 2, not 1"),
        (["--seed", "-1"], "--seed must be at least 0, not -1"),
        (["--n", "0"], "--n: a size must be at least 1"),
        (["--n", "4", "--d", "4"], "d > n, but d is 4: give at least 5"),
        (["--d", "2"], "d > n, but d is 2: give at least 3"),
        (["--d", "500"], "choose d·p of at most 256"),
        (["--problem", "3"], "Did you mean --problems?"),
        (["--n", "many"], "option --n"),
    ],
)
def test_mistakes(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(theory.main, *words, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert call(theory.main, "--problems", 1, "--output", tmp_path / "out") == 2
    assert "is no folder" in capsys.readouterr().err


def test_given_sizes_are_those_of_the_problems() -> None:
    for index in range(5):
        problem = draw(0, index, "near", "aligned", 1.0, Sizes(n=1, d=9, p=4))
        assert problem.phi.shape == (9, 1)
        assert problem.y.shape == (4, 1)
        small = draw(0, index, "near", "aligned", 1.0, Sizes(d=3))
        assert small.phi.shape == (3, 2)
    with pytest.raises(UserError, match="d > n"):
        Sizes(n=3, d=3)


def test_starts_and_labels_lie_as_they_are_called() -> None:
    moved, explained = {}, {}
    for start in STARTS:
        for labels in LABELS:
            drawn = [draw(0, i, start, labels, 1.0) for i in range(100)]
            moved[start] = np.median([np.std(q.w_00 - q.w_init) for q in drawn])
            off = [np.sum((q.y - q.w_00 @ q.phi) ** 2) / np.sum(q.y**2) for q in drawn]
            explained[start, labels] = np.median(off)
            assert all(q.w_init.any() == (start != "zero") for q in drawn)
    assert moved["near"] == pytest.approx(0.3, rel=0.1)
    assert moved["independent"] == pytest.approx(np.sqrt(2), rel=0.1)
    for start in STARTS:
        assert explained[start, "aligned"] < 0.5 < explained[start, "independent"]
