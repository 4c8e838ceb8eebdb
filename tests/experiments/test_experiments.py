"""Sweeps: what is planned, shared, resumed, failed; real launches at the end."""

import json
import re
from pathlib import Path

import pytest

from selfdistill.data.errors import UserError
from selfdistill.experiments import results, state
from selfdistill.experiments import run as experiments_run
from selfdistill.experiments.plan import Plan
from selfdistill.experiments.spec import Dataset, Method, Profile, Specs, Table, paper_figures
from selfdistill.experiments.state import Asked, Sweep
from tests.kit.experiments import make_table
from tests.kit.report import finish, note


def plan(root: Path, *tables: str, datasets: tuple[str, ...] = ("colours",)) -> Plan:
    sweep = Sweep(root / "planned", "tiny", root / "shards", root / "my", [])
    return sweep.plan([Asked(name, datasets) for name in tables])


# --- specs


@pytest.mark.parametrize("kind", [Method, Dataset, Table, Profile])
def test_every_spec_is_right(kind: type) -> None:
    specs = Specs()
    names = specs.names(kind)
    assert names
    for name in names:
        specs.load(kind, name)


def test_every_row_of_every_table_is_known_and_has_the_papers_figures() -> None:
    specs, paper = Specs(), paper_figures()
    for name in specs.names(Table):
        table = specs.load(Table, name)
        columns = [specs.load(Dataset, d).paper for d in table.datasets]
        for row in table.rows:
            method = specs.load(Method, row.method)
            if name in paper:
                key = row.paper or method.paper
                assert key in paper[name], (name, row)
                assert set(paper[name][str(key)]) == set(columns), (name, row)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('title = "x"\nstart = "nowhere"\n', "start: Input should be"),
        ('title = "x"\nstart = "model"\n[options]\n"finetune.dropuot" = 1\n', "finetune.dropout"),
        ('title = "x"\nstart = "model"\ncolour = 1\n', "colour: Extra inputs"),
        ('title = "x\n', "not valid TOML"),
    ],
)
def test_a_wrong_spec_is_named(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "mine.toml").write_text(text)
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        Specs(tmp_path).load(Method, "mine")
    assert str(tmp_path / "methods" / "mine.toml") in str(caught.value)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean self_distillation"):
        Specs().load(Method, "self_distilation")


# --- plans


def test_stages_are_shared_between_methods_tables_and_seeds(root: Path) -> None:
    jobs = plan(root, "table1", "table3", "table6", "figure4", "table5").ordered()
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    pretrained = [n for n in names if n.startswith("colours/pretrain")]
    assert sorted(pretrained) == [
        "colours/pretrain",
        "colours/pretrain,objective=supcon",
        "colours/pretrain,steps=10",
    ]
    distilled = sorted(n for n in names if n.startswith("colours/distill"))
    assert distilled == [
        "colours/distill",
        "colours/distill#2",
        "colours/distill#3",
        "colours/distill#4",
        "colours/distill,mae_weight=0.0",
        "colours/distill,mae_weight=0.1",
        "colours/distill,mae_weight=0.3",
        "colours/distill,mae_weight=0.5",
        "colours/distill,match=prediction",
        "colours/distill,match=weights_l2",
        "colours/distill,match=weights_mars",
    ]
    place = {name: i for i, name in enumerate(names)}
    for job in jobs:
        assert all(place[one.name] < place[job.name] for one in job.before)


def test_levels_hold_jobs_that_do_not_wait_for_one_another(root: Path) -> None:
    planned = plan(root, "table1")
    levels = planned.levels()
    assert sum(map(len, levels)) == len(planned.ordered())
    seen: set[str] = set()
    for level in levels:
        assert all({one.name for one in job.before} <= seen for job in level)
        seen |= {job.name for job in level}


def test_the_search_uses_its_own_seed_and_no_test_data(root: Path) -> None:
    for job in plan(root, "table1").ordered():
        if "/search/" in job.name:
            assert job.words["finetune.test"] is False
            assert job.words["seed"] == 1000
            assert job.seeds == 1
        elif job.stage == "finetune":
            assert "finetune.test" not in job.words
            assert len(job.choices) == 1


def test_a_variant_takes_over_its_methods_choice(root: Path) -> None:
    jobs = {job.name: job for job in plan(root, "table3", "figure4").ordered()}
    for name in ("self_distillation,rounds=3", "prediction_matching", "self_distillation"):
        (choice,) = jobs[f"colours/{name}"].choices
        assert all("search/self_distillation/" in job.name for _, job in choice.candidates)


def test_the_best_validation_score_is_taken(root: Path, tmp_path: Path) -> None:
    job = plan(root, "table1").cells[0].job
    (choice,) = job.choices
    with pytest.raises(UserError, match="no validation score"):
        job.options(tmp_path)
    for score, (_, candidate) in zip((0.5, 0.7), choice.candidates, strict=True):
        file = tmp_path / candidate.leaves / "result.json"
        file.parent.mkdir(parents=True)
        metrics = {"val_accuracy": score, "val_macro_f1": 1 - score}
        file.write_text(json.dumps({"metric": "accuracy", "metrics": metrics, "seconds": 1}))
    assert job.options(tmp_path)["finetune.lr"] == 2e-3


