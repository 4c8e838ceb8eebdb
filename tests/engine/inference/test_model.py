"""A loaded model says what fine-tuning's evaluation scored, to the last digit."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional as F

from selfdistill.data.loading.loader import Sequential
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import open_run
from selfdistill.engine.config import options as configuration
from selfdistill.engine.inference.model import load
from selfdistill.engine.run import run_stages
from selfdistill.engine.runtime.distributed import Ranks
from tests.kit import texts as text_kit
from tests.kit.launches import COMMON, make_world

#: Samples that evaluation scores together on one processor: four training batches.
SCORED = 4 * int(str(COMMON["finetune.batch"]))


def trained(ranks: Ranks, **options: Any) -> Path:
    """A run, made in this process."""
    run = open_run(configuration.load(COMMON | {"stage": "finetune"} | options), ranks)
    try:
        run_stages(run)
    finally:
        run.close()
    return run.folder


def scored(path: str | Path, data: Path) -> tuple[float, float]:
    """Accuracy and mean loss of a loaded model on the packed test split."""
    model = load(path)
    manifest = Manifest.load_split(str(data), "test")
    losses, right = 0.0, 0
    for batch in Sequential(manifest, batch=SCORED, codec=model.codec_of(manifest)):
        logits, valid = model.forward(batch)["logits"], batch["valid"]
        labels = batch["labels"].clamp(min=0)
        each = F.cross_entropy(logits, labels, reduction="none").double()
        losses += float(each[valid].sum())
        right += int((logits.argmax(1) == labels)[valid].sum())
    return right / manifest.samples, losses / manifest.samples


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("images"), other=15)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    text_kit.make_texts(root / "shards", other=24)
    for kind in ("roberta", "bert", "modernbert"):
        text_kit.make_language(root / kind, kind=kind)
    return root


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        *(("images", "cls"), ("images", "mean")),
        *(("roberta", "cls"), ("bert", "mean"), ("modernbert", "mean")),
    ],
)
def test_scores_are_those_of_the_run(
    kind: str, pool: str, images: Path, texts: Path, tmp_path: Path, ranks: Ranks
) -> None:
    data = images if kind == "images" else texts
    base = images / "base" if kind == "images" else texts / kind
    options = {"finetune.pool": pool, "data.path": str(data / "shards"), "model.path": str(base)}
    more = {"finetune.start": "model", "finetune.steps": 6, "finetune.lr": 5e-3}
    run = trained(ranks, output=str(tmp_path / "run"), **options, **more)
    stage = run / "finetune-model"
    result = json.loads((stage / "result.json").read_text())["metrics"]
    for place in (run, stage, stage / "export"):
        accuracy, loss = scored(place, data / "shards")
        assert accuracy == result["test_accuracy"]
        assert loss == result["test_loss"]
    assert load(run).pool == pool
    assert load(run).classes == Manifest.load_split(str(data / "shards"), "test").classes
