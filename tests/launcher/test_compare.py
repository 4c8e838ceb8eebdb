"""launcher.compare: several metrics, and in words what the differences are worth."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from selfdistill.data.errors import UserError
from selfdistill.launcher import compare

Said = Callable[..., str]


def result(run: Path, stage: str, *, n: int = 3, std: float = 0.01, **metrics: float) -> None:
    """As a summary of seeds has it, but for the figures of each."""
    (run / stage).mkdir(parents=True)
    found: dict[str, object] = {"metrics": metrics, "seconds": 9.0, "metric": "accuracy"}
    if n > 1:
        found |= {"n": n, "std": dict.fromkeys(metrics, std)}
    (run / stage / "result.json").write_text(json.dumps(found))


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    monkeypatch.setenv("COLUMNS", "200")

    def show(run: Path, metric: str | None = None) -> str:
        compare.show(run, metric)
        return capsys.readouterr().out

    return show


def test_what_differences_are_worth(tmp_path: Path, said: Said) -> None:
    result(tmp_path, "finetune-model", test_accuracy=0.63, test_loss=0.5)
    result(tmp_path, "finetune-pretrain", test_accuracy=0.925, test_loss=0.3)
    result(tmp_path, "finetune", test_accuracy=0.93, test_loss=0.25)
    text = said(tmp_path)
    assert (
        "test accuracy: self-distillation is 30.00 points above fine-tuning, more than the seeds'"
        " spread explains (p = 1e-05); self-distillation is 0.50 points above further pre-training:"
        " within the spread of the seeds, which is no difference (p = 1.00)"
    ) in text
    text = said(tmp_path, "test_loss, test_accuracy")
    assert "test loss, nats" in text
    assert "0.2500 ± 0.0100 (n = 3)" in text
    assert "93.00 ± 1.00 (n = 3)" in text
    assert "test loss: self-distillation is 0.2500 below fine-tuning, more" in text


def test_seeds_are_paired(tmp_path: Path) -> None:
    """The oracle is scipy's; three pairs of methods are as many comparisons."""
    figures = {
        "finetune-model": [0.61, 0.71, 0.65],
        "finetune-pretrain": [0.66, 0.76, 0.705],
        "finetune": [0.70, 0.80, 0.74],
    }
    for stage, each in figures.items():
        result(tmp_path, stage, test_accuracy=statistics.fmean(each))
        path = tmp_path / stage / "result.json"
        told = {"each": {"test_accuracy": each}, "seeds": [0, 1, 2]}
        path.write_text(json.dumps(json.loads(path.read_text()) | told))
    (line,) = compare.verdicts(compare.rows(tmp_path))
    p = 3 * stats.ttest_rel(figures["finetune"], figures["finetune-pretrain"]).pvalue
    assert f"above further pre-training, more than the seeds' spread explains (p = {p:.1g})" in line
    # 9 points above fine-tuning with every seed alike: a count over few samples, no certainty.
    assert "9.00 points above fine-tuning: within the spread of the seeds" in line


def test_chance_is_seldom_called_a_difference() -> None:
    draws = np.random.default_rng(0).normal(0.8, 0.02, (400, 3, 3))
    told = 0
    for each in draws:
        rows = [
            compare.Row("m", "test_accuracy", x.mean(), x.std(ddof=1), 3, 1.0, tuple(x), (0, 1, 2))
            for x in each
        ]
        told += "more than" in compare.verdicts(rows)[0]
    assert told <= 0.08 * len(draws)


def test_one_seed_and_equal_scores(tmp_path: Path, said: Said) -> None:
    result(tmp_path, "finetune-model", n=1, test_accuracy=0.5)
    result(tmp_path, "finetune-pretrain", n=1, test_accuracy=0.9)
    result(tmp_path, "finetune", n=1, test_accuracy=0.9)
    text = said(tmp_path)
    assert "is 40.00 points above fine-tuning, with one seed: that may be chance" in text
    assert "further pre-training and self-distillation are equal" in text


@pytest.mark.parametrize(("macro", "shown"), [(0.899, False), (0.6, True)])
def test_macro_f1_stands_beside_where_it_differs(
    macro: float, shown: bool, tmp_path: Path, said: Said
) -> None:
    result(tmp_path, "finetune", test_accuracy=0.9, test_macro_f1=macro)
    text = said(tmp_path)
    assert ("test macro F1, %" in text) is shown
    assert "above" not in text  # there is one method


def test_metrics_that_are_not_there(tmp_path: Path) -> None:
    result(tmp_path, "finetune", test_accuracy=0.9, test_macro_f1=0.9)
    with pytest.raises(UserError, match=r"has no 'test_acuracy'\. Did you mean test_accuracy"):
        compare.show(tmp_path, "test_macro_f1,test_acuracy")
    with pytest.raises(UserError, match="--metric is empty"):
        compare.show(tmp_path, " ,")
