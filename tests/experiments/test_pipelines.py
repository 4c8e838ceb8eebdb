"""Several pipelines, and searches of the stages before fine-tuning."""

import itertools
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from selfdistill.data.errors import UserError
from selfdistill.experiments import results, state
from selfdistill.experiments import run as experiments_run
from selfdistill.experiments.jobs import Job
from selfdistill.experiments.plan import Plan
from selfdistill.experiments.report import __main__ as report
from selfdistill.experiments.report import sweep as report_sweep
from selfdistill.experiments.results import Sample
from selfdistill.experiments.spec import Profile, Specs
from selfdistill.experiments.state import Asked, Sweep
from tests.experiments.test_in_process import Jobs, weights
from tests.kit.experiments import command, make_table
from tests.kit.launches import ROOT, environment
from tests.kit.report import finish, grids, look, note, pack, run_all, said, section, sweep_of

SHALLOW = '[image.search]\n"pretrain.lr" = [1e-4, 3e-4]\n'
DEEP = SHALLOW + '"distill.lr" = [1e-4, 2e-4, 3e-4]\n'


@pytest.fixture(scope="module")
def deep(root: Path) -> Path:
    """Profiles shallow and deep: quick, with searches of stage 1, and of both."""
    text = (root / "my" / "profiles" / "quick.toml").read_text()
    for name, search in (("shallow", SHALLOW), ("deep", DEEP)):
        searched = text.replace("[text]", f"{search}\n[text]")
        (root / "my" / "profiles" / f"{name}.toml").write_text(searched)
    make_table(root / "my", "one", ["self_distillation"], ["colours"])
    return root


def planned(root: Path, *asked: Asked, profile: str = "deep") -> Plan:
    return Sweep(root / "s", profile, root / "shards", root / "my", []).plan(list(asked))


def jobs_of(plan: Plan) -> dict[str, Job]:
    return {job.name: job for job in plan.ordered()}


# --- pipelines


def test_the_first_pipeline_is_what_there_was(root: Path) -> None:
    """So that results of one pipeline are the first of several."""
    tables = ("table1", "table3", "figure4")
    one, three = (
        jobs_of(planned(root, *(Asked(t, ("colours",), (), 3, n) for t in tables), profile="tiny"))
        for n in (None, 3)
    )
    assert {name for name in three if "pipeline=" not in name} == set(one)
    for name, job in one.items():
        assert job == three[name], name


def test_pipelines_have_seeds_of_their_own(deep: Path) -> None:
    plan = planned(deep, Asked("table1", ("colours",), (), 3, 3))
    jobs = jobs_of(plan)
    for number in (1, 2):
        for name in ("pretrain", "distill", "self_distillation", "fine_tuning"):
            assert jobs[f"colours/{name},pipeline={number}"].words["seed"] == 100 * number
        needs = jobs[f"colours/self_distillation,pipeline={number}"].needs
        assert [job.name for job in needs] == [f"colours/distill,pipeline={number}"]
        (teacher,) = needs[0].needs
        assert teacher.name == f"colours/pretrain,pipeline={number}"
        assert needs[0].start == f"colours/pretrain,pipeline={number}/pretrain/export"
        assert needs[0].choices == jobs["colours/distill"].choices
    assert all(len(cell.jobs) == 3 and cell.seeds == 9 for cell in plan.cells)
    assert not [n for n, job in jobs.items() if "/search/" in n and job.words["seed"] != 1000]


