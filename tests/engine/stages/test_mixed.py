"""--data target,general:0.4: stages 1 and 2 draw from both, on any ranks; fine-tuning from one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from selfdistill.data import pack
from selfdistill.data.loading.mixture import Mixture
from selfdistill.data.shards.manifest import Manifest
from tests.kit.launches import make_images, make_world, metrics, run_cases, samples

pytestmark = pytest.mark.multi


def test_two_sets(tmp_path: Path) -> None:
    root = make_world(tmp_path)
    make_images(root / "more", train=10)
    pack.pack(str(root / "more"), str(root / "general"))
    case = {
        "stage": "all",
        "data": f"{root}/shards,{root}/general:0.4",
        "model": str(root / "base"),
        "pretrain.steps": 12,
        "distill.steps": 6,
        "save_every": 5,
        "keep": 9,
        "log_samples": True,
        "teacher.mode": "cached",
        "output": str(root / "runs" / "one"),
    }
    printed = run_cases(root / "first", [case], ranks=1)
    target, general = (
        Manifest.load_split(str(root / name), "train") for name in ("shards", "general")
    )
    config = json.loads((root / "runs/one/pretrain/result.json").read_text())["record"]
    order = Mixture(
        np.concatenate([target.counts, general.counts]),
        config["seed"],
        sizes=[len(target.shards), len(general.shards)],
        shares=[0.6, 0.4],
    )
    found = samples(root / "runs/one/pretrain")
    batch = len(found[1])
    for step, ids in found.items():
        assert ids == sorted(order.ids(order.batch(step - 1, batch)).tolist())
    every = np.array(list(found.values()))
    assert 0.2 < (every >= target.samples).mean() < 0.6
    tuned = samples(root / "runs/one/finetune")
    assert max(max(ids) for ids in tuned.values()) < target.samples
    assert "finetune: test" in printed

    # Two ranks go on where one left, with the same samples.
    stage = root / "runs/two/pretrain"
    shutil.copytree(root / "runs/one/pretrain", stage)
    (stage / "result.json").unlink()
    for later in ("step-00000010", "step-00000012"):
        shutil.rmtree(stage / "checkpoints" / later)
    two = case | {"stage": "pretrain", "output": str(root / "runs/two")}
    other = case | {
        "data": f"{root}/shards,{root}/general:0.3",
        "stage": "pretrain",
        "output": str(root / "runs/one"),
        "expect_error": "other data",
    }
    big = two | {
        "data": f"{root}/shards",
        "data.mix": f"{root}/big:0.5",
        "output": str(root / "runs/three"),
        "expect_error": "pack both in the same way",
    }
    # An epoch is one of the target, and what is mixed in comes on top.
    whole = {"pretrain.steps": None, "pretrain.epochs": 1, "output": str(root / "runs/four")}
    pack.pack(str(root / "more"), str(root / "big"), size=32)
    printed = run_cases(root / "second", [two, other, big, case | {"stage": "pretrain"} | whole])
    done = json.loads((root / "runs/four/pretrain/result.json").read_text())
    assert done["record"]["pretrain.steps"] == done["steps"]
    assert "resumed at step 5 of 12, saved by 1 ranks" in printed
    assert samples(stage) == found
    for a, b in zip(metrics(stage), metrics(root / "runs/one/pretrain"), strict=True):
        assert a["loss/mae"] == pytest.approx(b["loss/mae"], rel=1e-4)
