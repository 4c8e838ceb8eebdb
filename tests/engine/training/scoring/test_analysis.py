"""What every fine-tuning is looked at by, against transformers' own models on the packed images."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import ViTForImageClassification, ViTMAEForPreTraining

from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.objectives import ClassifyObjective
from selfdistill.engine.training.scoring.analysis import Features, spread
from tests.kit.launches import make_base, make_world, metrics, run_cases

pytestmark = pytest.mark.multi

ZERO3 = '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
CLASSES = ("blue", "green", "red")


def result(root: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "runs" / stage / "result.json").read_text())
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("analysis"))
    (root / "zero3.json").write_text(ZERO3)
    make_base(root / "wide", width=32)
    make_base(root / "deep", depth=3)
    base = {"data": str(root / "shards"), "model": str(root / "base"), "finetune.lr": 1e-3}
    tune = {**base, "stage": "finetune", "finetune.start": "model"}

    def case(name: str, **more: object) -> dict[str, object]:
        return {**tune, "output": str(root / "runs" / name), **more}

    others = {
        name: {"finetune.start": "auto", "finetune.weights": str(root / name)}
        for name in ("wide", "deep")
    }
    printed = run_cases(
        root / "cases",
        [
            *(case(name, **more) for name, more in others.items()),
            case("zero3", zero=str(root / "zero3.json")),
            case("bf16", zero="zero2", precision="bf16"),
            case(
                "search",
                **{"finetune.test": False, "finetune.train_scored": 7, "finetune.seeds": 2},
            ),
            # What is there was made without test scores: that is told, not passed over.
            case("search", **{"finetune.seeds": 2, "finetune.train_scored": 7})
            | {"expect_error": "finetune.test = False, now it is True"},
            case("search", **{"finetune.start": "distill-3"})
            | {"expect_error": "run --stage pretrain and --stage distill --rounds 3 first"},
        ],
    )
    assert printed.count("another architecture than --model") == len(others)
    return root


def pictures(root: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images and labels, as they were before packing."""
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        for file in sorted((root / "images" / split / name).glob("*.png")):
            images.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
            labels.append(label)
    return (torch.stack(images).float() / 255 - MEAN) / STD, torch.tensor(labels)


def oracle(root: Path, export: Path, start: str = "base") -> dict[str, Any]:
    """The figures from the exported classifier and the base, in transformers."""
    tuned = ViTForImageClassification.from_pretrained(export).eval()
    base = ViTMAEForPreTraining.from_pretrained(root / start).vit.eval()
    base.config.mask_ratio = 0.0
    found: dict[str, Any] = {"per_class_accuracy": {}}
    with torch.no_grad():
        for split in ("train", "val", "test"):
            images, labels = pictures(root, split)
            logits = tuned(images).logits
            found[f"{split}_loss"] = float(F.cross_entropy(logits, labels))
            right = logits.argmax(-1) == labels
            found["per_class_accuracy"][split] = {
                name: float(right[labels == i].float().mean()) for i, name in enumerate(CLASSES)
            }
            if split == "train":
                found["train_accuracy"] = float(right.float().mean())
        after = tuned.vit(images).last_hidden_state[:, 0]
        order = torch.arange(16).float().expand(len(images), -1)
        before = base(images, noise=order).last_hidden_state[:, 0]
    found["gap"] = found["test_loss"] - found["train_loss"]
    found["feature_drift"] = float((after - before).pow(2).sum(-1).mean())
    found["feature_cosine"] = float(F.cosine_similarity(after, before).mean())
    weights = [
        {k.split(".", 1)[1]: v.double() for k, v in load_file(f / "model.safetensors").items()}
        for f in (root / start, export)
    ]
    shared = [k for k in weights[0] if k in weights[1] and "decoder" not in k]
    shared = [k for k in shared if k.startswith(("embeddings", "encoder", "layern"))]
    moved = sum(float((weights[0][k] - weights[1][k]).pow(2).sum()) for k in shared)
    found["distance_from_init"] = math.sqrt(moved)
    return found


def test_every_figure_under_zero3_on_two_ranks(root: Path) -> None:
    stage = root / "runs" / "zero3" / "finetune-model"
    found, wanted = result(root, "zero3/finetune-model")["analysis"], oracle(root, stage / "export")
    assert found["per_class_accuracy"] == wanted.pop("per_class_accuracy")
    assert set(found) == {*wanted, "per_class_accuracy"}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found["distance_from_init"] > 1e-2
    last = metrics(stage)[-1]
    assert {k for k in last if k.startswith("analysis/")} == {f"analysis/{k}" for k in wanted}
    assert last["step"] == 5
    assert last["analysis/gap"] == found["gap"]


