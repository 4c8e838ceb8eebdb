"""Whole runs with activation checkpointing: the bits of runs without, on two ranks, ZeRO 0 to 3."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import texts as text_kit
from tests.kit.launches import make_world, metrics, run_cases
from tests.kit.plain_loop import RATE, ZERO3

pytestmark = pytest.mark.multi

CASES = [("image", zero) for zero in ("zero0", "zero1", "zero2", "zero3")]
CASES += [("text", "zero3")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("recomputed"))
    text_kit.make_texts(root / "texts")
    text_kit.make_language(root / "language")
    (root / "zero3.json").write_text(ZERO3)
    cases = []
    for kind, zero in CASES:
        for recomputed in (False, True):
            steps = {f"{stage}.steps": 2 for stage in ("pretrain", "distill", "finetune")}
            rates = {f"{stage}.lr": RATE for stage in ("pretrain", "distill", "finetune")}
            cases.append(
                steps
                | rates
                | {
                    "data": str(root / ("shards" if kind == "image" else "texts")),
                    "model": str(root / ("base" if kind == "image" else "language")),
                    "mlm.dropout": 0.2,
                    "finetune.dropout": 0.2,
                    "finetune.warmup": 0,
                    "finetune.drop_path": 0.3 if kind == "image" else 0.0,
                    "finetune.test": False,
                    "finetune.train_scored": 0,
                    "text.bucket": 8,
                    "teacher.mode": "sharded" if zero == "zero3" else "replicated",
                    "zero": str(root / "zero3.json") if zero == "zero3" else zero,
                    "checkpoint_activations": recomputed,
                    "output": str(root / "runs" / f"{kind}-{zero}-{recomputed}"),
                }
            )
    text_kit.make_language(root / "mpnet", kind="mpnet")
    refused = {"model": str(root / "mpnet"), "output": str(root / "runs" / "mpnet")}
    cases.append(cases[-1] | refused | {"expect_error": "transformers cannot for MPNet"})
    run_cases(root, cases)
    return root


@pytest.mark.parametrize(("kind", "zero"), CASES)
def test_losses_and_weights_are_the_same_bits(root: Path, kind: str, zero: str) -> None:
    for stage in ("pretrain", "distill-1", "finetune"):
        one, other = (root / "runs" / f"{kind}-{zero}-{on}" / stage for on in (False, True))
        losses = [[line.get("loss/loss") for line in metrics(folder)] for folder in (one, other)]
        assert losses[0] == losses[1]
        assert len(losses[0]) >= 2
        before, after = (load_file(f / "export" / "model.safetensors") for f in (one, other))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before), stage
