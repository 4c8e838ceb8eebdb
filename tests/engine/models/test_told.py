"""What files tell of an image encoder, and what they do not."""

from pathlib import Path

import pytest
import timm
import torch
import transformers as hf
from timm.models import save_for_hf

from selfdistill.engine.checkpoints.export import export_mae
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN
from selfdistill.engine.models.images.vit_mae import MAEDecoder
from selfdistill.engine.models.images.weights import load_pretrained
from tests.engine.models.test_types import SIZES, TIMM, WIDE, made, ours
from tests.engine.models.test_unfit import modality
from tests.engine.models.test_weights import refusal
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


@pytest.mark.parametrize("name", ["siglip", "clip", "vit", "deit"])
@torch.no_grad()
def test_a_border_that_is_no_patch_is_left_out(tmp_path: Path, name: str) -> None:
    """As of SigLIP's so400m, of 384 pixels in patches of 14; transformers reads 378 of them."""
    config = WIDE | {"image_size": 35}
    model = {
        "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**config)),
        "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**config)),
        "vit": lambda: hf.ViTModel(hf.ViTConfig(**config), add_pooling_layer=False),
        "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**config), add_pooling_layer=False),
    }[name]()
    kit.randomise(model)
    model.eval().save_pretrained(tmp_path / "in")
    base = load_pretrained(str(tmp_path / "in"))
    assert base.shape.image_size == 32
    assert "35 pixels are no whole patches of 4: images are 32" in base.notes[0]
    images = torch.randn(2, 3, 35, 35)
    theirs = model(images).last_hidden_state[:, -64:]
    if name == "clip":
        theirs = model.post_layernorm(theirs)
    assert torch.allclose(ours(base)(images[..., :32, :32])[:, 1:], theirs, atol=2e-5)
    decoder = MAEDecoder(base.shape).state_dict()
    export_mae(tmp_path / "out", base.shape, base.encoder, decoder, base.mean, base.std)
    again = load_pretrained(str(tmp_path / "out"))
    assert again.shape == base.shape
    assert not any("whole patches" in note for note in again.notes)


@torch.no_grad()
def test_a_border_of_timms(tmp_path: Path) -> None:
    name = "vit_base_patch16_siglip_224"
    sizes = TIMM[name] | {"img_size": 35, "patch_size": 4, "depth": 2}
    model = timm.create_model(name, num_classes=0, **sizes).eval()
    kit.randomise(model)
    save_for_hf(model, tmp_path, model_args=sizes)
    base = load_pretrained(str(tmp_path))
    assert base.shape.image_size == 32
    assert "35 pixels are no whole patches of 4: images are 32" in base.notes[0]
    images = torch.randn(2, 3, 35, 35)
    theirs = model.forward_features(images)
    assert torch.allclose(ours(base)(images[..., :32, :32])[:, 1:], theirs, atol=2e-5)


def test_a_table_of_other_positions_is_refused(tmp_path: Path) -> None:
    made(tmp_path, "siglip")
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"image_size": 32', '"image_size": 38'))
    assert "38 is not a multiple of patch size 4" in refusal(tmp_path)


def test_what_images_are_normalised_by(tmp_path: Path) -> None:
    """timm's folder says it; a file of tensors does not, and that is said."""
    sizes = TIMM["vit_small_patch14_dinov2"] | {"img_size": 32, "patch_size": 4, "depth": 2}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, **sizes)
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    save_for_hf(model, tmp_path / "hub", model_args=sizes)
    found = load_pretrained(str(tmp_path / "hub"))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert not any("normalised" in note for note in found.notes)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    alone = load_pretrained(str(tmp_path / "file.pth"))
    assert alone.mean == IMAGENET_MEAN
    assert any("took ImageNet's mean and standard deviation" in note for note in alone.notes)


@pytest.mark.parametrize("normalized", [False, True])
def test_a_decoder_of_another_target_is_told(
    tmp_path: Path, normalized: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """facebook/vit-mae-base says norm_pix_loss false, where true is the default here."""
    kit.hf_mae(norm_pix_loss=normalized).save_pretrained(tmp_path)
    for asked in (False, True):
        kind = modality(**{"model": str(tmp_path), "mae.normalize_pixels": asked})
        assert kind.load().shape.normalize_pixels is asked
        kind.load()
        said = capsys.readouterr().out
        wanted = f"--mae.normalize_pixels {str(normalized).lower()} stays with the former"
        assert said.count(wanted) == (asked is not normalized)


def test_without_a_decoder_nothing_is_told_of_its_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path, "vit")
    modality(**{"model": str(tmp_path), "mae.normalize_pixels": False}).load()
    assert "normalize_pixels" not in capsys.readouterr().out
