"""Memory of stages that train a part of the encoder."""

from typing import Any

import pytest
import torch

from selfdistill.engine.config.schema import Config
from selfdistill.engine.models import adapters
from selfdistill.engine.models.images.vit_mae import ViTMAE
from selfdistill.engine.models.texts.language import MaskedLanguageModel, with_dropout
from selfdistill.engine.monitoring.flops import Part
from selfdistill.engine.runtime import zero
from selfdistill.launcher.plan import memory
from selfdistill.launcher.plan.activations import (
    CLS_ROW,
    Blocks,
    masked_images,
    whole_images,
    whole_texts,
)
from selfdistill.launcher.plan.tables import need
from tests.kit.texts import config_of
from tests.launcher.plan.test_plan import SHAPE, made, saved

RECIPES = ("vit_base", "roberta_base")


@pytest.mark.parametrize("adapt", ["attention", "lora"])
def test_adapted_stages_train_a_part(adapt: str) -> None:
    """By hand: ViT-B's encoder and RoBERTa-base's, of 12 layers, 768 and 3,072 wide."""
    width, mlp, rank = 768, 3072, 16
    whole, attention = made(recipe="vit_base").work, 4 * (width**2 + width)
    factors = rank * (2 * width + 2 * (width + mlp))
    image = factors + rank * 4 * width if adapt == "lora" else attention  # qkv is one layer
    text = factors + rank * 6 * width if adapt == "lora" else attention
    plans = {name: made({"tokens": 100}, recipe=name, adapt=adapt) for name in RECIPES}
    decoder = whole.parameters("pretrain", 0).all - whole.teacher() - 197 * 512
    # The MLM head: a dense layer, LayerNorm, a bias each; its matrix is the encoder's embedding.
    head = width**2 + 3 * width + 50_265
    for name, expected in (("vit_base", 12 * image + decoder), ("roberta_base", 12 * text + head)):
        found, full = plans[name], made({"tokens": 100}, recipe=name).work
        for job in found.jobs:
            counted = found.work.parameters(job.stage, 7)
            usual = full.parameters(job.stage, 7)
            if job.stage == "finetune":
                assert counted == usual
                continue
            assert counted.trained == expected, name
            more = 12 * (image if name == "vit_base" else text) if adapt == "lora" else 0
            assert counted.all == usual.all + more
            asked = memory.need(zero.read("zero1"), counted, size=4, world=8)
            assert asked.optimizer == 12 * expected / 8
    assert plans["vit_base"].work.teacher() == whole.teacher()


def test_a_shared_teacher_is_its_updates() -> None:
    """ViT-B at rank 16 by hand: 2.4M values, in place of 86M; ZeRO 3 has a copy."""
    found = made(recipe="vit_base", adapt="lora", teacher__mode="replicated", precision="fp32")
    (job,) = (job for job in found.jobs if job.stage == "distill")
    teachers = [need(found, job, zero.read(f"zero{n}")).teacher for n in range(4)]
    updates = 12 * 16 * (768 + 2304 + 2 * 768 + 2 * (768 + 3072))
    assert teachers == [4 * updates] * 3 + [4 * found.work.teacher()]


@pytest.mark.parametrize("adapt", ["attention", "lora"])
def test_activations(adapt: Any) -> None:
    """What autograd's hooks see; the frozen start of the encoder keeps a little less."""
    config, part = Config.model_validate({"adapt": adapt, "lora": {"rank": 8}}), Part(adapt, 8)
    images, noise = torch.randn(4, 3, 64, 64), torch.rand(4, SHAPE.patches)
    mae = ViTMAE(SHAPE)
    whole = saved(mae, lambda: mae(images, noise), torch.float32)
    adapters.adapt(mae.encoder, config)
    found = saved(mae, lambda: mae(images, noise), torch.float32)
    assert (found < 0.95 * whole) == (adapt == "attention")
    assert 1 <= 4 * masked_images(SHAPE, 4, part) / found < 1.12
    for cls_only in (False, True):
        call = lambda cls_only=cls_only: mae.encoder(images, cls_only=cls_only).sum()  # noqa: E731
        found = saved(mae.encoder, call, torch.float32)
        estimate = 4 * whole_images(SHAPE, 4, cls_only=cls_only, part=part)
        assert 1 <= estimate / found < 1.05
    language = MaskedLanguageModel(with_dropout(config_of("roberta", 300), 0.0))
    language.network.set_attn_implementation("sdpa")
    adapters.adapt(language.encoder, config)
    ids, blocks = torch.randint(5, 300, (4, 40)), Blocks(2, 24, 48, 2, part, 6)
    for cls_only, cut in ((False, None), (True, CLS_ROW)):
        view = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "cls_only": cls_only}
        found = saved(language, lambda view=view: language.encode(**view)[0].sum(), torch.float32)
        assert 0.97 <= 4 * whole_texts(blocks, 40, 4, cut=cut) / found < 1.1
