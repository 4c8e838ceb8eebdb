"""Searches that try candidates at a smaller length first: who goes on, what is not run."""

import json
from pathlib import Path

import pytest

from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration
from selfdistill.experiments import run as experiments_run
from selfdistill.experiments import state
from selfdistill.experiments.jobs import Choice, Job
from selfdistill.experiments.plan import Plan
from selfdistill.experiments.state import Asked, Sweep
from tests.kit.experiments import make_table, run
from tests.kit.report import note, write

RATES = (1e-3, 2e-3, 3e-3, 4e-3, 5e-3)


def planned(root: Path, rates: tuple[float, ...], halving: int, method: str = "") -> Plan:
    """A sweep of one method that searches for its rate."""
    values = json.dumps(list(rates))
    text = f'title = "x"\nstart = "model"\n{method}[search]\n"finetune.lr" = {values}\n'
    (root / "my" / "methods" / "halved.toml").write_text(text)
    make_table(root / "my", "halved", ["halved"], ["colours"])
    sweep = Sweep(root / "planned", "tiny", root / "shards", root / "my", [], halving)
    return sweep.plan([Asked("halved", ("colours",))])


def choice_of(plan: Plan) -> Choice:
    (choice,) = plan.cells[0].job.choices
    return choice


def scored(root: Path, job: Job, score: float) -> None:
    """Leaves a candidate's validation score."""
    result = {"metric": "accuracy", "metrics": {"val_accuracy": score}, "seconds": 1.0}
    write(root / job.leaves / "result.json", result)


def lengths(job: Job | None) -> list[int]:
    """Steps of a candidate and of those before it."""
    found = []
    while job is not None:
        found.append(configuration.load(job.words).finetune.length(27))
        job = job.shorter
    return found


@pytest.mark.parametrize(
    ("count", "halving", "steps", "keeps"),
    [
        (5, 2, [4, 2, 1], [2, 3]),
        (3, 3, [4, 1], [1]),
        (4, 3, [4, 1], [2]),
        (2, 3, [4], []),
        (5, 0, [4], []),
    ],
)
def test_lengths_and_numbers(
    root: Path, count: int, halving: int, steps: list[int], keeps: list[int]
) -> None:
    plan = planned(root, RATES[:count], halving)
    candidates = [job for _, job in choice_of(plan).candidates]
    assert [lengths(job) for job in candidates] == [steps] * count
    one: Job | None = candidates[0]
    found = []
    while one is not None and one.trial is not None:
        assert len(one.trial.jobs) == count
        found.append(one.trial.keep)
        one = one.shorter
    assert found == keeps
    names = [job.name for job in plan.ordered()]
    assert len(names) == len(set(names)) == count * len(steps) + 1
    experiments_run.check(root / "nowhere", plan)  # warm-ups, too, are as much shorter


def test_the_best_go_on_and_the_others_are_dropped(root: Path, tmp_path: Path) -> None:
    plan = planned(root, RATES[:4], 2)
    choice = choice_of(plan)
    whole = [job for _, job in choice.candidates]
    half = [job.shorter for job in whole if job.shorter]
    quarter = [job.shorter for job in half if job.shorter]
    assert not any(job.dropped(tmp_path) for job in half)
    for job, score in zip(quarter, (0.5, 0.6, 0.5, 0.4), strict=True):
        assert not half[3].dropped(tmp_path), "it is not known yet"
        scored(tmp_path, job, score)
    assert [job.dropped(tmp_path) for job in half] == [False, False, True, True]
    assert [state.status(tmp_path, job) for job in half] == ["open", "open", "done", "done"]
    note(tmp_path, half[1], "failed", "the loss is not finite at step 3: loss = nan: lower")
    assert not whole[1].dropped(tmp_path), "the other half is not known yet"
    scored(tmp_path, half[0], 0.2)
    assert [job.dropped(tmp_path) for job in whole] == [False, True, True, True]
    with pytest.raises(UserError, match=f"waits for {whole[0].name}"):
        choice.best(tmp_path)
    scored(tmp_path, whole[0], 0.1)
    assert choice.best(tmp_path) == {"finetune.lr": RATES[0]}
    scored(tmp_path, whole[3], 0.3)  # of an earlier call
    assert choice.best(tmp_path) == {"finetune.lr": RATES[3]}


def test_what_counts_steps_by_itself_is_tried_whole(root: Path) -> None:
    method = '[options]\n"finetune.regularizer" = "recadam"\n'
    plan = planned(root, RATES[:4], 2, method)
    assert all(job.trial is None for _, job in choice_of(plan).candidates)


def test_a_sweep_keeps_its_rule(root: Path, tmp_path: Path) -> None:
    planned(root, RATES[:2], 2)
    sweep = Sweep(tmp_path / "sweep", "quick", root / "shards", root / "my", [Asked("halved")], 2)
    sweep.save()
    assert Sweep.open(sweep.root) == sweep
    places = {"data_root": str(root / "shards"), "specs": str(root / "my"), "profile": "quick"}
    with pytest.raises(UserError, match="--halving 1: give 0, for none, or 2 or more"):
        experiments_run.main("halved", halving=1, **places)
    with pytest.raises(UserError, match="holds searches of --halving 2, not 3"):
        experiments_run.main("halved", halving=3, output=str(sweep.root), **places)


@pytest.mark.multi
def test_what_is_dropped_is_not_run(root: Path) -> None:
    planned(root, RATES[:3], 2)
    sweep = root / "sweep"
    done = run(root, "halved", "--halving", "2", "--in_process", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    plan = Sweep.open(sweep).plan()
    whole = [job for _, job in choice_of(plan).candidates]
    assert sorted(job.result(sweep) is None for job in whole) == [False, False, True]
    (dropped,) = [job for job in whole if job.dropped(sweep)]
    assert f"{dropped.name}: dropped, others did better" in done.stdout
    assert not (sweep / dropped.folder).exists()
    assert state.status(sweep, plan.cells[0].job) == "done"
