"""The report of a sweep: its numbers, what is missing of it, its tables and figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from selfdistill.experiments import results, state
from selfdistill.experiments.report import __main__ as report
from selfdistill.experiments.report import differences as report_differences
from selfdistill.experiments.report import sweep as report_sweep
from selfdistill.experiments.report.blocks import Code, Fold, Report, Section
from selfdistill.experiments.report.claims import evidence
from selfdistill.experiments.report.sweep import Contents
from selfdistill.experiments.spec import Claim, Contrast
from selfdistill.experiments.state import Asked, Sweep
from tests.kit.report import (
    BEGAN,
    finish,
    grids,
    look,
    numbers,
    run_all,
    said,
    scores,
    section,
    stands,
    sweep_of,
)


def test_cells_are_mean_and_standard_deviation(built: Report, sweep: Sweep) -> None:
    for key, dataset, title, metric in (
        ("table1", "flowers_64", "flowers, part, 64x64", "accuracy"),
        ("table2", "scierc", "SciERC", "macro_f1"),
    ):
        grid = grids(section(built, key).blocks)[0]
        known = scores(sweep, f"{dataset}/self_distillation", metric)
        assert len(known) == 5
        entry = look(grid, "self-distillation", title)
        assert numbers(entry.text) == [
            round(float(np.mean(known)), 2),
            round(float(np.std(known, ddof=1)), 2),
        ]
        assert entry.more == "(5)"
    heads = {e.text: e.more for e in grids(section(built, "table1").blocks)[0].head}
    assert heads["flowers, part, 64x64"] == "accuracy, %"
    assert {e.more for e in grid.head[1:]} == {"macro F1, %"}


def test_paired_differences_are_scipys(built: Report, sweep: Sweep) -> None:
    part = section(built, "against-further-pretraining")
    grid = next(g for g in grids(part.blocks) if g.stacked)
    means = []
    for dataset, title, metric in (
        ("flowers_64", "flowers, part, 64x64", "accuracy"),
        ("dtd10_64", "textures, ten classes, 64x64", "accuracy"),
        ("xray_64", "X-rays, 64x64", "accuracy"),
        ("scierc", "SciERC", "macro_f1"),
    ):
        ours = scores(sweep, f"{dataset}/self_distillation", metric)
        other = scores(sweep, f"{dataset}/further_pretraining", metric)
        low, high = stats.ttest_rel(ours, other).confidence_interval(0.95)
        entry = look(grid, "self-distillation", title)
        assert numbers(entry.text) == [round(float(np.mean(ours) - np.mean(other)), 2)]
        assert numbers(entry.more) == [round(low, 2), round(high, 2)]
        assert entry.style == ("up" if low > 0 else "down" if high < 0 else "")
        means.append(np.mean(ours) - np.mean(other))
    pooled = look(grid, "self-distillation", "pooled")
    low, high = stats.t.interval(0.95, 3, np.mean(means), stats.sem(means))
    assert numbers(pooled.text) == [round(float(np.mean(means)), 2)]
    assert numbers(pooled.more) == [round(low, 2), round(high, 2)]
    assert "(4\N{NO-BREAK SPACE}sets)" in pooled.more, "points of a curve are not pooled"
    overview = said(section(built, "overview"))
    assert f"{low:.2f} to {high:.2f}" in overview


def test_where_an_interval_contains_zero_that_is_said(built: Report) -> None:
    for key in ("against-fine-tuning", "against-further-pretraining"):
        part = section(built, key)
        words, *differences = grids(part.blocks)
        count = 0
        for grid in differences:
            for line in grid.lines:
                named = next(w for w in words.lines if w.entries[0] == line.entries[0])
                for head, entry in zip(grid.head[1:], line.entries[1:], strict=True):
                    if head.text == "pooled" or len(numbers(entry.more)) < 2:
                        continue
                    low, high = numbers(entry.more)
                    column = 1 if low > 0 else 3 if high < 0 else 2
                    assert head.text in named.entries[column].text.split("; ")
                    count += 1
        assert count > 15
    assert "one further pre-training" in said(section(built, "differences"))


def test_rows_with_options_of_their_own_do_not_stand_for_their_method(
    contents: Contents, sweep: Sweep
) -> None:
    found = report_differences.comparisons(contents, "fine_tuning")
    assert "fine_tuning" not in found
    names = ("self_distillation", "fine_tuning")
    ours, other = (scores(sweep, f"flowers_64/{name}") for name in names)
    assert len(list(sweep.root.glob("flowers_64/self_distillation*"))) == 4, "rounds 1 to 4"
    each = results.compare(contents.outcomes, *names).each
    assert set(each) >= {"flowers_64", "scierc", "cifar100"}
    assert list(each["flowers_64"].values.values()) == pytest.approx(np.subtract(ours, other))


# --- tables


def two_methods(root: Path, shift: list[float]) -> Section:
    """Table 5 on one set; its last row is better than the second by so much, seed by seed."""
    made = sweep_of(root, ["xray"], Asked("table5", ("xray",), (), len(shift)))
    run_all(made)
    for seed, more in enumerate(shift):
        for row, value in (
            ("supcon", 0.1),
            ("fine_tuning", 0.5),
            ("self_distillation", 0.5 + more),
        ):
            place = f"seed-{seed}/result.json" if len(shift) > 1 else "result.json"
            (path,) = (made.root / "xray" / row).glob(f"finetune*/{place}")
            told = json.loads(path.read_text())
            told["metrics"]["test_accuracy"] = value + seed / 100
            path.write_text(json.dumps(told))
    return section(report.build(report_sweep.read(made.root)), "table5")


@pytest.mark.parametrize(
    ("shift", "bold"), [([0.01, 0.012, 0.011], True), ([0.01, 0.05, -0.01], False), ([0.01], False)]
)
def test_only_a_best_that_is_told_from_the_second_is_bold(
    tmp_path: Path, shift: list[float], bold: bool
) -> None:
    grid = grids(two_methods(tmp_path, shift).blocks)[0]
    styles = {line.entries[0].text: line.entries[1].style for line in grid.lines if not line.paper}
    assert styles.pop("self-distillation") == ("best" if bold else "")
    assert set(styles.values()) == {""}


def test_the_lowest_loss_is_the_best_and_others_have_none(built: Report) -> None:
    train, test = grids(section(built, "table4").blocks)
    assert not any(e.style == "best" for line in train.lines for e in line.entries)
    bold = [line.entries[0].text for line in test.lines for e in line.entries if e.style == "best"]
    assert set(bold) == {"self-distillation"}


def test_failed_blocked_and_missing_cells_are_shown(built: Report) -> None:
    one = section(built, "table1")
    grid = grids(one.blocks)[0]
    failed = look(grid, "R3F", "X-rays, 64x64")
    assert (failed.text, failed.style) == ("failed", "missing")
    assert failed.more.endswith("(2 of 5)")
    begun = look(grid, "MARS", "X-rays, 64x64")
    assert begun.text == "under way"
    assert begun.more.endswith("(3 of 5)")
    rows = [line.entries for line in grid.lines if not line.paper]
    assert {entries[-1].text for entries in rows} == {"no data"}
    assert len(rows) == 6
    assert "R3F on X-rays, 64x64, failed: RuntimeError: loss is <nan> | step 12" in said(one)
    assert "python -m data.pack ARCHIVE DATA_ROOT/cub --size 224" in said(one)
    two = section(built, "table2")
    assert look(grids(two.blocks)[0], "self-distillation", "ACL-ARC").text == "blocked"
    assert "blocked: waits for acl_arc/distill, which failed: RuntimeError" in said(two)
    lost = section(built, "missing")
    commands = next(b for b in lost.blocks if isinstance(b, Code)).lines
    assert [c.split()[3] for c in commands] == ["table1", "table2"]
    assert "--datasets flowers_64,dtd10_64,xray_64,cub" in commands[0]


def test_the_papers_figures_stand_below_ours_and_are_marked(built: Report) -> None:
    one = section(built, "table1")
    grid = grids(one.blocks)[0]
    for title, figure, mark in (
        ("flowers, part, 64x64", "90.28 ± 0.44", "†"),
        ("CUB-200-2011", "58.06 ± 0.90", ""),
    ):
        entry = look(grid, "self-distillation", title, under=1)
        assert entry.text.replace("\N{NO-BREAK SPACE}", " ") == figure
        assert entry.more == mark
    assert all(line.paper == (n % 2 == 1) for n, line in enumerate(grid.lines))
    assert "† another set than the paper's: not comparable." in said(one)
    assert "89 of the paper's 102 classes, divided anew" in said(one)
    assert "not those" not in said(one)
    assert "profile small" in said(one)
    text = section(built, "table2")
    assert look(grids(text.blocks)[0], "R3F", "ACL-ARC", under=1).more == ""
    assert "†" not in said(text)
    # Of two quantities the paper's figures are the test losses.
    train, test = grids(section(built, "table4").blocks)
    assert not any(line.paper for line in train.lines)
    assert look(test, "self-distillation", "flowers, part, 64x64", under=1).text == "0.50"
    # A row may have another name in the paper's table.
    ablation = grids(section(built, "table3").blocks)[0]
    assert look(ablation, "without L_Distill", "SciERC", under=1).text == "80.32"


def test_what_only_left_out_is_not_asked_unless_it_is_there(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, ["cub", "dtd"], Asked("table5", ("cub", "dtd"), ("cub",), 2))
    whole = made.plan([Asked("table5", ("cub", "dtd"), (), 2)])
    for job in whole.ordered():
        if job.name.startswith("dtd") and "self_distillation" not in job.name:
            finish(made.root, job)
    contents = report_sweep.read(made.root)
    grid = grids(section(report.build(contents), "table5").blocks)[0]
    told = {line.entries[0].text: [e.text for e in line.entries[1:]] for line in grid.lines}
    assert told["self-distillation"] == ["not run", "not asked"]
    assert "table5 " in contents.wanting(contents.tables[0].asked)
    assert contents.wanting(contents.tables[0].asked).endswith("--only cub --seeds 2")
    assert told["fine-tuning"][0] == "not run"
    assert re.match(r"[\d.]+\s±\s[\d.]+$", told["fine-tuning"][1])


def test_a_table_of_fewer_pipelines_takes_nothing_away(tmp_path: Path) -> None:
    """Of more seeds of one pipeline, as other tables have by default."""
    asked = Asked("table1", ("xray",), (), 1, 3), Asked("table4", ("xray",))
    made = sweep_of(tmp_path, ["xray"], *asked)
    run_all(made)
    contents = report_sweep.read(made.root)
    methods = {one.cell.method.name: len(one.cell.jobs) for one in contents.outcomes}
    assert methods["self_distillation"] == methods["fine_tuning"] == 3


def test_one_table_asked_for_twice_has_two_places(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, ["cub"], Asked("table5", ("cub",)), Asked("table5", ("dtd",)))
    keys = [one.key for one in report.build(report_sweep.read(made.root)).sections]
    assert len(set(keys)) == len(keys)
    assert {"table5", "table5-2"} <= set(keys)


# --- curves and figures


def test_curves_have_their_points_and_the_numbers_beside_them(built: Report) -> None:
    curves = {d.name: ElementTree.fromstring(d.svg) for d in built.drawings()}
    assert {"figure1", "figure3", "figure4", "against-fine-tuning"} <= set(curves)

    def texts(name: str) -> list[str]:
        return [e.text or "" for e in curves[name].iter("{http://www.w3.org/2000/svg}text")]

    for tick in ("1,000", "2,500", "5,000", "47,500", "training images", "self-distillation"):
        assert tick in texts("figure3")
    assert {"0", "0.5", "1", "3"} <= set(texts("figure1"))
    grid = grids(section(built, "figure1").blocks)[0]
    assert [line.entries[1].text for line in grid.lines] == [
        "0",
        "0.5",
        "1",
        "1.5",
        "2",
        "2.5",
        "3",
    ]
    # One line of a curve is one path with as many points as there are rows.
    path = max(re.findall(r'd="(M[^"]*)"', built.drawings()[0].svg), key=lambda d: d.count("L"))
    assert path.count("L") == 4
    assert "pooled, 4 sets" in texts("against-fine-tuning") + texts("against-fine-tuning-2")


# --- analysis, search, cost


def test_analysis_of_every_fine_tuning(built: Report, contents: Contents, sweep: Sweep) -> None:
    part = section(built, "analysis-flowers-64")
    grid, classes, moved = grids(part.blocks)
    rows = [line.entries[0].text for line in grid.lines]
    assert len(rows) == len(set(rows)) == 6 + 3 + 5
    told = [
        json.loads(p.read_text())["analysis"]
        for p in sorted((sweep.root / "flowers_64/r3f").glob("*/seed-*/result.json"))
    ]
    losses = [one["test_loss"] for one in told]
    assert numbers(look(grid, "R3F", "test loss").text) == pytest.approx(
        [np.mean(losses), np.std(losses, ddof=1)], abs=6e-4
    )
    each = np.mean([list(one["per_class_accuracy"]["test"].values())[:12] for one in told], axis=0)
    quartiles = 100 * np.percentile(each, [0, 25, 50, 75, 100])
    line = next(one for one in classes.lines if one.entries[0].text == "R3F")
    assert [float(e.text) for e in line.entries[1:]] == pytest.approx(quartiles, abs=0.051)
    gains = [numbers(line.entries[3].text)[0] for line in moved.lines]
    assert gains == sorted(gains, reverse=True)
    assert sum(g > 0 for g in gains) <= 5
    assert sum(g < 0 for g in gains) <= 5
    assert not any("empty" in line.entries[0].text for line in moved.lines)


def test_every_candidate_of_the_search_and_the_chosen_one(built: Report, sweep: Sweep) -> None:
    found = {grid.head[2].text: grid for grid in grids(section(built, "search").blocks)}
    first, second = found["finetune.lr = 0.0005"], found["finetune.lr = 0.00025"]
    # A method's own search stands beside the profile's.
    assert {"recadam.c = 10", "mars.radius = 0.5", "r3f.weight = 0.1"} <= set(found)
    jobs = {job.name: job for job in sweep.plan().ordered()}
    (choice,) = jobs["dtd10_64/self_distillation"].choices
    place = [line.entries[0].text for line in first.lines].index("textures, ten classes, 64x64")
    # A data set is named above its other methods.
    mine = (line.entries for line in first.lines[place:])
    line = next(entries for entries in mine if entries[1].text == "self-distillation")
    known = [100 * float(score or 0) for _, score in choice.scores(sweep.root)]
    assert [float(e.text) for e in line[2:]] == [round(score, 2) for score in known]
    assert [e.style == "best" for e in line[2:]] == [score == max(known) for score in known]
    assert (line[2 + int(np.argmax(known))].more == "edge") == (int(np.argmax(known)) != 1)
    assert [e.text for e in second.lines[-1].entries[2:]] == ["blocked"] * 3
    assert "without L_MAE: as self-distillation" in said(section(built, "search"))


def test_cost_of_each_stage(built: Report) -> None:
    grid = grids(section(built, "cost-of-stages").blocks)[0]
    row = next(line.entries for line in grid.lines if line.entries[0].text == "SciERC")
    assert [e.text for e in row[1:3]] == ["0:01:40", "0:05:50"]
    assert row[4].text == "3.5"
    lost = next(line.entries for line in grid.lines if line.entries[0].text == "ACL-ARC")
    assert (lost[2].text, lost[4].text) == ("–", "–")
    paper = grid.lines[-1]
    assert paper.paper
    assert [e.text for e in paper.entries[1:]] == ["1:29:33", "5:13:22", "0:32:18", "3.5", ""]


def test_commands_and_versions_are_told(built: Report, sweep: Sweep) -> None:
    folds = [b for b in section(built, "commands").blocks if isinstance(b, Fold)]
    lines = [line for f in folds for b in f.blocks if isinstance(b, Code) for line in b.lines]
    assert "engine/run.py --stage pretrain" in lines
    assert any("# acl_arc/self_distillation: " in line for line in lines), "options are open"
    facts = {
        line.entries[0].text: line.entries[1].text
        for line in grids(section(built, "overview").blocks)[0].lines
    }
    assert "torch 2.11.0" in facts["versions"]
    assert facts["seeds"] == "0, 1, 2, 3, 4"
    assert facts["dates"] == "2025-06-15 15:06 to 2025-06-15 15:08 UTC"
    counts = stands(sweep)
    assert counts["failed"] == 2
    assert facts["jobs"] == (
        f"{counts['done']} complete, 2 failed, {counts['blocked']} blocked by a failed one,"
        f" {counts['open']} not complete"
    )


def test_a_table_under_way_takes_nothing_from_a_complete_one(tmp_path: Path) -> None:
    """Of three seeds all is there, of five, which another table wants, nothing is whole."""
    asked = [Asked(table, ("cub",), (), seeds) for table, seeds in (("table5", 3), ("table3", 5))]
    made = sweep_of(tmp_path, ["cub"], *asked)
    for job in made.plan([asked[0]]).ordered():
        finish(made.root, job)
    contents = report_sweep.read(made.root)
    found = report_differences.comparisons(contents, "fine_tuning")
    assert found["self_distillation"].each["cub"].n == 3
    # Self-distillation is wanted by both, fine-tuning and contrastive pre-training by one.
    told = said(section(report.build(contents), "what-was-run"))
    assert "; 2 of 9 combinations are complete" in told


def test_what_was_interrupted_ended_when_its_last_launch_did(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, ["cub"], Asked("table5", ("cub",), (), 2))
    for job in made.plan().ordered():
        finish(made.root, job)
    path = state.record(made.root, job)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"started": BEGAN + 3600}))
    grid = grids(section(report.build(report_sweep.read(made.root)), "overview").blocks)[0]
    facts = {line.entries[0].text: line.entries[1].text for line in grid.lines}
    assert facts["dates"] == "2025-06-15 15:06 to 2025-06-15 16:08 UTC"


def test_the_baseline_may_be_a_place_on_an_axis(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, ["xray"], Asked("figure4", ("xray",), (), 3))
    run_all(made)
    rows = {"a": "self_distillation@4", "b": "self_distillation@1"}
    test = Contrast(says="it goes on", expect="above", matters=1.0, **rows)
    asked = Claim(name="c", title="", paper="", tables=["figure4"], tests=[test])
    (one,) = evidence.findings(report_sweep.read(made.root), asked)
    assert one.design is not None
    base = 100 * np.std([s / 100 for s in scores(made, "xray/self_distillation")], ddof=1)
    assert one.design.spread == pytest.approx(base)
