"""DINOv2, with registers and without: in and out, against transformers' and timm's own models."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from selfdistill.engine.checkpoints.export import export_classifier, export_mae
from selfdistill.engine.models.images.vit_mae import MAEDecoder, ViTClassifier, ViTEncoder
from selfdistill.engine.models.images.weights import Pretrained, load_pretrained
from tests.engine.models.test_weights import refusal
from tests.kit import models as kit
from tests.kit.launches import make_images, metrics, run_cases

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
    "image_size": 32,
}


def made(folder: Path, registers: int) -> Any:
    """A random model, saved by transformers."""
    if registers:
        config: Any = Dinov2WithRegistersConfig(**SIZES, num_register_tokens=registers)
        model: Any = Dinov2WithRegistersModel(config)
    else:
        model = Dinov2Model(Dinov2Config(**SIZES))
    kit.randomise(model)
    model.save_pretrained(folder)
    return model.eval()


def ours(base: Pretrained) -> ViTEncoder:
    encoder = ViTEncoder(base.shape)
    encoder.load_state_dict(base.encoder)
    return encoder.eval()


@torch.no_grad()
def hidden(model: Any, images: torch.Tensor, registers: int) -> torch.Tensor:
    """transformers' last hidden states, CLS and patches."""
    found: torch.Tensor = model(images).last_hidden_state
    return torch.cat([found[:, :1], found[:, 1 + registers :]], dim=1)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("size", [32, 16, 48])
@torch.no_grad()
def test_features_are_transformers(tmp_path: Path, registers: int, size: int) -> None:
    """At the size of the weights and at others, to which positions are resized as theirs are."""
    model = made(tmp_path, registers)
    base = load_pretrained(str(tmp_path), size)
    assert (base.shape.layer_scale, base.shape.registers) == (True, registers)
    assert base.decoder is None
    images = torch.randn(2, 3, size, size)
    encoder = ours(base)
    theirs, found = hidden(model, images, registers), encoder(images)
    assert torch.allclose(found, theirs, atol=2e-5)
    every = torch.arange(base.shape.patches).expand(2, -1)
    assert torch.allclose(encoder(images, every), encoder(images), atol=1e-6)
    assert torch.allclose(encoder(images, cls_only=True)[:, 0], encoder(images)[:, 0], atol=1e-5)


@pytest.mark.parametrize("registers", [0, 3])
@torch.no_grad()
def test_exports_are_of_the_same_class(tmp_path: Path, registers: int) -> None:
    """Bit for bit what came in, with a decoder beside it, which only we read."""
    model = made(tmp_path / "in", registers)
    base = load_pretrained(str(tmp_path / "in"))
    decoder = MAEDecoder(base.shape).state_dict()
    export_mae(tmp_path / "out", base.shape, base.encoder, decoder, MEAN, STD)
    again, told = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again) is type(model)
    assert set(told["missing_keys"]) <= {"embeddings.mask_token"}
    assert not told["unexpected_keys"]
    before = {k: v for k, v in model.state_dict().items() if "mask_token" not in k}
    assert all(torch.equal(again.state_dict()[k], v) for k, v in before.items())
    found = load_pretrained(str(tmp_path / "out"))
    assert found.shape == base.shape
    assert (found.mean, found.std) == (MEAN, STD)
    assert found.decoder is not None
    assert all(torch.equal(found.decoder[k], v) for k, v in decoder.items())
    assert all(torch.equal(found.encoder[k], v) for k, v in base.encoder.items())


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@torch.no_grad()
def test_classifiers(tmp_path: Path, registers: int, pool: str) -> None:
    made(tmp_path / "in", registers)
    base = load_pretrained(str(tmp_path / "in"))
    classifier = ViTClassifier(ours(base), 3, pool=pool).eval()
    kit.randomise(classifier.head)
    head = classifier.head.state_dict()
    export_classifier(
        tmp_path / "out", base.shape, base.encoder, head, ["a", "b", "c"], pool, MEAN, STD
    )
    images = torch.randn(2, 3, 32, 32)
    wanted = classifier(images)
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert torch.allclose(theirs(images).logits, wanted, atol=1e-5)
    of_timm = timm.create_model(
        f"local-dir:{tmp_path / 'out' / 'timm'}",
        pretrained=True,
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=base.shape.norm_eps),
    ).eval()
    assert torch.allclose(of_timm(images), wanted, atol=1e-5)
    assert load_pretrained(str(tmp_path / "out")).shape.registers == registers


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
@torch.no_grad()
def test_timms_own(tmp_path: Path, name: str) -> None:
    """As its hub saves them, and as files of tensors alone."""
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 2}
    model = timm.create_model(name, num_classes=0, **sizes).eval()
    kit.randomise(model)
    save_for_hf(model, tmp_path / "hub", model_args=sizes)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    images = torch.randn(2, 3, 32, 32)
    found = model.forward_features(images)
    theirs = torch.cat([found[:, :1], found[:, model.num_prefix_tokens :]], dim=1)
    for source in (tmp_path / "hub", tmp_path / "file.pth"):
        base = load_pretrained(str(source))
        assert base.shape.registers == model.num_prefix_tokens - 1
        assert torch.allclose(ours(base)(images), theirs, atol=2e-5)


