"""Every stage against a plain PyTorch loop over transformers' own models, on equal batches."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import ViTForImageClassification, ViTMAEForPreTraining

from selfdistill.data import pack
from selfdistill.data.loading.loader import Loader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.training.views import Flips, MaskNoise
from tests.kit.launches import make_base, make_images
from tests.kit.plain_loop import (
    BATCH,
    CASES,
    STEPS,
    adamw,
    check_teacher_modes,
    finetuning_rates,
    is_bias_or_1d,
    largest_difference,
    run_every_case,
)

pytestmark = pytest.mark.multi

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage under 2 real ranks x ZeRO 0-3 x accumulation 1 and 2, in one process group."""
    root = tmp_path_factory.mktemp("parity")
    make_images(root / "images")
    pack.pack(str(root / "images"), str(root / "shards"))
    make_base(root / "base")
    run_every_case(root, {})
    return root


def batches(root: Path, keyed: object) -> Iterator[dict[str, torch.Tensor]]:
    loader = Loader(
        Manifest.load_split(str(root / "shards"), "train"), batch=BATCH, seed=0, keyed=keyed
    )
    for batch, _ in zip(loader, range(STEPS), strict=False):
        batch["pixels"] = (batch["images"].float() / 255 - MEAN) / STD
        yield batch


def oracle_mae(root: Path, *, teacher: Path | None) -> dict[str, torch.Tensor]:
    model = ViTMAEForPreTraining.from_pretrained(root / "base").train()
    # MAE's position embeddings are fixed; in transformers 5, loading weights sets them free.
    model.vit.embeddings.position_embeddings.requires_grad_(False)
    model.decoder.decoder_pos_embed.requires_grad_(False)
    frozen = None
    if teacher is not None:
        frozen = ViTMAEForPreTraining.from_pretrained(teacher).vit.eval()
        frozen.config.mask_ratio = 0.0
    optimizer = adamw(model, is_bias_or_1d, 1e-3, (0.9, 0.95))
    patches = (model.config.image_size // model.config.patch_size) ** 2
    in_order = torch.arange(patches).float()  # noise that keeps every patch where it is
    for step, batch in enumerate(batches(root, MaskNoise(0, patches))):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (STEPS - step) / STEPS
        loss = model(batch["pixels"], noise=batch["noise"]).loss
        if frozen is not None:
            model.config.mask_ratio = 0.0
            model.vit.embeddings.config.mask_ratio = 0.0
            noise = in_order.expand(BATCH, -1)
            student = model.vit(batch["pixels"], noise=noise).last_hidden_state[:, 0]
            with torch.no_grad():
                target = frozen(batch["pixels"], noise=noise).last_hidden_state[:, 0]
            model.config.mask_ratio = 0.75
            loss = loss + 0.5 * (student - target).pow(2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def fresh_classifier(root: Path, start: Path) -> ViTForImageClassification:
    """transformers' classifier on given weights; the fresh head is ours, being random."""
    from selfdistill.engine.checkpoints.folder import Run
    from selfdistill.engine.config.schema import Config
    from selfdistill.engine.models.images.weights import load_pretrained
    from selfdistill.engine.runtime.distributed import Ranks
    from selfdistill.engine.training.modalities.image import ImageModality

    model = ViTForImageClassification.from_pretrained(
        start, num_labels=3, ignore_mismatched_sizes=True, hidden_dropout_prob=0.0
    ).train()
    config = Config()
    config.finetune.dropout = 0.0
    run = Run(config, Ranks(0, 0, 1, torch.device("cpu")), root)
    classes = ["a", "b", "c"]
    weights = load_pretrained(str(start))
    head = ImageModality(run).classifier(weights, classes, seed=0).network.head
    model.classifier.load_state_dict(head.state_dict())
    return model


def oracle_finetune(root: Path, start: Path) -> dict[str, torch.Tensor]:
    model = fresh_classifier(root, start)

    def decays(name: str, parameter: torch.Tensor) -> bool:
        return not name.endswith(("bias", "position_embeddings", "cls_token"))

    optimizer = adamw(model, decays, 1e-3, (0.9, 0.999))
    rates = finetuning_rates()
    for step, batch in enumerate(batches(root, Flips(0))):
        for group in optimizer.param_groups:
            group["lr"] = rates[step]
        mirrored = batch["pixels"].flip(-1)
        pixels = torch.where(batch["flip"].view(-1, 1, 1, 1), mirrored, batch["pixels"])
        logits = model(pixels).logits
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict()


def test_mae_stages_equal_the_plain_loop(runs: Path) -> None:
    base = ViTMAEForPreTraining.from_pretrained(runs / "base").state_dict()
    teacher = runs / "runs" / "zero0-1" / "pretrain" / "export"
    oracles = {
        "pretrain": oracle_mae(runs, teacher=None),
        "distill-1": oracle_mae(runs, teacher=teacher),
    }
    assert largest_difference(copy.deepcopy(base), oracles["pretrain"]) > 1e-3  # it did train
    assert largest_difference(oracles["pretrain"], oracles["distill-1"]) > 1e-4  # the term matters
    for stage, oracle in oracles.items():
        for case in CASES:
            export = runs / "runs" / case / stage / "export"
            ours = ViTMAEForPreTraining.from_pretrained(export).state_dict()
            assert largest_difference(ours, oracle) < 1e-5, (stage, case)


def test_finetuning_equals_the_plain_loop(runs: Path) -> None:
    for case in CASES:
        start = runs / "runs" / case / "distill-1" / "export"
        export = runs / "runs" / case / "finetune" / "export"
        oracle = oracle_finetune(runs, start)
        ours = ViTForImageClassification.from_pretrained(export).state_dict()
        assert largest_difference(ours, oracle) < 1e-5, case


def test_teacher_modes_agree(runs: Path) -> None:
    check_teacher_modes(runs, "loss/loss", "loss/mae", "loss/distill")
