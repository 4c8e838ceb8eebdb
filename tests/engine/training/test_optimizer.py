"""Learning rates and parameter groups against transformers' and timm's."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.folder import _check_complete
from selfdistill.engine.checkpoints.state import BEFORE
from selfdistill.engine.config.stages import DistillSection, FinetuneSection, PretrainSection
from selfdistill.engine.models.images.networks import ImageClassifier, Normalize
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder
from selfdistill.engine.models.texts.classifier import TextClassifier
from selfdistill.engine.models.texts.language import HEADS
from selfdistill.engine.training import optimizer as optim
from tests.kit.texts import config_of

PLAIN = Normalize((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(("told", "warmup"), [(0, 0), (7, 7), (0.175, 7)])
def test_schedules_are_those_of_transformers(told: float, warmup: int) -> None:
    theirs = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    for schedule, make in theirs.items():
        plan = FinetuneSection(lr=3e-4, warmup=told, schedule=schedule)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=plan.lr)
        scheduler = make(optimizer, warmup, 40)
        for step in range(41):
            ours = optim.learning_rate(step, 40, plan)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
            optimizer.step()
            scheduler.step()


def test_a_warmup_in_steps_stays_a_whole_number() -> None:
    """Records of runs that began before hold one."""
    for plan in (FinetuneSection(warmup=7), FinetuneSection(warmup=7.0), FinetuneSection()):
        assert isinstance(plan.model_dump()["warmup"], int)
    with pytest.raises(ValueError, match="whole steps, or a share below 1"):
        FinetuneSection(warmup=7.5)


def test_records_of_before_there_was_an_option_are_equal() -> None:
    sections = {"pretrain": PretrainSection, "distill": DistillSection, "finetune": FinetuneSection}
    for stage, section in sections.items():
        now = {f"{stage}.{k}": v for k, v in section(steps=5).model_dump().items()}
        then = {k: v for k, v in now.items() if k not in BEFORE}
        assert {f"{stage}.keep", f"{stage}.patience"} <= now.keys() - then.keys()
        _check_complete(Path("x"), {"record": then, "manifest": "m"}, now, "m")
    with pytest.raises(UserError, match=r"finetune.schedule = linear, now it is cosine"):
        _check_complete(
            Path("x"),
            {"record": then, "manifest": "m"},
            now | {"finetune.schedule": "cosine"},
            "m",
        )


class Objective(torch.nn.Module):
    """What holds a classifier, as a stage's objective does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def scale_of(module: torch.nn.Module, decay: float) -> dict[str, float]:
    """Name -> factor of the rate, from the groups."""
    groups = optim.parameter_groups(module, "finetune", FinetuneSection(layer_decay=decay))
    found = {p: group["lr_scale"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(found)
    return {name: found[p] for name, p in module.named_parameters()}


def test_layer_decay_of_images_is_timms() -> None:
    shape = Shape(32, 8, 24, 5, 2, 48, layer_scale=True, registers=2)
    ours = scale_of(Objective(ImageClassifier(ViTClassifier(ViTEncoder(shape), 3), PLAIN)), 0.7)
    theirs = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=5, num_heads=2, num_classes=3,
        init_values=1.0, reg_tokens=2,
    )  # fmt: skip
    groups = param_groups_layer_decay(theirs, layer_decay=0.7)
    scales = {p: group["lr_scale"] for group in groups for p in group["params"]}
    expected = {name: scales[p] for name, p in theirs.named_parameters()}
    assert len(set(expected.values())) == 7
    names = {name.split("network.")[1].removeprefix("encoder."): v for name, v in ours.items()}
    assert names == pytest.approx(expected)


def test_a_norm_before_the_first_layer_learns_as_the_embeddings() -> None:
    """CLIP's."""
    shape = Shape(32, 8, 24, 2, 2, 48, pre_norm=True)
    found = scale_of(Objective(ImageClassifier(ViTClassifier(ViTEncoder(shape), 3), PLAIN)), 0.5)
    (before,) = {scale for name, scale in found.items() if "norm_pre" in name}
    (embedded,) = {scale for name, scale in found.items() if "patch_embed" in name}
    assert before == embedded == 0.125


@pytest.mark.parametrize("kind", sorted(HEADS))
def test_layer_decay_of_texts(kind: str) -> None:
    config = config_of(kind, 50)
    config.num_labels = 3
    found = scale_of(Objective(TextClassifier(config)), 0.5)
    for name, scale in found.items():
        number = re.search(r"\.layers?\.(\d+)\.", name)
        if number:
            expected = 0.5 ** (2 - int(number[1]))
        elif "embed" in name or "relative_attention_bias" in name or "encoder.LayerNorm" in name:
            expected = 0.125
        elif "norm" in name.lower() and "head" not in name:
            expected = 0.5  # behind the last layer
        else:
            expected = 1.0
        assert scale == expected, name
    assert set(found.values()) == {0.125, 0.25, 0.5, 1.0}


def test_without_layer_decay_there_are_two_groups() -> None:
    shape = Shape(32, 8, 24, 2, 2, 48)
    module = Objective(ImageClassifier(ViTClassifier(ViTEncoder(shape), 3), PLAIN))
    groups = optim.parameter_groups(module, "finetune", FinetuneSection())
    assert [group.keys() for group in groups] == [{"params", "weight_decay"}] * 2


def test_a_group_learns_at_its_own_rate() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr_scale": s} for s in (0.5, 1.0)]
    groups.append({"params": [torch.nn.Parameter(torch.ones(1))]})
    optimizer = torch.optim.AdamW(groups)
    optim.set_learning_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.2]
