"""What files tell of an image encoder, and what they do not."""

from pathlib import Path

import torch
import transformers as hf

from selfdistill.engine.models.images.weights import load_pretrained
from tests.engine.models.test_types import SIZES
from tests.kit import models as kit


def test_heads_of_dinov3_follow_from_its_periods(tmp_path: Path) -> None:
    """ViT-H+ has 20 heads at a width at which MAE's has 16."""
    config = {"hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 8}
    model = hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**SIZES | config, num_register_tokens=1))
    kit.randomise(model)
    model.save_pretrained(tmp_path / "in")
    base = load_pretrained(str(tmp_path / "in"), 224)
    state = dict(base.encoder)
    state |= {"storage_tokens": state.pop("reg_token"), "rope_embed.periods": torch.ones(16)}
    torch.save(state, tmp_path / "x.pth")
    assert load_pretrained(str(tmp_path / "x.pth")).shape.heads == 20