def test_a_candidate_that_diverged_loses_and_vetoes_nothing(root: Path, tmp_path: Path) -> None:
    planned = plan(root, "table1")
    cell = next(c for c in planned.cells if c.job.choices)
    (choice,) = cell.job.choices
    *others, (_, bad) = choice.candidates
    for number, (_, job) in enumerate(others):
        finish(tmp_path, job)
        assert job.validation(tmp_path) is not None, number
    with pytest.raises(UserError, match=f"waits for {bad.name}"):
        choice.best(tmp_path)
    note(tmp_path, bad, "failed", "the loss is not finite at step 3: loss = nan: lower")
    assert choice.best(tmp_path) in [options for options, _ in others]
    assert state.status(tmp_path, bad) == "done"
    note(tmp_path, bad, "failed", "No space left on device")
    assert state.status(tmp_path, bad) == "failed"
    assert state.status(tmp_path, cell.job) == "blocked"
    for _, job in choice.candidates:
        (tmp_path / job.leaves / "result.json").unlink(missing_ok=True)
        note(tmp_path, job, "failed", "the loss is not finite at step 3: loss = nan: lower")
    with pytest.raises(UserError, match="every candidate of its search diverged"):
        choice.best(tmp_path)


def test_a_method_may_name_the_tables_that_it_is_a_row_of(root: Path) -> None:
    text = 'title = "mine"\nstart = "model"\ntables = ["table1", "figure4"]\n'
    spec(root / "my", "methods", "joins", text)
    try:
        assert plan(root, "table1").cells[-1].method.name == "joins"
        assert "joins" not in [row.method for row in Specs(root / "my").load(Table, "table1").rows]
        with pytest.raises(UserError, match="a row needs a place x"):
            plan(root, "figure4")
    finally:
        (root / "my" / "methods" / "joins.toml").unlink()


def test_only_restricts(root: Path) -> None:
    sweep = Sweep(root / "planned", "tiny", root / "shards", root / "my", [])
    both = ("colours", "again")
    cells = sweep.plan([Asked("table1", both, ("again/recadam", "fine_tuning"))]).cells
    found = {(c.dataset.name, c.method.name) for c in cells}
    assert found == {("again", "recadam"), ("colours", "fine_tuning"), ("again", "fine_tuning")}


def test_a_set_without_val_is_left_out_where_validation_decides(root: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "colours").mkdir(exist_ok=True)
        (tmp_path / "colours" / split).symlink_to(root / "shards" / "colours" / split)
    (tmp_path / "again").symlink_to(root / "shards" / "again")
    sweep = Sweep(tmp_path / "s", "tiny", tmp_path, root / "my", [])
    planned = sweep.plan([Asked("table1", ("colours", "again"))])
    assert {cell.dataset.name for cell in planned.cells} == {"again"}
    assert list(planned.unsearchable) == ["colours"]
    with pytest.raises(UserError, match="no val split to choose by"):
        experiments_run.missing(sweep.plan([Asked("table1", ("colours",))]), ())


# --- what must not be mixed up


def spec(my: Path, part: str, name: str, text: str) -> None:
    (my / part / f"{name}.toml").write_text(text)


def test_what_a_row_says_itself_is_not_searched(root: Path) -> None:
    my = root / "my"
    rows = "".join(
        f'[[rows]]\nmethod = "fine_tuning"\noptions = {{ "finetune.lr" = {lr} }}\n'
        for lr in (1e-5, 1e-2)
    )
    spec(my, "tables", "rates", f'title = "rates"\ndatasets = ["colours"]\n{rows}')
    cells = plan(root, "rates").cells
    told = [cell.job.options(root / "nowhere")["finetune.lr"] for cell in cells]
    assert told == [1e-5, 1e-2], "without a search there is nothing to wait for"


def test_a_methods_own_grid_replaces_the_profiles(root: Path) -> None:
    my = root / "my"
    method = 'title = "x"\nstart = "model"\n[search]\n"finetune.lr" = [1e-5, 3e-5]\n'
    spec(my, "methods", "own_grid", method)
    make_table(my, "grids", ["own_grid"], ["colours"])
    (choice,) = plan(root, "grids").cells[0].job.choices
    assert [options for options, _ in choice.candidates] == [
        {"finetune.lr": 1e-5},
        {"finetune.lr": 3e-5},
    ]
    for options, job in choice.candidates:
        assert job.options(root / "nowhere")["finetune.lr"] == options["finetune.lr"]


def test_what_is_tuned_as_another_takes_over_its_own_grid_too(root: Path) -> None:
    my = root / "my"
    spec(
        my, "methods", "kept", 'title="x"\nstart="model"\n[search]\n"finetune.dropout"=[0.0, 0.2]\n'
    )
    spec(my, "methods", "variant", 'title = "x"\nstart = "model"\ntuned_as = "kept"\n')
    make_table(my, "taken", ["kept", "variant"], ["colours"])
    kept, variant = (cell.job.choices for cell in plan(root, "taken").cells)
    assert [choice.name for choice in variant] == ["colours/kept"] * 2
    names = [[[job.name for _, job in one.candidates] for one in each] for each in (kept, variant)]
    assert names[0] == names[1]


