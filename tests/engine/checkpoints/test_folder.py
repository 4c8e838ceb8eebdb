"""A run's folder: what is complete is taken for what it is, and nothing is lost silently."""

import json
import os
import signal
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from selfdistill.data.errors import TryAgain, UserError
from selfdistill.engine.checkpoints.folder import Run, _lock
from selfdistill.engine.runtime import preemption
from tests.kit.launches import make_base, make_world, run_cases

pytestmark = pytest.mark.multi


def test_a_complete_stage_is_skipped_only_if_it_is_the_same(tmp_path: Path) -> None:
    root = make_world(tmp_path)
    make_base(root / "other", seed=7)
    run = root / "runs" / "x"
    same = {
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "output": str(run),
        "stage": "all",
    }
    recipe = root / "recipe.toml"
    recipe.write_text('[model]\npath = "nobody/has-this-model"\n')
    no_model = {k: v for k, v in same.items() if k != "model"}
    printed = run_cases(
        root / "cases",
        [
            same,
            # Nothing that the figures depend on differs: all is skipped.
            same | {"zero": "zero1", "log_every": 2, "pretrain.accumulation": 2},
            # The run's own model comes before the recipe's.
            no_model | {"stage": "finetune", "recipe": str(recipe)},
            # All figures are kept: another one may be asked for later.
            no_model | {"stage": "finetune", "finetune.metric": "macro_f1"},
            same | {"pretrain.lr": 0.5, "expect_error": "made with pretrain.lr = 0.00015"},
            same | {"seed": 3, "expect_error": "made with seed = 0, now it is 3"},
            same | {"model": str(root / "other"), "expect_error": "another model"},
            same
            | {
                "stage": "distill",
                "model": str(root / "other"),
                "expect_error": "has other weights",
            },
            same
            | {"rounds": 2, "expect_error": "made from distill-1, now it would be from distill-2"},
            same | {"finetune.seeds": 2, "expect_error": "has 1 seed(s), now they are 2"},
            # Before the fine-tunings of a comparison that come before it.
            same
            | {"finetune.seeds": 2, "compare": True}
            | {"expect_error": "has 1 seed(s), now they are 2"},
            same
            | {"stage": "pretrain", "pretrain.warmup": 5, "overwrite": True}
            | {"expect_error": "pretrain.warmup 5: the stage has 5 steps"},
            same | {"stage": "pretrain", "kind": "text", "expect_error": "a recipe for texts"},
            # What is wrong is seen after --overwrite has taken the stage away: it is put back.
            *(
                same | {"stage": "pretrain", "overwrite": True} | wrong
                for wrong in (
                    {"pretrain.accumulation": 7, "expect_error": "cannot be cut evenly"},
                    {"zero": "zero9", "expect_error": "zero9"},
                    {"adapt": "lora", "lora.rank": 4000, "expect_error": "rank"},
                )
            ),
        ],
        ranks=1,
    )
    assert printed.count("complete, skipped") == 5
    assert {one.name for one in run.iterdir() if one.is_dir()} == {
        *(".pulse", "pretrain", "distill-1", "finetune"),
    }
    assert (run / "pretrain" / "export" / "model.safetensors").is_file()
    assert not list(run.glob(".*overwritten"))
    # The run's config.toml tells how each stage was made, whatever failed since.
    left = tomllib.loads((run / "config.toml").read_text())
    assert left["pretrain"]["lr"] == 1.5e-4
    assert left["model"]["path"] == str(root / "base")
    result = json.loads((run / "finetune" / "result.json").read_text())
    assert result["seconds"] > 0
    assert result["record"]["finetune.steps"] == 5
    assert result["metric"] == "macro_f1"
    assert "finetune: test_macro_f1 " in printed


def test_seeds_that_are_overwritten_leave_no_old_mean(tmp_path: Path) -> None:
    root = make_world(tmp_path)
    run = root / "runs" / "x" / "finetune-model"
    seeds = {
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "output": str(run.parent),
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.seeds": 2,
    }
    run_cases(
        root / "cases",
        [
            seeds,
            seeds | {"finetune.lr": 1e-3, "overwrite": True, "leave_at": "finetune-model/seed-1"},
            seeds | {"finetune.lr": 1e-3, "expect_error": "seed-1 is complete, made with finetune"},
        ],
        ranks=1,
    )
    lines = [json.loads((run / f"seed-{n}" / "result.json").read_text()) for n in (0, 1)]
    assert [one["record"]["finetune.lr"] == 1e-3 for one in lines] == [True, False]
    assert not (run / "result.json").exists()


def test_a_copy_that_a_worker_has_does_not_keep_the_lock(tmp_path: Path) -> None:
    held = _lock(tmp_path / ".lock", 0)
    copy = os.dup(held.fileno())  # what a fork leaves in a worker
    still = SimpleNamespace(stop=lambda: None)
    Run.close(cast(Any, SimpleNamespace(lock=held, watchdog=still)))
    _lock(tmp_path / ".lock", 0).close()
    os.close(copy)


def test_a_signal_while_the_folder_is_in_use_asks_to_be_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = _lock(tmp_path / ".lock", 0)
    with pytest.raises(UserError, match="in use") as met:
        _lock(tmp_path / ".lock", 0)
    assert not isinstance(met.value, TryAgain)
    monkeypatch.setattr(preemption, "_asked", [signal.SIGTERM])
    with pytest.raises(TryAgain, match="in use"):
        _lock(tmp_path / ".lock", 600)
    held.close()