def test_names_of_meta(tmp_path: Path) -> None:
    """Of the files that DINOv2's authors publish."""
    made(tmp_path / "in", 3)
    base = load_pretrained(str(tmp_path / "in"))
    state = {("register_tokens" if k == "reg_token" else k): v for k, v in base.encoder.items()}
    torch.save(state | {"mask_token": torch.zeros(1, 24)}, tmp_path / "x.pth")
    found = load_pretrained(str(tmp_path / "x.pth"))
    assert found.decoder is None
    assert all(torch.equal(found.encoder[k], v) for k, v in base.encoder.items())


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    made(tmp_path, 0)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for change, says in (
        ({"use_swiglu_ffn": True}, "SwiGLU"),
        ({"mlp_ratio": "4"}, "mlp_ratio"),
        ({"model_type": "dinov3_vit"}, "not a ViT, ViT-MAE or DINOv2"),
        ({"model_type": "detr"}, "not a ViT, ViT-MAE or DINOv2"),
    ):
        path.write_text(json.dumps(config | change))
        assert says in refusal(tmp_path)


@pytest.mark.multi
def test_from_a_folder_to_a_table(tmp_path: Path) -> None:
    """Every stage on two ranks, the decoder first, under ZeRO 1 and 3; positions to 16 pixels."""
    from selfdistill.data.pack import pack

    make_images(tmp_path / "images")
    pack(str(tmp_path / "images"), str(tmp_path / "shards"))
    for registers in (0, 3):
        made(tmp_path / f"dino{registers}", registers)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFDISTILL_DECODERS", str(tmp_path / "shelf"))
        said = run_cases(
            tmp_path,
            [
                {
                    "stage": "all",
                    "data": str(tmp_path / "shards"),
                    "model": str(tmp_path / f"dino{registers}"),
                    "model.image_size": 16,
                    "output": str(tmp_path / f"run{registers}-{zero}"),
                    "zero": zero,
                    "decoder.steps": 3,
                    "decoder.batch": 8,
                }
                for registers, zero in ((0, "zero1"), (3, "zero1"), (3, "zero3"))
            ],
        )
    assert "has no decoder" not in said
    for stage in ("pretrain", "distill-1"):
        a, b = (
            load_file(tmp_path / run / stage / "export" / "model.safetensors")
            for run in ("run3-zero1", "run3-zero3")
        )
        assert "embeddings.register_tokens" in a
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-3
    assert metrics(tmp_path / "run0-zero1" / "decoder")
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "run0-zero1" / "finetune" / "export"
    )
    assert model.config.model_type == "dinov2"