@pytest.mark.parametrize("name", ["wide", "deep"])
def test_weights_of_another_architecture_are_their_own_start(root: Path, name: str) -> None:
    """--model, which a recipe may name, is none of theirs: no distance from it means anything."""
    stage = root / "runs" / name / "finetune"
    found, wanted = (
        result(root, f"{name}/finetune")["analysis"],
        oracle(root, stage / "export", name),
    )
    for figure in ("distance_from_init", "feature_drift", "feature_cosine"):
        assert found[figure] == pytest.approx(wanted[figure], rel=1e-4), figure
    last = [line for line in metrics(stage) if "feature/distance_from_init" in line][-1]
    assert last["feature/distance_from_init"] == pytest.approx(
        found["distance_from_init"], rel=1e-3
    )


def test_distance_is_of_the_master_weights(root: Path) -> None:
    """bf16 weights move by whole steps of 2^-8 or not at all: the masters are what moved."""
    stage = root / "runs" / "bf16" / "finetune-model"
    found, wanted = result(root, "bf16/finetune-model")["analysis"], oracle(root, stage / "export")
    name = "distance_from_init"
    assert found[name] == pytest.approx(wanted[name], rel=1e-6)
    assert found["feature_drift"] == pytest.approx(wanted["feature_drift"], rel=0.2)


def test_a_search_leaves_the_test_split_alone(root: Path) -> None:
    both = result(root, "search/finetune-model")
    each = [result(root, f"search/finetune-model/seed-{seed}") for seed in (0, 1)]
    assert set(both["metrics"]) == set(each[0]["metrics"])
    for one in each:
        assert not any("test" in k for k in (*one["metrics"], *one["analysis"]))
        analysis = one["analysis"]
        assert analysis["val_gap"] == analysis["val_loss"] - analysis["train_loss"]
        assert analysis["val_loss"] == one["metrics"]["val_loss"]
        assert set(analysis["per_class_accuracy"]) == {"train", "val"}
        assert analysis["train_accuracy"] * 7 == pytest.approx(
            round(analysis["train_accuracy"] * 7)
        )
    for name in ("val_gap", "distance_from_init", "feature_drift", "train_loss"):
        values = [one["analysis"][name] for one in each]
        assert both["analysis"][name] == pytest.approx(np.mean(values), rel=1e-12)
        assert both["analysis_std"][name] == pytest.approx(np.std(values, ddof=1), rel=1e-9)
    lines = metrics(root / "runs" / "search" / "finetune-model" / "seed-0")
    assert not any("test/" in tag for line in lines for tag in line)


@pytest.mark.parametrize(("samples", "most"), [(101, 77), (101, 7), (10**6, 10_000), (9, 1)])
def test_spread_samples_do_not_depend_on_the_ranks(samples: int, most: int) -> None:
    def ids(world: int, batch: int) -> tuple[list[int], set[int]]:
        every, batches = set(), set()
        for rank in range(world):
            spans = spread(samples, most, Ranks(rank, rank, world, torch.device("cpu")), batch)
            assert spans is not None
            every |= {i for a, b in spans for i in range(a, b)}
            batches.add(sum(-(-(b - a) // batch) for a, b in spans))
        assert len(batches) == 1  # ranks wait for each other in every batch
        return sorted(every), batches

    wanted, _ = ids(1, 16)
    assert most - min(most, 40) < len(wanted) <= most
    assert wanted[0] == 0
    assert wanted[-1] >= samples * (1 - 1 / min(most, 40)) - 1
    for world, batch in ((2, 16), (3, 4), (7, 1)):
        assert ids(world, batch)[0] == wanted


class Tiny(nn.Module):
    """A classifier of an encoder's first token."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def classify(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.encoder(tokens)[:, 0])
        return found


@torch.no_grad()
def test_a_step_that_was_compiled_before_is_looked_into() -> None:
    """Dynamo looks at no hooks when it takes a compiled step again: train was scored before."""
    objective: Any = ClassifyObjective(Tiny())
    batch = {"labels": torch.zeros(2, dtype=torch.int64), "tokens": torch.randn(2, 5, 4)}
    objective.compile(backend="eager")
    scored = objective(**batch)["logits"]
    compiled = objective._compiled_call_impl
    assert compiled is not None
    run: Any = SimpleNamespace(
        ranks=SimpleNamespace(device=torch.device("cpu")), dtype=torch.float32
    )
    modality: Any = SimpleNamespace(encoder=lambda _: nn.Identity())
    manifest: Any = SimpleNamespace(samples=2)
    features = Features(run, modality, None, objective, manifest)
    again = objective(**batch)["logits"]
    assert features.tokens is not None
    assert torch.equal(features.tokens, objective.model.encoder(batch["tokens"]))
    assert torch.equal(again, scored)
    features.close()
    assert objective._compiled_call_impl is compiled
    features.tokens = None
    objective(**batch)
    assert features.tokens is None