def test_without_a_search_options_are_as_they_are_said(deep: Path) -> None:
    places: dict[str, Any] = {"data_root": str(deep / "shards"), "specs": str(deep / "my")}
    places |= {"profile": "deep", "pipelines": 2, "seeds": 1, "output": str(deep / "plain")}
    asked = Asked("one", (), (), 1, 2)
    sweep = Sweep(deep / "s", "deep", deep / "shards", deep / "my", [], search=False)
    jobs = jobs_of(sweep.plan([asked]))
    assert len(jobs) == 6
    assert not any(job.choices or job.seeds > 1 for job in jobs.values())
    searched = jobs_of(planned(deep, asked))
    assert all(jobs[name].words == searched[name].words for name in jobs)
    assert len(searched) > len(jobs)
    experiments_run.main("one", search=False, dry_run=True, **places)
    with pytest.raises(UserError, match="--halving 2 with --search false"):
        experiments_run.main("one", search=False, halving=2, **places)
    with pytest.raises(UserError, match="--seeds 1: give 2 or more, or 1 with --pipelines 2"):
        experiments_run.main("one", search=False, **places | {"pipelines": 1})
    Sweep(deep / "plain", "deep", deep / "shards", None, [], search=False).save()
    with pytest.raises(UserError, match=r"holds experiments without a search \(--search false\)"):
        experiments_run.main("one", **places)


def test_a_mean_of_pipelines_varies_as_their_means_do() -> None:
    """Oracles: Student's interval of scipy, and the mean square within of a one-way analysis."""
    told = np.random.default_rng(0).normal(70, 2, (3, 4))
    one = Sample({100 * p + s: float(told[p, s]) for p in range(3) for s in range(4)})
    means = told.mean(1)
    assert (one.n, one.count) == (12, "3 × 4")
    assert one.mean == pytest.approx(told.mean())
    assert one.std == pytest.approx(means.std(ddof=1))
    low, high = stats.t.interval(0.95, 2, means.mean(), stats.sem(means))
    assert one.interval() == pytest.approx((low, high))
    f, _ = stats.f_oneway(*told)
    assert one.within**2 == pytest.approx(4 * means.var(ddof=1) / f)
    # Pipeline 0 is 1 behind, pipeline 1 is 1.01 behind.
    other = Sample({s: v - 1 - s / 1e4 for s, v in one.values.items() if s < 200})
    assert one.minus(other).values.keys() == other.values.keys()
    assert (one.minus(other).sign, one.minus(other).count) == (1, "2 × 4")
    equal = Sample({seed: value - 1 for seed, value in one.values.items() if seed < 200})
    assert one.minus(equal).sign == 0, "equal differences are no certain ones"
    uneven = Sample({0: 1.0, 1: 3.0, 100: 5.0})
    assert (uneven.mean, uneven.count) == (3.5, "2 × 2/1")


def test_the_report_keeps_both_spreads_apart(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, ["xray"], Asked("table1", ("xray",), (), 3, 3))
    run_all(made)
    built = report.build(report_sweep.read(made.root))
    grid = grids(section(built, "table1").blocks)[0]
    entry = look(grid, "self-distillation", "chest X-rays (Kermany)")
    found = [
        [
            100 * json.loads(path.read_text())["metrics"]["test_accuracy"]
            for path in sorted((made.root / "xray" / name).glob("finetune/seed-*/result.json"))
        ]
        for name in ("self_distillation", *(f"self_distillation,pipeline={n}" for n in (1, 2)))
    ]
    means = np.mean(found, axis=1)
    within = np.sqrt(np.var(found, axis=1, ddof=1).mean())
    text = f"{means.mean():.2f} ± {means.std(ddof=1):.2f}, within {within:.2f}"
    assert entry.text.replace("\N{NO-BREAK SPACE}", " ") == text
    assert entry.more == "(3 × 3)"
    assert "of the pipelines' means" in grid.caption
    assert "a further pre-training and a distillation of its own seeds" in said(
        section(built, "differences")
    )
    assert "--pipelines 3" in report_sweep.read(made.root).wanting(made.asked[0])


def test_a_cell_is_complete_when_its_pipelines_are(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, ["xray"], Asked("table1", ("xray",), ("self_distillation",), 2, 2))
    run_all(made, lambda job: job.name == "xray/self_distillation,pipeline=1")
    (cell,) = made.plan().cells
    outcome = results.outcome(made.root, cell)
    assert (outcome.status, outcome.begun, len(outcome.results)) == ("open", True, 2)
    note(made.root, cell.jobs[1], "failed", "no space")
    assert results.outcome(made.root, cell).message == "no space"
    finish(made.root, cell.jobs[1])
    outcome = results.outcome(made.root, cell)
    assert (outcome.status, list(outcome.results)) == ("done", [0, 1, 100, 101])


