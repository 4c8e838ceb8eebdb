"""Stochastic depth against timm's own ViT: the same draws, and so the same tokens."""

from functools import partial
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.options import load
from selfdistill.engine.models.images.vit_mae import Shape, ViTEncoder, ViTMAE
from selfdistill.engine.models.images.weights import Pretrained
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.image import ImageModality
from selfdistill.engine.training.modalities.text import TextModality

SHAPE = Shape(32, 8, 48, 4, 3, 96, 32, 1, 2, 64)


def run_with(**options: object) -> Run:
    named = {name.replace("__", "."): value for name, value in options.items()}
    return Run(load(named), Ranks(0, 0, 1, torch.device("cpu")), Path())


def test_tokens_are_timms() -> None:
    base = Pretrained.fresh(ViTMAE(SHAPE))
    run = run_with(finetune__drop_path=0.5, finetune__dropout=0)
    ours = ImageModality(run).classifier(base, ["a", "b"], seed=0).network.encoder.train()
    theirs = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=4,
        num_heads=3,
        mlp_ratio=2,
        num_classes=0,
        drop_path_rate=0.5,
        norm_layer=partial(nn.LayerNorm, eps=SHAPE.norm_eps),
    ).train()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(16, 3, 32, 32)
    for cls_only in (False, True):
        torch.manual_seed(3)
        found = ours(images, cls_only=cls_only)
        torch.manual_seed(3)
        expected = theirs.forward_features(images)
        torch.testing.assert_close(found, expected[:, :1] if cls_only else expected)
    assert not torch.allclose(found, ours(images, cls_only=True))  # other paths
    whole = ViTEncoder(SHAPE)
    whole.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(images), whole(images))


def test_texts_have_none() -> None:
    with pytest.raises(UserError, match=r"--finetune.drop_path is for images"):
        # Its manifest is not looked at before.
        TextModality(run_with(finetune__drop_path=0.1), None)  # type: ignore[arg-type]
    TextModality(run_with(finetune__drop_path=0.1, stage="pretrain"), None)  # type: ignore[arg-type]
