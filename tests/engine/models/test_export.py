"""Exports: transformers and timm load them without a missing key, and compute the same."""

import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTForImageClassification,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.export import export_classifier, export_mae
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.vit import ViT
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE
from selfdistill.engine.models.images.weights import Pretrained, load_pretrained
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.image import ImageModality
from tests.engine.models.texts.test_language import kind_of
from tests.kit import models as kit
from tests.kit import texts as text_kit

#: Uneven widths: int(60 * (123 / 60)), as timm reckons an MLP, is 122.
SHAPE = Shape(16, 4, 60, 2, 3, 123, 36, 1, 3, 41, norm_eps=1e-6, mask_ratio=0.5)
MEAN, STD = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
CLASSES = ["Löwe", "dog", "0"]


def exported_mae(folder: Path, shape: Shape = SHAPE) -> ViTMAE:
    model = ViTMAE(shape).eval()
    kit.randomise(model)
    export_mae(folder, shape, model.encoder.state_dict(), model.decoder.state_dict(), MEAN, STD)
    return model


def exported_classifier(folder: Path, pool: str = "cls", eps: float = 1e-6) -> ViTClassifier:
    shape = Shape(**{**SHAPE.__dict__, "norm_eps": eps})
    model = ViTClassifier(ViTEncoder(shape), len(CLASSES), pool=pool).eval()
    kit.randomise(model)
    encoder, head = model.encoder.state_dict(), model.head.state_dict()
    export_classifier(folder, shape, encoder, head, CLASSES, pool, MEAN, STD)
    return model


def assert_clean(report: dict[str, object], unexpected: str | None = None) -> None:
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    left = [k for k in report["unexpected_keys"] if not unexpected or not k.startswith(unexpected)]
    assert not left


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_transformers_loads_the_mae_and_gives_the_same(tmp_path: Path, eps: float) -> None:
    shape = Shape(**{**SHAPE.__dict__, "norm_eps": eps})
    model = exported_mae(tmp_path / "mae", shape)
    images, noise = kit.batch()

    loaded, report = ViTMAEForPreTraining.from_pretrained(
        tmp_path / "mae", output_loading_info=True
    )
    assert_clean(report)
    expected, got = model(images, noise, whole=True), loaded.eval()(images, noise=noise)
    assert got.loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    torch.testing.assert_close(got.logits, expected["prediction"], rtol=1e-5, atol=1e-5)
    assert torch.equal(got.mask, expected["mask"])

    _, report = ViTMAEModel.from_pretrained(tmp_path / "mae", output_loading_info=True)
    assert_clean(report, unexpected="decoder.")
    encoder, report = ViTModel.from_pretrained(
        tmp_path / "mae", add_pooling_layer=False, output_loading_info=True
    )
    assert_clean(report, unexpected="decoder.")
    torch.testing.assert_close(
        encoder.eval()(images).last_hidden_state, model.encoder(images), rtol=1e-5, atol=1e-5
    )


def test_the_encoder_alone_is_there_for_both_libraries(tmp_path: Path) -> None:
    """ViTMAEModel hides patches at random: two calls differ. What AutoModel makes does not."""
    model = exported_mae(tmp_path / "mae")
    images, _ = kit.batch()
    wanted = model.encoder(images)
    plain, report = AutoModel.from_pretrained(
        tmp_path / "mae" / "encoder", add_pooling_layer=False, output_loading_info=True
    )
    assert_clean(report)
    also, report = AutoModel.from_pretrained(
        tmp_path / "mae", add_pooling_layer=False, output_loading_info=True
    )
    assert_clean(report, unexpected="decoder.")
    for model_again in (plain, also):
        assert type(model_again) is ViTModel
        for _ in range(2):
            found = model_again.eval()(images).last_hidden_state
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    of_timm = timm.create_model(f"local-dir:{tmp_path / 'mae' / 'timm'}", pretrained=True).eval()
    assert of_timm.num_classes == 0
    torch.testing.assert_close(of_timm.forward_features(images), wanted, rtol=1e-4, atol=1e-5)
    assert load_pretrained(str(tmp_path / "mae" / "encoder")).decoder is None
    assert load_pretrained(str(tmp_path / "mae")).decoder is not None


@pytest.mark.parametrize("normalized", [True, False])
def test_round_trip_from_transformers_is_bitwise(tmp_path: Path, normalized: bool) -> None:
    oracle = kit.hf_mae(norm_pix_loss=normalized, mask_ratio=0.5)
    oracle.save_pretrained(tmp_path / "theirs")
    weights = load_pretrained(str(tmp_path / "theirs"))
    assert weights.decoder is not None
    export_mae(tmp_path / "ours", weights.shape, weights.encoder, weights.decoder, MEAN, STD)
    back = ViTMAEForPreTraining.from_pretrained(tmp_path / "ours")
    expected, got = oracle.state_dict(), back.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[k], expected[k]) for k in expected)
    for key in (*kit.SIZES, *kit.DECODER_SIZES, "layer_norm_eps", "mask_ratio", "norm_pix_loss"):
        assert getattr(back.config, key) == getattr(oracle.config, key), key
    again = load_pretrained(str(tmp_path / "ours"))
    assert (again.sha256, again.shape) == (weights.sha256, weights.shape)
    assert (again.mean, again.std) == (MEAN, STD)


def test_files_have_transformers_4s_names(tmp_path: Path) -> None:
    exported_mae(tmp_path / "mae")
    names = load_file(tmp_path / "mae/model.safetensors").keys()
    oracle = ViTMAEForPreTraining.from_pretrained(tmp_path / "mae")
    assert names == kit.old_names(oracle.state_dict()).keys()


