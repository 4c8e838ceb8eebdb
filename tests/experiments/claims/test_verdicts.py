"""Verdicts of claims on sweeps whose truth is known."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from selfdistill.data.errors import UserError
from selfdistill.experiments import run as experiments_run
from selfdistill.experiments.report import __main__ as report
from selfdistill.experiments.report import sweep as report_sweep
from selfdistill.experiments.report.blocks import Report
from selfdistill.experiments.report.claims import answers, pages, verdict
from selfdistill.experiments.report.sweep import Contents
from selfdistill.experiments.spec import Claim, Contrast, Specs
from selfdistill.experiments.state import Asked, Sweep
from tests.kit.launches import ROOT
from tests.kit.report import grids, look, pack, run_all, said, scores, section, sweep_of


def scored(
    root: Path, table: str, rows: Mapping[str, Sequence[float]], dataset: str = "xray"
) -> Contents:
    """A table on one set, of which these methods have these scores in %, seed by seed."""
    n = len(next(iter(rows.values())))
    made = sweep_of(root, [dataset], Asked(table, (dataset,), (), n))
    run_all(made)
    for row, values in rows.items():
        write(made, f"{dataset}/{row}", [{"score": v} for v in values])
    return report_sweep.read(made.root)


def write(sweep: Sweep, name: str, seeds: Sequence[Mapping[str, float]]) -> None:
    """Puts figures into the results of a fine-tuning."""
    for seed, figures in enumerate(seeds):
        (path,) = (sweep.root / name).glob(f"finetune*/seed-{seed}/result.json")
        told = json.loads(path.read_text())
        for key, value in figures.items():
            if key == "score":
                told["metrics"] |= {"test_accuracy": value / 100, "test_macro_f1": value / 100}
            else:
                told["analysis"][key] = value
        path.write_text(json.dumps(told))


def claim(**test: Any) -> Claim:
    told = {"says": "so it is", "matters": 1.0} | test
    return Claim(
        name="mine", title="mine", paper="none", tables=["table5"], tests=[Contrast(**told)]
    )


@pytest.mark.parametrize(
    ("differences", "above", "below", "within", "not_below"),
    [
        ([2.0, 2.2, 2.1], "supported", "not supported", "not supported", "supported"),
        ([-2.0, -2.2, -2.1], "not supported", "supported", "not supported", "not supported"),
        ([0.1, 0.11, 0.12], "not supported", "not supported", "supported", "supported"),
        ([-0.1, -0.11, -0.12], "not supported", "not supported", "supported", "supported"),
        ([-3.0, 4.0, 0.5], "can't tell", "can't tell", "can't tell", "can't tell"),
        ([0.0, 0.0, 0.0], "can't tell", "can't tell", "can't tell", "can't tell"),
        # Told from 0, but not from what matters.
        ([0.8, 1.1, 0.9], "supported", "not supported", "can't tell", "supported"),
        ([-0.8, -1.1, -0.9], "not supported", "supported", "can't tell", "can't tell"),
        ([2.0, 2.0, 2.0], "can't tell", "can't tell", "can't tell", "can't tell"),
    ],
)
def test_the_rule(
    tmp_path: Path, differences: list[float], above: str, below: str, within: str, not_below: str
) -> None:
    base = [50.0, 53.0, 51.0]
    ours = [b + d for b, d in zip(base, differences, strict=True)]
    contents = scored(tmp_path, "table5", {"fine_tuning": base, "self_distillation": ours})
    for expect, word in zip(
        ("above", "below", "within", "not_below"), (above, below, within, not_below), strict=True
    ):
        asked = claim(expect=expect, a="self_distillation", b="fine_tuning")
        found = verdict.judge(contents, asked)
        assert found.word == word, expect
        assert verdict.sentence(found).lower().startswith(word), expect
        assert found.each[0].reason
        assert found.single


def test_the_same_runs_are_told_from_equal_scores(tmp_path: Path) -> None:
    contents = scored(
        tmp_path, "table5", {"fine_tuning": [50.0, 53.0], "self_distillation": [50.0, 53.0]}
    )
    asked = [claim(expect=e, a="self_distillation", b="fine_tuning") for e in ("within", "above")]
    assert {verdict.judge(contents, one).word for one in asked} == {"can't tell"}
    for path in (contents.root / "xray" / "fine_tuning").glob("finetune*/seed-*/result.json"):
        (other,) = (contents.root / "xray" / "self_distillation").glob(
            f"finetune*/{path.parent.name}/result.json"
        )
        told = json.loads(other.read_text()) | {"metrics": json.loads(path.read_text())["metrics"]}
        other.write_text(json.dumps(told))
    contents = report_sweep.read(contents.root)
    assert [verdict.judge(contents, one).word for one in asked] == ["supported", "not supported"]


def test_a_row_that_is_none_is_refused(tmp_path: Path) -> None:
    contents = scored(tmp_path, "table5", {"fine_tuning": [50.0, 53.0]})
    with pytest.raises(UserError, match=r"'supcn' is no row of table5.*Did you mean supcon"):
        verdict.judge(contents, claim(expect="above", a="supcn", b="fine_tuning"))
    with pytest.raises(UserError, match="'supcon@one' is no row"):
        verdict.judge(contents, claim(expect="above", a="supcon@one", b="fine_tuning"))
    with pytest.raises(ValueError, match="along goes with a"):
        claim(expect="above", weights={"mars": 1, "r3f": -1}, along="rows")


def test_verdicts_of_the_example_are_holms_over_all_that_were_asked(
    contents: Contents, sweep: Sweep, built: Report
) -> None:
    found = {one.claim.name: one for one in verdict.every(contents)}["against_fine_tuning"]
    names = {"flowers_64": "accuracy", "dtd10_64": "accuracy", "xray_64": "accuracy"}
    each = [
        stats.ttest_rel(
            *(scores(sweep, f"{d}/{m}", key) for m in ("self_distillation", "fine_tuning"))
        ).pvalue
        for d, key in (names | {"scierc": "macro_f1"}).items()
    ]
    padded = sorted([*each, 1.0])  # ACL-ARC's distillation failed
    known = np.maximum.accumulate([min(1.0, (5 - n) * p) for n, p in enumerate(padded)])
    assert sorted(one.p for one in found.ran) == pytest.approx(known[:4])
    lost = next(one for one in found.each if one.word == "not run")
    assert (lost.finding.label, lost.reason) == ("ACL-ARC", "self-distillation: blocked")
    part = section(built, "claim-against-fine-tuning")
    grid = grids(part.blocks)[1]
    assert look(grid, "SciERC", "verdict").text == "supported"
    papers = look(grid, "X-rays, 64x64", "difference", under=1)
    assert papers.text == "+2.53"
    facts = {line.entries[0].text: line.entries[1].text for line in grids(part.blocks)[0].lines}
    assert facts["verdict"].startswith("Supported by all 4 comparisons that were run. 1 of 5")
    assert "fine-tuning alone" in facts["repetitions"]
    assert "at 0.05/5" in facts["said beforehand"]


def test_a_claim_of_a_table_that_was_not_asked_for_takes_the_cells_of_others(
    contents: Contents,
) -> None:
    assert not any(t.table.name == "figure5" for t in contents.tables)
    found = {one.claim.name: one for one in verdict.every(contents)}
    labels = {one.finding.label for one in found["nearer"].ran}
    assert labels == {"flowers, part, 64x64", "textures, ten classes, 64x64", "X-rays, 64x64",
                      "SciERC"}  # fmt: skip
    assert found["cached_teacher"].word == "not run"


def test_every_claim_that_is_shipped_finds_its_rows(tmp_path: Path) -> None:
    specs = Specs()
    claims = [specs.load(Claim, name) for name in specs.names(Claim)]
    tables = {name for one in claims for name in one.tables}
    asked = [Asked(name, tuple(specs.table(name).datasets[:2])) for name in sorted(tables)]
    made = sweep_of(tmp_path, {d for one in asked for d in one.datasets}, *asked)
    contents = report_sweep.read(made.root)
    for one in claims:
        found = verdict.judge(contents, one)
        for test in one.tests:
            assert [j for j in found.each if j.finding.test is test], (one.name, test.says)
        assert found.word == "not run"
        assert {j.reason.split(": ")[-1] for j in found.each} == {"not run"}
    built = report.build(contents)
    assert "Of 16 claims: 0 supported, 0 not supported, 0 can't tell, 16 not run." in said(
        section(built, "how-sure")
    )
    assert "experiments.run lengths " in said(section(built, "claim-long-pretraining"))
    assert "Not run: of no set of pictures" in said(section(built, "advice-images"))


def test_variants_that_claims_need_are_accepted(root: Path) -> None:
    asked = [Asked(name, ("again",)) for name in ("shortcuts", "lengths")]
    sweep = Sweep(root / "planned", "small", root / "shards", root / "my", [])
    planned = sweep.plan(asked)
    experiments_run.check(root / "planned", planned)
    assert len(planned.cells) == 18
    # Where stage 0 is a job, one of them does without.
    real = Sweep(root / "planned", "real", root / "shards", root / "my", []).plan(asked)
    assert real.jobs["again/pretrain"].needs
    assert not real.jobs["again/pretrain,decoder.auto=false"].needs


def test_length_first_round_and_distance(tmp_path: Path) -> None:
    asked = [Asked(t, ("xray",), (), 3) for t in ("lengths", "figure4", "figure5c")]
    made = sweep_of(tmp_path, ["xray"], *asked)
    run_all(made)
    noise = [0.2, -0.1, 0.05]
    for k in (1, 2, 4, 8):
        pre = "" if k == 1 else f",pretrain.steps={300 * k}"
        both = "" if k == 1 else f"{pre},distill.steps={300 * k}"
        noise = noise[1:] + noise[:1]  # or all seeds would have one slope
        fall, flat = ([60 - d * np.log2(k) + e for e in noise] for d in (2.0, 0.02))
        write(made, f"xray/further_pretraining{pre}", [{"score": v} for v in fall])
        write(made, f"xray/self_distillation{both}", [{"score": v} for v in flat])
    gaps: list[list[float]] = []
    rounds = ["further_pretraining", "self_distillation"]
    rounds += [f"self_distillation,rounds={n}" for n in (2, 3, 4)]
    away = [9.0, 6.0, 5.5, 5.4, 5.2]
    random = np.random.default_rng(7)
    for name, far in zip(rounds, away, strict=True):
        gaps.append([0.3 * far + 0.01 * e for e in random.normal(size=3)])
        told = [{"gap": g, "distance_from_init": far} for g in gaps[-1]]
        write(made, f"xray/{name}", told)
    found = {one.claim.name: one for one in verdict.every(report_sweep.read(made.root))}
    assert found["long_pretraining"].word == "supported"
    means = [one.finding.estimate for one in found["long_pretraining"].each]
    assert [m.mean for m in means if m] == pytest.approx([-2.0, -0.02])
    known = [stats.linregress(away, [g[seed] for g in gaps]).slope for seed in range(3)]
    means = [one.finding.estimate for one in found["gap_follows_distance"].each]
    assert [m.mean for m in means if m] == pytest.approx([np.mean(known)])
    assert found["gap_follows_distance"].word == "supported"
    assert len(found["first_round"].ran) == 2
    drawn = [d.name for d in report.build(report_sweep.read(made.root)).drawings()]
    assert {"claim-long-pretraining-curve-1", "claim-first-round-a"} <= set(drawn)


def test_several_pipelines_count_as_one_figure_each(tmp_path: Path) -> None:
    made = sweep_of(tmp_path, ["xray"], Asked("table5", ("xray",), (), 2, 3))
    run_all(made)
    contents = report_sweep.read(made.root)
    asked = claim(expect="above", a="self_distillation", b="fine_tuning")
    found = verdict.judge(contents, asked)
    pipelines = ("", ",pipeline=1", ",pipeline=2")
    means = [
        [np.mean(scores(made, f"xray/{method}{p}")) for p in pipelines]
        for method in ("self_distillation", "fine_tuning")
    ]
    known = stats.ttest_rel(*means)
    (one,) = found.each
    assert one.finding.estimate is not None
    assert one.finding.estimate.interval() == pytest.approx(tuple(known.confidence_interval(0.95)))
    assert (one.p, one.finding.estimate.n) == pytest.approx((known.pvalue, 3))
    assert not found.single
    page = grids(pages.section(contents, [found])[0].parts[0].blocks)[0]
    facts = {line.entries[0].text: line.entries[1].text for line in page.lines}
    assert facts["repetitions"].startswith("3 pipelines, each with a further pre-training")
    assert "The baseline has no stage 1" in facts["said beforehand"]


# --- labels, and what to do


def curve(root: Path, gains: Mapping[str, float]) -> Contents:
    """Figure 3, with so many points for self-distillation over fine-tuning."""
    made = sweep_of(root, list(gains), Asked("figure3", tuple(gains), (), 3))
    run_all(made)
    noise, base = [0.1, -0.1, 0.05], [40.0, 41.0, 40.5]
    for name, gain in gains.items():
        noise = noise[1:] + noise[:1]  # or all seeds would have one slope
        ours = [b + gain + e for b, e in zip(base, noise, strict=True)]
        figures = {"fine_tuning": base, "further_pretraining": [b + 0.1 for b in base]}
        for method, values in (figures | {"self_distillation": ours}).items():
            write(made, f"{name}/{method}", [{"score": v} for v in values])
    return report_sweep.read(made.root)


def test_gains_over_labels_and_the_advice(tmp_path: Path) -> None:
    gains = {"cifar100_1000": 6.0, "cifar100_5000": 3.0, "cifar100": 0.0}
    contents = curve(tmp_path, gains)
    found = {one.claim.name: one for one in verdict.every(contents)}["few_labels"]
    means = [one.finding.estimate for one in found.each]
    known = stats.linregress(np.log10([1000, 5000, 47500]), list(gains.values())).slope
    assert [m.mean for m in means if m] == pytest.approx([known], abs=1e-6)
    assert found.word == "supported"
    told = answers.advice(contents, "image")
    assert told[0].startswith("Take self-distillation: it beats plain fine-tuning, and takes ")
    assert "1,000 labelled pictures, 2.0 times as many" in told[1]
    assert answers.advice(contents, "text")[0].startswith("Not run")


def test_where_nothing_is_gained_the_cheapest_is_the_advice(tmp_path: Path) -> None:
    told = answers.advice(curve(tmp_path, {"cifar100_5000": 0.0}), "image")
    assert told[0].startswith("Take fine-tuning, and stop there")
    assert "That is far off" in told[1]


# --- claims of one's own


def test_the_documents_claim_is_a_page(tmp_path: Path) -> None:
    (tmp_path / "my/claims").mkdir(parents=True)
    page = (ROOT / "docs" / "experiments.md").read_text()
    (text,) = re.findall(r"`my/claims/mars\.toml`:\n\n```toml\n(.*?)```", page, re.S)
    (tmp_path / "my/claims/mars.toml").write_text(text)
    asked = [Asked("table1", ("xray",), (), 3)]
    root = pack(tmp_path / "shards", "xray")
    made = Sweep(tmp_path / "sweep", "small", root, tmp_path / "my", asked)
    made.save()
    run_all(made)
    *others, last = verdict.every(report_sweep.read(made.root))
    assert last.claim.title == "MARS is no worse than plain fine-tuning"
    assert last.ran
    assert len(others) == 16


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('expect = "higher"', "tests.0.expect"),
        ("weights = { mars = 1 }", "give one of a"),
        ('b = ""', "mars is compared with nothing"),
        ("matters = 0", "tests.0.matters"),
    ],
)
def test_a_wrong_claim_names_its_file(tmp_path: Path, line: str, told: str) -> None:
    lines = {"says": '"x"', "expect": '"above"', "matters": "1", "a": '"mars"', "b": '"r3f"'}
    key, _, value = line.partition(" = ")
    lines[key] = value
    (tmp_path / "claims").mkdir()
    body = "\n".join(f"{k} = {v}" for k, v in lines.items())
    (tmp_path / "claims/mine.toml").write_text(
        f'title = "x"\npaper = "x"\ntables = ["table1"]\n[[tests]]\n{body}\n'
    )
    with pytest.raises(UserError, match=r"mine\.toml") as error:
        Specs(tmp_path).load(Claim, "mine")
    assert told in str(error.value)
