"""What files tell of an image encoder, and what they do not."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from timm.models import save_for_hf

from selfdistill.engine.checkpoints.export import export_mae
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN
from selfdistill.engine.models.images.types.clip import CLIP
from selfdistill.engine.models.images.vit_mae import MAEDecoder
from selfdistill.engine.models.images.weights import load_pretrained
from selfdistill.engine.models.source import _CONFIGS
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


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ("ViT", {}),
        ("ViT", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [0.5] * 3}),
        ("ViT", {"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [64.0] * 3}),
        ("ViT", {"do_rescale": False, "do_normalize": False}),
        ("ViT", {"rescale_factor": 0.01, "do_normalize": False}),
        ("CLIP", {}),
        ("Bit", {}),
        ("Siglip", {}),
        ("DeiT", {}),
    ],
)
def test_images_are_normalised_as_transformers_does(
    tmp_path: Path, named: str, told: dict[str, Any]
) -> None:
    """What a processor's file says, and where it is silent its class."""
    made(tmp_path, "vit")
    told = told | {"image_processor_type": f"{named}ImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    pixels = torch.arange(3 * 8 * 8, dtype=torch.uint8).view(3, 8, 8)
    plain = {"do_resize": False, "do_center_crop": False, "do_convert_rgb": False}
    theirs = processor(pixels.numpy(), return_tensors="pt", **plain)["pixel_values"][0]
    base = load_pretrained(str(tmp_path))
    mean, std = (torch.tensor(one)[:, None, None] for one in (base.mean, base.std))
    torch.testing.assert_close((pixels / 255 - mean) / std, theirs.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mean"), [("clip", CLIP.mean), ("dinov2", CLIP.mean), ("dinov3", IMAGENET_MEAN)]
)
def test_a_processor_without_a_name_is_the_types_own(
    tmp_path: Path, name: str, mean: tuple[float, ...]
) -> None:
    made(tmp_path, name)
    for told in ("{}", '{"image_processor_type": "DINOv3ViTImageProcessorFast"}'):
        (tmp_path / "preprocessor_config.json").write_text(told)
        wanted = mean if told == "{}" else hf.DINOv3ViTImageProcessor().image_mean
        assert load_pretrained(str(tmp_path)).mean == tuple(wanted)


def test_processors_of_transformers_5(tmp_path: Path) -> None:
    """A whole CLIP's lies in processor_config.json, before the other file."""
    made(tmp_path, "clip_whole")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.7, 0.7, 0.7]}')
    path = tmp_path / "processor_config.json"
    path.write_text('{"processor_class": "CLIPProcessor"}')  # as of transformers 4
    assert load_pretrained(str(tmp_path)).mean == (0.7, 0.7, 0.7)
    own = hf.CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3]).to_dict()
    path.write_text(json.dumps({"image_processor": own, "processor_class": "CLIPProcessor"}))
    base = load_pretrained(str(tmp_path))
    theirs = hf.AutoImageProcessor.from_pretrained(tmp_path)
    assert (base.mean, base.std) == (tuple(theirs.image_mean), tuple(theirs.image_std))
    path.write_text('{"image_processor": 3}')
    assert "processor_config.json: image_processor" in refusal(tmp_path)
    assert "processor_config.json" in _CONFIGS


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2_with_registers", "dinov3_vit"])
def test_no_registers(tmp_path: Path, name: str) -> None:
    """transformers keeps an empty table of them."""
    config = hf.AutoConfig.for_model(name, **WIDE, num_register_tokens=0)
    model = hf.AutoModel.from_config(config).eval()
    kit.randomise(model)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    theirs = model(images).last_hidden_state
    assert torch.allclose(ours(load_pretrained(str(tmp_path)))(images), theirs, atol=2e-5)


def test_deits_other_decoder_is_left_out(tmp_path: Path) -> None:
    model = hf.DeiTForMaskedImageModeling(hf.DeiTConfig(**WIDE, encoder_stride=4))
    model.save_pretrained(tmp_path)
    base = load_pretrained(str(tmp_path))
    assert base.decoder is None
    assert "left out decoder: only the encoder is used" in base.notes


@pytest.mark.parametrize("told", [False, True])
def test_a_file_may_not_tell_its_decoders_target(
    tmp_path: Path, told: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """FAIR's mae_visualize files give plain pixels, its others normalised ones."""
    content: dict[str, Any] = {"model": kit.fair_state(kit.hf_mae())}
    if told:
        content["args"] = argparse.Namespace(norm_pix_loss=True)
    torch.save(content, tmp_path / "mae.pth")
    modality(**{"model": str(tmp_path / "mae.pth"), "mae.normalize_pixels": False}).load()
    said = capsys.readouterr().out
    assert ("was trained to give" in said) == told
    assert ("does not tell what pixels" in said) != told
