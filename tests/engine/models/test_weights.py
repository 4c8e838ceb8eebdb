"""Weights from every published format give the same tensors; each fault is one line."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from transformers import ViTConfig, ViTImageProcessor, ViTModel
from transformers import ViTForMaskedImageModeling as ViTSimMIM

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTEncoder, ViTMAE, position_table
from selfdistill.engine.models.images.weights import Pretrained, load_pretrained
from tests.kit import models as kit

SHAPE = Shape(
    16, 4, 128, 2, 2, 144, 64, 2, 2, 80, norm_eps=1e-12, mask_ratio=0.75, normalize_pixels=False
)


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def refusal(source: Path | str, image_size: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_pretrained(str(source), image_size)
    message = str(caught.value)
    assert "\n" not in message
    assert ": " in message, "says what is wrong and the cure"
    return message


def test_hugging_face_folder_gives_shape_tensors_and_a_hash(saved: Path) -> None:
    weights = load_pretrained(str(saved))
    assert weights.shape == SHAPE
    assert weights.decoder is not None
    assert weights.origin == str(saved)
    assert len(weights.sha256) == 64
    assert {t.dtype for t in weights.encoder.values()} == {torch.float32}
    assert "no preprocessor_config.json" in weights.notes[0]


@pytest.mark.parametrize("names", ["transformers 4", "transformers 5", "float16", "bin", "shards"])
def test_names_and_files_of_all_transformers_versions(
    saved: Path, tmp_path: Path, names: str
) -> None:
    state = kit.hf_mae().state_dict()
    assert "vit.layers.0.attention.q_proj.weight" in state, "transformers 5's names changed"
    expected = load_pretrained(str(saved))
    folder = tmp_path / "mae"
    if names == "transformers 4":
        state = kit.old_names(state)
        assert "vit.encoder.layer.0.attention.attention.query.weight" in state
        assert "decoder.decoder_layers.1.attention.output.dense.bias" in state
    kit.write_folder(folder, config_of(saved), state)
    if names == "float16":
        half = {k: v.half() for k, v in state.items()}
        save_file(half, folder / "model.safetensors")
        # The tensors are halves, read exactly.
        encoder = {k: v.half().float() for k, v in expected.encoder.items()}
        assert same(load_pretrained(str(folder)).encoder, encoder)
        return
    if names == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    if names == "shards":
        (folder / "model.safetensors").unlink()
        keys = sorted(state)
        files = {"model-00001-of-00002.safetensors": keys[:20]}
        files["model-00002-of-00002.safetensors"] = keys[20:]
        for name, part in files.items():
            save_file({k: state[k].contiguous() for k in part}, folder / name)
        index = {"weight_map": {k: name for name, part in files.items() for k in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    got = load_pretrained(str(folder))
    assert same(got.encoder, expected.encoder)
    assert got.decoder is not None
    assert expected.decoder is not None
    assert same(got.decoder, expected.decoder)
    # The hash is of the tensors, not of the file.
    assert got.sha256 == expected.sha256
    assert got.shape == expected.shape


def test_hash_tells_any_change_apart(saved: Path) -> None:
    weights = load_pretrained(str(saved))
    model = kit.built(weights)
    assert Pretrained.fresh(model).sha256 == weights.sha256
    with torch.no_grad():
        model.decoder.mask_token[0, 0, 0] += 1e-3
    assert Pretrained.fresh(model).sha256 != weights.sha256


def test_settings_tell_what_tensors_do_not(saved: Path) -> None:
    base = load_pretrained(str(saved))
    assert base.settings == load_pretrained(str(saved)).settings
    other = [{"activation": "quick_gelu"}, {"heads": 2 * base.shape.heads}, {"norm_eps": 1e-5}]
    hashes = {replace(base, shape=replace(base.shape, **one)).settings for one in other}
    hashes |= {base.settings, replace(base, mean=(0.5, 0.5, 0.5)).settings}
    assert len(hashes) == 5
    # What is the decoder's, or a stage's, is not the encoder's.
    apart = replace(base.shape, decoder_depth=3, mask_ratio=0.5, normalize_pixels=False)
    assert replace(base, shape=apart).settings == base.settings


def test_vit_model_and_classifier_give_the_encoder_alone(tmp_path: Path) -> None:
    classifier = kit.hf_classifier()
    classifier.save_pretrained(tmp_path / "classifier")
    model = ViTModel(ViTConfig(**kit.SIZES))
    model.load_state_dict(classifier.vit.state_dict(), strict=False)
    model.save_pretrained(tmp_path / "model")
    ViTSimMIM(ViTConfig(**{**kit.SIZES, "encoder_stride": 4})).save_pretrained(tmp_path / "simmim")

    first, second = (load_pretrained(str(tmp_path / n)) for n in ("classifier", "model"))
    assert first.decoder is second.decoder is None
    assert same(first.encoder, second.encoder)
    assert any("classifier" in n for n in first.notes)
    assert any("pooler" in n for n in second.notes)
    assert load_pretrained(str(tmp_path / "simmim")).decoder is None

    encoder = ViTEncoder(first.shape).eval()
    encoder.load_state_dict(first.encoder)
    images, _ = kit.batch()
    expected = model.eval()(images).last_hidden_state
    torch.testing.assert_close(encoder(images), expected, rtol=1e-5, atol=1e-5)


def test_processor_tells_mean_and_std(saved: Path, tmp_path: Path) -> None:
    folder = kit.write_folder(tmp_path / "a", config_of(saved), kit.hf_mae().state_dict())
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    weights = load_pretrained(str(folder))
    assert (weights.mean, weights.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert weights.notes == ()
    # transformers' own default, where the file is silent, is 0.5.
    (folder / "preprocessor_config.json").write_text("{}")
    assert load_pretrained(str(folder)).mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("wrap", ["model", "training checkpoint", "bare"])
def test_fair_checkpoint_equals_the_hugging_face_one(tmp_path: Path, wrap: str) -> None:
    oracle = kit.hf_mae(layer_norm_eps=1e-6, norm_pix_loss=True)
    state = kit.fair_state(oracle)
    content: dict[str, object] = {"model": state}
    if wrap == "bare":
        content = dict(state)
    if wrap == "training checkpoint":
        args = argparse.Namespace(mask_ratio=0.5, norm_pix_loss=False, model="mae_vit_base_patch16")
        content |= {"optimizer": {"state": {}}, "epoch": 799, "scaler": {}, "args": args}
    torch.save(content, tmp_path / "mae.pth")
    weights = load_pretrained(str(tmp_path / "mae.pth"))
    assert weights.shape.norm_eps == 1e-6
    assert (weights.shape.heads, weights.shape.decoder_heads) == (2, 2)
    assert "does not tell its heads" in weights.notes[0]
    if wrap == "training checkpoint":
        assert (weights.shape.mask_ratio, weights.shape.normalize_pixels) == (0.5, False)
        oracle.config.mask_ratio, oracle.config.norm_pix_loss = 0.5, False
    images, noise = kit.batch()
    expected = oracle(images, noise=noise)
    got = kit.built(weights)(images, noise, whole=True)
    assert got["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-5)
    torch.testing.assert_close(got["prediction"], expected.logits, rtol=1e-4, atol=1e-5)


def test_fair_encoder_without_decoder_and_with_a_head(tmp_path: Path) -> None:
    state = kit.fair_state(kit.hf_mae())
    encoder = {k: v for k, v in state.items() if "decoder" not in k and k != "mask_token"}
    head = {"head.weight": torch.zeros(3, 128), "head.bias": torch.zeros(3)}
    torch.save({"model": encoder | head}, tmp_path / "mae.pth")
    weights = load_pretrained(str(tmp_path / "mae.pth"))
    assert weights.decoder is None
    assert same(weights.encoder, encoder)
    assert any("head" in n for n in weights.notes)


def test_timm_folder_as_timm_saves_it(tmp_path: Path) -> None:
    arguments = {"img_size": 16, "patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 4}
    model = timm.create_model("vit_base_patch16_224", num_classes=5, **arguments).eval()
    kit.randomise(model)
    save_for_hf(model, tmp_path / "timm", model_args=arguments, safe_serialization=True)
    weights = load_pretrained(str(tmp_path / "timm"))
    assert weights.decoder is None
    assert weights.shape.norm_eps == 1e-6
    assert (weights.shape.heads, weights.shape.mlp_width) == (4, 512)
    assert weights.mean == model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    encoder = ViTEncoder(weights.shape).eval()
    encoder.load_state_dict(weights.encoder)
    images, _ = kit.batch()
    torch.testing.assert_close(encoder(images), model.forward_features(images))
    # The same by naming the file in the folder.
    again = load_pretrained(str(tmp_path / "timm/model.safetensors"))
    assert again.sha256 == weights.sha256
    assert again.shape == weights.shape


def test_timm_file_alone(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    weights = load_pretrained(str(tmp_path / "vit.safetensors"))
    assert (weights.shape.heads, weights.shape.norm_eps) == (3, 1e-6)
    assert torch.equal(weights.encoder["pos_embed"], model.pos_embed)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_base_patch16_siglip_gap_224", {}),  # neither class token nor attention pooling
        ("vit_base_patch16_reg4_gap_256", {}),  # norm after pooling
        ("vit_base_patch16_rope_224", {}),  # other rotary positions
        ("eva02_tiny_patch14_224", {}),
        ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}),  # norm after pooling
        ("resnet18", {}),
    ],
)
def test_timm_models_that_would_compute_otherwise_are_refused(
    tmp_path: Path, name: str, arguments: dict[str, object]
) -> None:
    content = {"architecture": name, "model_args": arguments, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert f"timm's {name}, which is not a plain ViT" in refusal(tmp_path)


def test_sine_cosine_positions_are_recomputed_at_another_image_size(saved: Path) -> None:
    weights = load_pretrained(str(saved), image_size=32)
    assert weights.shape.image_size == 32
    assert torch.equal(weights.encoder["pos_embed"], position_table(128, 8))
    assert weights.decoder is not None
    assert torch.equal(weights.decoder["pos_embed"], position_table(64, 8))
    assert any("16 -> 32" in n and "computed anew" in n for n in weights.notes)
    assert weights.sha256 != load_pretrained(str(saved)).sha256
    loss = kit.built(weights)(torch.randn(2, 3, 32, 32), torch.rand(2, 64))["loss"]
    assert loss.isfinite()
    # Its own size leaves all as it is.
    assert load_pretrained(str(saved), 16).sha256 == load_pretrained(str(saved)).sha256


def test_learnt_positions_are_resampled_at_another_image_size(tmp_path: Path) -> None:
    model = kit.hf_classifier()
    with torch.no_grad():
        # Column number in one dimension: resampled, it must rise along columns, not along rows.
        table = torch.zeros(1, 17, 128)
        table[0, 1:, 0] = torch.arange(4.0).repeat(4)
        table[0, 0] = 7.0
        model.vit.embeddings.position_embeddings.copy_(table)
    model.save_pretrained(tmp_path)
    weights = load_pretrained(str(tmp_path), image_size=32)
    assert any("resampled" in n for n in weights.notes)
    moved = weights.encoder["pos_embed"]
    assert moved.shape == (1, 65, 128)
    assert torch.equal(moved[:, 0], table[:, 0])
    grid = moved[0, 1:, 0].view(8, 8)
    assert (grid.diff(dim=1) > 0).all()
    torch.testing.assert_close(grid, grid[:1].expand(8, -1))


def shards_of(saved: Path, folder: Path, kind: str) -> Path:
    """The saved model in two files with an index, as transformers leaves large ones."""
    state = dict(load_file(saved / "model.safetensors"))
    stem, suffix = ("model", ".safetensors") if kind == "safetensors" else ("pytorch_model", ".bin")
    kit.write_folder(folder, config_of(saved), state)
    (folder / "model.safetensors").unlink()
    names = [f"{stem}-0000{i}-of-00002{suffix}" for i in (1, 2)]
    places = {k: names[i % 2] for i, k in enumerate(state)}
    for name in names:
        part = {k: v for k, v in state.items() if places[k] == name}
        save = save_file if kind == "safetensors" else torch.save
        save(part, folder / name)
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_in_shards(saved: Path, tmp_path: Path, kind: str) -> None:
    """13, and what an index may have wrong."""
    folder = shards_of(saved, tmp_path / "whole", kind)
    assert load_pretrained(str(folder)).sha256 == load_pretrained(str(saved)).sha256
    (index,) = folder.glob("*.index.json")
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for wrong, said in (
        ({}, "it has no weight_map"),
        ({"weight_map": []}, "it has no weight_map"),
        ({"weight_map": {}}, "it has no weight_map"),
        ({"weight_map": content["weight_map"] | {first: "gone.bin"}}, "gone.bin, which is missing"),
        ({"weight_map": content["weight_map"] | {first: "../x.bin"}}, "no file beside it"),
        ({"weight_map": content["weight_map"] | {"x": content["weight_map"][first]}}, "tensor x"),
    ):
        index.write_text(json.dumps(wrong))
        assert said in refusal(folder)


@pytest.mark.parametrize("name", ["vit.pth", "vit.pth.tar", "vit.pt", "vit.ckpt", "vit.bin"])
@pytest.mark.parametrize("wrap", ["", "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
def test_training_checkpoints_of_others(name: str, wrap: str, prefix: str, tmp_path: Path) -> None:
    """timm's own, Lightning's, a compiled model's: the same weights, and nothing unpickled."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    state: object = {prefix + k: v for k, v in model.state_dict().items()}
    if wrap:
        state = {"epoch": 3, "arch": "vit", wrap: state, "optimizer": {"state": {}}}
    torch.save(state, tmp_path / name)
    found = load_pretrained(str(tmp_path / name))
    assert found.sha256 == load_pretrained(str(tmp_path / "plain.safetensors")).sha256


def test_fresh_weights_are_a_copy() -> None:
    model = ViTMAE(Shape(16, 4, 32, 2, 2, 48, 16, 1, 2, 24))
    weights = Pretrained.fresh(model)
    before = weights.encoder["cls_token"].clone()
    with torch.no_grad():
        model.encoder.cls_token.add_(1)
    assert torch.equal(weights.encoder["cls_token"], before)