def test_transformers_loads_the_classifier_and_gives_the_same(tmp_path: Path) -> None:
    model = exported_classifier(tmp_path / "export", eps=1e-2)
    loaded, report = ViTForImageClassification.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert_clean(report)
    images, _ = kit.batch()
    torch.testing.assert_close(loaded.eval()(images).logits, model(images), rtol=1e-5, atol=1e-5)
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    weights = load_pretrained(str(tmp_path / "export"))
    assert weights.sha256 == load_pretrained(str(tmp_path / "export/timm")).sha256
    assert weights.shape.norm_eps == load_pretrained(str(tmp_path / "export/timm")).shape.norm_eps


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_timm_loads_the_classifier_and_gives_the_same(tmp_path: Path, pool: str) -> None:
    model = exported_classifier(tmp_path / "export", pool)
    images, _ = kit.batch()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'export/timm'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)
    assert loaded.pretrained_cfg["label_names"] == CLASSES
    assert loaded.pretrained_cfg["mean"] in (MEAN, list(MEAN))
    # transformers' ViT knows no mean pooling: its wrapper of timm's models does.
    theirs, report = AutoModelForImageClassification.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert_clean(report)
    named = {"cls": "ViTForImageClassification", "mean": "TimmWrapperForImageClassification"}
    assert type(theirs).__name__ == named[pool]
    torch.testing.assert_close(theirs.eval()(images).logits, model(images), rtol=1e-5, atol=1e-5)
    assert theirs.config.id2label == dict(enumerate(CLASSES))
    assert load_pretrained(str(tmp_path / "export")).shape.mlp_width == SHAPE.mlp_width


def test_timms_own_class_loads_the_file_strictly_at_any_eps(tmp_path: Path) -> None:
    model = exported_classifier(tmp_path / "export", eps=1e-2)
    images, _ = kit.batch()
    norm = partial(nn.LayerNorm, eps=1e-2)
    plain = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=60, depth=2, num_heads=3, num_classes=3,
        mlp_ratio=123.5 / 60, norm_layer=norm,
    ).eval()  # fmt: skip
    plain.load_state_dict(load_file(tmp_path / "export/timm/model.safetensors"), strict=True)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-5, atol=1e-5)
    # The way that the exported configuration's note tells.
    told = timm.create_model(
        f"local-dir:{tmp_path / 'export/timm'}", pretrained=True, norm_layer=norm
    ).eval()
    torch.testing.assert_close(told(images), model(images), rtol=1e-5, atol=1e-5)


def test_processor_normalises_as_training_did(tmp_path: Path) -> None:
    exported_mae(tmp_path / "mae")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "mae")
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    got = processor(image, return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = (torch.from_numpy(image).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(got, expected)


def test_export_replaces_an_export_and_nothing_else(tmp_path: Path) -> None:
    exported_mae(tmp_path / "mae")
    first = load_pretrained(str(tmp_path / "mae")).sha256
    kit.randomise(model := ViTMAE(SHAPE), seed=9)
    weights = Pretrained.fresh(model)
    assert weights.decoder is not None
    export_mae(tmp_path / "mae", SHAPE, weights.encoder, weights.decoder, MEAN, STD)
    assert load_pretrained(str(tmp_path / "mae")).sha256 == weights.sha256 != first
    assert [p.name for p in tmp_path.iterdir()] == ["mae"]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="something else than an export"):
        export_mae(tmp_path / "mine", SHAPE, weights.encoder, weights.decoder, MEAN, STD)
    assert (tmp_path / "mine/thesis.tex").read_text() == "x"


def test_full_disk_is_one_line_and_leaves_the_old_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = exported_mae(tmp_path / "mae")
    before = load_pretrained(str(tmp_path / "mae")).sha256

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("selfdistill.engine.checkpoints.export.save_file", full)
    with pytest.raises(UserError, match=r"No space left on device.*free some space"):
        export_mae(
            tmp_path / "mae",
            SHAPE,
            model.encoder.state_dict(),
            model.decoder.state_dict(),
            MEAN,
            STD,
        )
    assert load_pretrained(str(tmp_path / "mae")).sha256 == before
    assert [p.name for p in tmp_path.iterdir()] == ["mae"]


@pytest.mark.parametrize("name", ["images", "texts"])
def test_what_is_frozen_is_exported_as_it_came_though_fp16_rounds_it(
    name: str, tmp_path: Path
) -> None:
    """A module as stage 0 has it: DeepSpeed casts it whole, with masters of what is trained."""
    kind: Any
    if name == "images":
        exported_mae(tmp_path / "base")
        run = Run(Config(), Ranks(0, 0, 1, torch.device("cpu")), Path())
        kind = ImageModality(run)
    else:
        kind = kind_of(text_kit.make_language(tmp_path / "base"))
    base = kind.load(str(tmp_path / "base"))
    model = kind.autoencoder(base)
    model.encoder.requires_grad_(False)
    model.half()
    kind.export_autoencoder(tmp_path / "export", model, base)
    after = kind.load(str(tmp_path / "export"))
    assert all(torch.equal(after.encoder[k], value) for k, value in base.encoder.items())
    assert not all(torch.equal(after.decoder[k], value) for k, value in base.decoder.items())


def test_an_unknown_tensor_is_never_left_out_silently() -> None:
    with pytest.raises(KeyError):
        ViT.names.theirs({"norm_pre.weight": torch.zeros(1)})


def test_images_start_without_transformers() -> None:
    """Its import takes a tenth of the time to the first step, and texts alone need it."""
    code = (
        "import sys; from selfdistill.engine import run;"
        " from selfdistill.engine.stages import distill, finetune, pretrain;"
        " from selfdistill.engine.training.modalities import image;"
        " sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