@pytest.mark.parametrize(
    ("options", "told"),
    [({"pipelines": 10}, "--pipelines 10: give 1 to 9"), ({"seeds": 101}, "give at most 100")],
)
def test_seeds_of_pipelines_do_not_meet(
    options: dict[str, int], told: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        experiments_run.main("table1", data_root=str(root), output=str(tmp_path), **options)


# --- searches of stages 1 and 2


def test_a_stage_is_searched_once_for_all_that_share_it(deep: Path) -> None:
    asked = [Asked(t, ("colours",)) for t in ("table1", "table3", "table5", "figure1")]
    jobs = jobs_of(planned(deep, *asked))
    tried = sorted(n for n in jobs if n.startswith("colours/search/pretrain"))
    assert tried == sorted(
        f"colours/search/pretrain{objective}/lr={lr}{more}"
        for objective in ("", ",objective=supcon")
        for lr in ("0.0001", "0.0003")
        for more in ("", ",scored")
    )
    made, scored = (jobs[f"colours/search/pretrain/lr=0.0003{m}"] for m in ("", ",scored"))
    assert (made.words["pretrain.lr"], made.words["seed"]) == (3e-4, 1000)
    assert scored.start == f"{made.name}/pretrain/export"
    assert scored.words["finetune.test"] is False
    usual, longer = jobs["colours/pretrain"], jobs["colours/pretrain,steps=10"]
    assert usual.choices == longer.choices
    assert [o for o, _ in usual.choices[0].candidates] == [{"pretrain.lr": v} for v in (1e-4, 3e-4)]
    distilled = jobs["colours/search/distill/lr=0.0002"]
    assert distilled.needs == [usual], "the teacher is the one that stage 1's choice leaves"
    assert (
        jobs["colours/distill,match=prediction"].choices == [jobs["colours/distill"].choices[0]]
        or "colours/search/distill,match=prediction/lr=0.0001" not in jobs
    )
    assert not jobs["colours/fine_tuning"].choices


def test_the_best_rate_of_a_stage_is_taken(deep: Path, tmp_path: Path) -> None:
    jobs = jobs_of(planned(deep, Asked("one")))
    stage = jobs["colours/pretrain"]
    for lr, score in (("0.0001", 0.5), ("0.0003", 0.7)):
        job = jobs[f"colours/search/pretrain/lr={lr},scored"]
        with pytest.raises(UserError, match="no validation score"):
            stage.options(tmp_path)
        file = tmp_path / job.leaves / "result.json"
        file.parent.mkdir(parents=True)
        told = {"metric": "accuracy", "metrics": {"val_accuracy": score}, "seconds": 1}
        file.write_text(json.dumps(told))
    assert stage.options(tmp_path)["pretrain.lr"] == 3e-4


def test_a_stage_that_diverges_loses_its_candidate(deep: Path, tmp_path: Path) -> None:
    jobs = jobs_of(planned(deep, Asked("one")))
    bad = jobs["colours/search/pretrain/lr=0.0003"]
    note(tmp_path, bad, "failed", "the loss is not finite at step 3: loss = nan: lower")
    assert state.status(tmp_path, bad) == "done"
    scored = jobs[f"{bad.name},scored"]
    assert scored.lost(tmp_path)
    assert not jobs["colours/pretrain"].lost(tmp_path)
    other = jobs["colours/search/pretrain/lr=0.0001,scored"]
    finish(tmp_path, other)
    assert jobs["colours/pretrain"].options(tmp_path)["pretrain.lr"] == 1e-4


@pytest.mark.parametrize("name", ["xray", "scierc"])
@pytest.mark.parametrize("table", ["table3", "table5", "shortcuts"])
def test_rivals_and_ablations_have_as_many(table: str, name: str, tmp_path: Path) -> None:
    sets = pack(tmp_path / "shards", name)
    plan = Sweep(tmp_path / "s", "real", sets, None, []).plan([Asked(table, (name,))])
    lines = experiments_run.costs(plan)
    assert len(lines) > 2
    assert all(": 9 candidates" in line for line in lines[:-1]), lines


@pytest.mark.parametrize("table", ["table1", "table2"])
def test_all_methods_have_the_same_number_of_candidates(table: str, tmp_path: Path) -> None:
    name = {"table1": "xray", "table2": "scierc"}[table]
    sets = pack(tmp_path / "shards", name)
    plan = Sweep(tmp_path / "s", "real", sets, None, []).plan([Asked(table, (name,))])
    lines = experiments_run.costs(plan)
    assert len(lines) == 7
    assert all(": 9 candidates" in line for line in lines[:6]), lines
    assert lines[5].endswith("3 with a pretrain of their own, 3 with a distill of their own")
    scale = Specs().load(Profile, "real").of("image" if table == "table1" else "text")
    grids_of_methods = {m: t.search for m, t in scale.methods.items()}
    assert all(len(list(itertools.product(*g.values()))) > 1 for g in grids_of_methods.values())


@pytest.mark.multi
def test_a_pipeline_is_what_its_seeds_make_in_one_launch(deep: Path, tmp_path: Path) -> None:
    """The oracle: `--stage all --seed 100`, at the rate that the search chose."""
    words = command(deep, "one", "--jobs", "1", "--in_process", "--pipelines", "2")
    for name, value in (("--profile", "shallow"), ("--output", str(tmp_path / "sweep"))):
        words[words.index(name) + 1] = value
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = jobs_of(planned(deep, Asked("one"), profile="shallow"))
    rate = jobs["colours/pretrain"].options(tmp_path / "sweep")["pretrain.lr"]
    oracle = Jobs(tmp_path / "whole", deep)
    own = {"finetune__dropout": 0.0, "finetune__steps": 4, "finetune__warmup": 1}
    own |= {"finetune__start": "auto", "finetune__seeds": 2, "seed": 100}
    assert oracle.do("all", "all", "image", pretrain__lr=rate, **own) == 0
    assert oracle.worker
    oracle.worker.close()
    for job, stage in (("pretrain", "pretrain"), ("distill", "distill-1")):
        found = weights(tmp_path / "sweep" / "colours" / f"{job},pipeline=1" / stage)
        assert found
        assert found == weights(tmp_path / "whole" / "all" / stage)
        assert found != weights(tmp_path / "sweep" / "colours" / job / stage)
    found = weights(tmp_path / "sweep" / "colours" / "self_distillation,pipeline=1" / "finetune")
    assert found == weights(tmp_path / "whole" / "all" / "finetune")


def test_one_seed_of_each_pipeline_may_become_several(tmp_path: Path) -> None:
    """What is complete is the first of them, at every moment, and is not done again."""
    one, three = (Asked("table1", ("xray",), ("fine_tuning",), seeds, 2) for seeds in (1, 3))
    made = sweep_of(tmp_path, ["xray"], one)
    run_all(made)
    (job, _), (more, _) = (made.plan([asked]).cells[0].jobs for asked in (one, three))
    leaves = made.root / job.leaves
    (leaves / "export").mkdir()
    (leaves / "export" / "weights").write_text("learnt")
    before = job.result(made.root)
    words = ["--stage", "finetune"]
    assert state.begin(made.root, more, words, made.data_root) == words
    assert (leaves / "seed-0" / "export" / "weights").read_text() == "learnt"
    assert [path.name for path in leaves.iterdir()] == ["seed-0"]
    assert before is not None
    assert (job.result(made.root), more.result(made.root)) == (before, None)
    (cell,) = made.plan([one]).cells
    assert results.outcome(made.root, cell).status == "done"
    finish(made.root, more)
    assert job.result(made.root) == more.result(made.root) != before
    state.begin(made.root, more, words, made.data_root)  # several stay as they are
    assert (leaves / "result.json").is_file()