def test_an_option_may_be_said_and_searched(root: Path) -> None:
    """As that of `l2_to_start`, whose other candidates need a value of it, too."""
    both = '"finetune.dropout" = 0.1\n[search]\n"finetune.dropout" = [0.0, 0.2]\n'
    spec(root / "my", "methods", "both", f'title = "x"\nstart = "model"\n[options]\n{both}')
    make_table(root / "my", "said", ["both"], ["colours"])
    (cell,) = plan(root, "said").cells
    rates, dropouts = cell.job.choices
    assert [o for o, _ in dropouts.candidates] == [{"finetune.dropout": v} for v in (0.0, 0.2)]
    tried = [job.options(root / "nowhere") for _, job in rates.candidates]
    assert [one["finetune.dropout"] for one in tried] == [0.1, 0.1]


def test_a_rows_own_value_changes_nothing_of_its_methods_search(root: Path) -> None:
    """Whichever of the two is planned first."""
    my = root / "my"
    text = 'title = "x"\nstart = "model"\n[search]\n"finetune.dropout" = [0.0, 0.2]\n'
    spec(my, "methods", "two_grids", text)
    fixed = '[[rows]]\nmethod = "two_grids"\noptions = { "finetune.lr" = 1e-5 }\n'
    usual = '[[rows]]\nmethod = "two_grids"\n'
    for number, rows in enumerate((fixed + usual, usual + fixed)):
        head = f'title = "order"\ndatasets = ["colours"]\n{rows}'
        spec(my, "tables", f"order_{number}", head)
        cells = {bool(c.row.options): c.job for c in plan(root, f"order_{number}").cells}
        searched = [[sorted(o) for o, _ in choice.candidates] for choice in cells[False].choices]
        assert searched == [[["finetune.lr"]] * 2, [["finetune.dropout"]] * 2]
        for _, candidate in cells[False].choices[1].candidates:
            assert len(candidate.choices) == 1, "dropout is tried at the rate that was chosen"
        assert all(options["finetune.lr"] == 1e-5 for options in cells[True].possible())
        assert len(cells[True].choices) == 1


def test_a_search_of_earlier_stages_is_refused(tmp_path: Path) -> None:
    text = 'title = "x"\nstart = "distill"\n[search]\n"distill.weight" = [0.1, 10.0]\n'
    (tmp_path / "methods").mkdir()
    spec(tmp_path, "methods", "deep", text)
    with pytest.raises(UserError, match="a stage which methods share"):
        Specs(tmp_path).load(Method, "deep")


@pytest.mark.parametrize("name", ["pretrain", "distill", "search"])
def test_a_methods_name_is_no_stages(tmp_path: Path, name: str) -> None:
    (tmp_path / "methods").mkdir()
    spec(tmp_path, "methods", name, 'title = "x"\nstart = "model"\n')
    with pytest.raises(UserError, match="is the folder of a stage"):
        Specs(tmp_path).load(Method, name)


def test_the_larger_number_of_seeds_holds(root: Path) -> None:
    make_table(root / "my", "two", ["fine_tuning"], ["colours"], seeds=2)
    for tables in (("two", "table1"), ("table1", "two")):
        job = next(j for j in plan(root, *tables).ordered() if j.name == "colours/fine_tuning")
        assert job.seeds == 5


def test_values_that_differ_in_signs_have_folders_of_their_own(root: Path) -> None:
    rows = "".join(
        f'[[rows]]\nmethod = "fine_tuning"\noptions = {{ "zero" = "{zero}" }}\n'
        for zero in ("a/b", "a_b")
    )
    spec(root / "my", "tables", "signs", f'title = "s"\ndatasets = ["colours"]\n{rows}')
    assert len({cell.job.name for cell in plan(root, "signs").cells}) == 2


@pytest.mark.parametrize(("profile", "data"), [("small", "again"), ("paper", "again")])
def test_the_shipped_profiles_run_every_method(root: Path, profile: str, data: str) -> None:
    """Whatever the searches choose, no method is refused."""
    sweep = Sweep(root / "planned", profile, root / "shards", root / "my", [])
    tables = [Asked(name, (data,)) for name in ("table1", "table3", "table5", "figure4")]
    planned = sweep.plan(tables)
    experiments_run.check(root / "planned", planned)
    assert len(planned.cells) > 15


def test_statistics_against_scipy() -> None:
    from scipy import stats

    a = results.Sample({0: 1.0, 1: 2.5, 2: 4.0, 3: 3.0})
    b = results.Sample({1: 2.0, 2: 3.0, 3: 3.5, 4: 9.0})
    difference = a.minus(b)
    assert difference.values == {1: 0.5, 2: 1.0, 3: -0.5}
    test = stats.ttest_rel([2.5, 4.0, 3.0], [2.0, 3.0, 3.5])
    low, high = test.confidence_interval(0.95)
    assert difference.interval() == pytest.approx((low, high))
