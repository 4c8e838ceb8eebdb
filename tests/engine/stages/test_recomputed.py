"""Activation checkpointing: the same bits of less that is kept, by networks and in whole runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoTokenizer

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.options import load
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTMAE
from selfdistill.engine.models.images.weights import Pretrained
from selfdistill.engine.models.texts.language import HEADS, MaskedLanguageModel
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.runtime.precision import autocast
from selfdistill.engine.training.modalities.image import ImageModality
from tests.engine.models.texts.test_language import batch_of, kind_of
from tests.kit import texts as text_kit
from tests.kit.launches import make_world, metrics, run_cases
from tests.kit.plain_loop import RATE, ZERO3

#: transformers 5.23 cannot.
NEVER = {"mpnet"}

CASES = [("image", zero) for zero in ("zero0", "zero1", "zero2", "zero3")]
CASES += [("text", "zero3")]


def taken(model: Any, call: Any, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], int]:
    """Loss, gradients, and bytes that the forward saved, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    model.zero_grad()
    torch.manual_seed(7)
    with autocast(torch.device("cpu"), dtype), saved_tensors_hooks(pack, lambda t: t):
        loss = call()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss, gradients, sum(kept.values())


def same(kind: Any, model: Any, call: Any, dtype: torch.dtype = torch.float32) -> float:
    """Asserts that nothing changes; returns the share of bytes that are still kept."""
    model.train()
    loss, gradients, whole = taken(model, call, dtype)
    kind.recompute(model)
    again, others, less = taken(model, call, dtype)
    assert torch.equal(loss, again)
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)
    return less / whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_images(dtype: torch.dtype) -> None:
    shape = Shape(32, 4, 48, 6, 3, 192, 24, 3, 3, 96)
    base = Pretrained.fresh(ViTMAE(shape))
    options = {"finetune.dropout": 0.2, "finetune.drop_path": 0.3}
    kind = ImageModality(Run(load(options), Ranks(0, 0, 1, torch.device("cpu")), Path()))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    noise = torch.rand(3, shape.patches)
    mae = kind.autoencoder(base)
    assert same(kind, mae, lambda: mae.reconstruct(images, noise)["loss"], dtype) < 0.35
    classifier = kind.classifier(base, ["a", "b"], seed=0)
    call = lambda: classifier.classify(images).float().pow(2).sum()  # noqa: E731
    assert same(kind, classifier, call, dtype) < 0.2


@pytest.mark.parametrize("name", sorted(HEADS.keys() - NEVER))
def test_texts(name: str, tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / name, kind=name)
    kind = kind_of(folder, mlm__dropout=0.2, finetune__dropout=0.2)
    base = kind.load()
    batch = batch_of(AutoTokenizer.from_pretrained(folder), text_kit.SENTENCES)
    model = kind.autoencoder(base)

    def call() -> Tensor:
        tokens, _ = model.encode(**batch, cls_only=True)
        loss: Tensor = model.reconstruct(**batch, scale=torch.tensor(0.1))["loss"]
        return loss + tokens[:, 0].pow(2).sum()

    assert same(kind, model, call) < 0.8  # of two layers the last one is kept where it is cut
    classifier = kind.classifier(base, ["a", "b"], seed=0)
    assert same(kind, classifier, lambda: classifier.classify(**batch).pow(2).sum()) < 0.8


def test_what_transformers_cannot() -> None:
    for name in NEVER:
        model = MaskedLanguageModel(text_kit.config_of(name, 50))
        with pytest.raises(UserError, match="transformers cannot for MPNetForMaskedLM: leave it"):
            kind_of(Path("x")).recompute(model)


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


@pytest.mark.multi
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
