"""Every type of image encoder: in and out, against transformers' and timm's own models."""

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as hf
from safetensors.torch import load_file
from timm.models import save_for_hf
from transformers import AutoModel, AutoModelForImageClassification

from selfdistill.data.formats.images import Size, sides
from selfdistill.engine.checkpoints.export import export_classifier, export_mae
from selfdistill.engine.models.images.types import TYPES
from selfdistill.engine.models.images.vit_mae import MAEDecoder, ViTClassifier, ViTEncoder
from selfdistill.engine.models.images.weights import Pretrained, load_pretrained
from tests.engine.models.test_weights import refusal
from tests.kit import models as kit
from tests.kit.launches import make_images, metrics, run_cases

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 32,
}
WIDE = SIZES | {"intermediate_size": 72}
TEXTS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

#: Name -> a random model of transformers.
MAKE: dict[str, Callable[[], Any]] = {
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**WIDE), add_pooling_layer=False),
    "vit_tanh": lambda: hf.ViTModel(hf.ViTConfig(**WIDE, hidden_act="gelu_pytorch_tanh")),
    "deit": lambda: hf.DeiTModel(hf.DeiTConfig(**WIDE)),
    "dinov2": lambda: hf.Dinov2Model(hf.Dinov2Config(**SIZES, mlp_ratio=2)),
    "dinov2_gated": lambda: hf.Dinov2Model(
        hf.Dinov2Config(**SIZES, mlp_ratio=4, use_swiglu_ffn=True)
    ),
    "dinov2_registers": lambda: hf.Dinov2WithRegistersModel(
        hf.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)
    ),
    "dinov3": lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**WIDE, num_register_tokens=4)),
    "dinov3_gated": lambda: hf.DINOv3ViTModel(
        hf.DINOv3ViTConfig(**WIDE, num_register_tokens=2, use_gated_mlp=True, hidden_act="silu")
    ),
    "clip": lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**WIDE)),
    "clip_whole": lambda: hf.CLIPModel(hf.CLIPConfig(vision_config=WIDE, text_config=TEXTS)),
    "siglip": lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**WIDE)),
    "siglip_whole": lambda: hf.SiglipModel(hf.SiglipConfig(vision_config=WIDE, text_config=TEXTS)),
}
#: Those whose positions transformers resizes as we do.
RESIZED = [name for name in MAKE if not name.startswith(("vit", "deit"))]
#: Ways of pooling that transformers has a class for.
POOLED = [
    *(("vit", "cls"), ("deit", "cls"), ("dinov2", "cls"), ("dinov2", "mean")),
    *(("dinov2_gated", "mean"), ("dinov2_registers", "cls"), ("siglip", "mean")),
]


def made(folder: Path, name: str) -> Any:
    """A random model, saved by transformers; of a whole one its vision tower."""
    model = MAKE[name]()
    kit.randomise(model)
    model.save_pretrained(folder)
    return getattr(model, "vision_model", model).eval()


def ours(base: Pretrained) -> ViTEncoder:
    encoder = ViTEncoder(base.shape)
    encoder.load_state_dict(base.encoder)
    return encoder.eval()


@torch.no_grad()
def features(model: Any, images: torch.Tensor) -> torch.Tensor:
    """What transformers computes: the summary of each image, then its patches."""
    kind = model.config.model_type
    resized = {"interpolate_pos_encoding": True} if kind in ("clip_vision_model",) else {}
    if kind == "siglip_vision_model":
        out = model(images, interpolate_pos_encoding=True)
        return torch.cat([out.pooler_output[:, None], out.last_hidden_state], dim=1)
    found: torch.Tensor = model(images, **resized).last_hidden_state
    if kind == "clip_vision_model":
        normed: torch.Tensor = model.post_layernorm(found)
        return normed
    registers = {"deit": 1}.get(kind, getattr(model.config, "num_register_tokens", 0))
    return torch.cat([found[:, :1], found[:, 1 + registers :]], dim=1)


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_features_are_transformers(tmp_path: Path, name: str) -> None:
    """The full view; the masked one with nothing masked, and with half of it, by the full one."""
    theirs = features(made(tmp_path, name), images := torch.randn(2, 3, 32, 32))
    base = load_pretrained(str(tmp_path))
    assert base.decoder is None
    encoder = ours(base)
    found = encoder(images)
    assert torch.allclose(found, theirs, atol=2e-5)
    every = torch.arange(base.shape.patches).expand(2, -1)
    assert torch.allclose(encoder(images, every), found, atol=1e-6)
    mixed = torch.stack([torch.randperm(base.shape.patches) for _ in images])
    order = torch.cat([torch.zeros(2, 1, dtype=torch.long), 1 + mixed], dim=1)
    picked = found.gather(1, order[:, :, None].expand(-1, -1, found.shape[2]))
    assert torch.allclose(encoder(images, mixed), picked, atol=2e-5)
    assert encoder(images, mixed[:, :9]).shape == (2, 10, 32)
    assert torch.allclose(encoder(images, cls_only=True)[:, 0], found[:, 0], atol=1e-5)


@pytest.mark.parametrize("size", [16, 48, (32, 48), (24, 16)])
@pytest.mark.parametrize("name", RESIZED)
@torch.no_grad()
def test_positions_are_resized_as_their_makers_do(tmp_path: Path, name: str, size: Size) -> None:
    model = made(tmp_path, name)
    images = torch.randn(2, 3, *sides(size))
    found = ours(load_pretrained(str(tmp_path), size))(images)
    assert torch.allclose(found, features(model, images), atol=2e-5)


@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_exports_are_of_the_same_class(tmp_path: Path, name: str) -> None:
    """Bit for bit what came in, with a decoder beside it, which only we read; timm's too."""
    model = made(tmp_path / "in", name)
    base = load_pretrained(str(tmp_path / "in"))
    decoder = MAEDecoder(base.shape).state_dict()
    export_mae(tmp_path / "out", base.shape, base.encoder, decoder, MEAN, STD)
    alone = tmp_path / "out" / "encoder"
    again, told = AutoModel.from_pretrained(
        alone if alone.exists() else tmp_path / "out", output_loading_info=True
    )
    assert type(again) is type(model)
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    assert set(told["missing_keys"]) <= {"embeddings.mask_token"} | pooler
    assert not told["unexpected_keys"]
    before = {k: v for k, v in model.state_dict().items() if k not in told["missing_keys"]}
    if name == "deit":  # the token has taken its position with it
        images = torch.randn(2, 3, 32, 32)
        assert torch.equal(features(again.eval(), images), features(model, images))
    else:
        assert all(torch.equal(again.state_dict()[k], v) for k, v in before.items())
    found = load_pretrained(str(tmp_path / "out"))
    assert found.shape == base.shape
    assert (found.mean, found.std) == (MEAN, STD)
    assert found.decoder is not None
    assert all(torch.equal(found.decoder[k], v) for k, v in decoder.items())
    assert all(torch.equal(found.encoder[k], v) for k, v in base.encoder.items())
    assert load_pretrained(str(tmp_path / "out" / "timm")).shape == base.shape


def of_timm(folder: Path, base: Pretrained) -> Any:
    """An export as timm loads it, told the epsilon that its files cannot say."""
    norm = functools.partial(torch.nn.LayerNorm, eps=base.shape.norm_eps)
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True, norm_layer=norm)
    return model.eval()


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2_registers", "dinov3", "clip", "siglip"])
@torch.no_grad()
def test_exports_of_rectangles(tmp_path: Path, name: str) -> None:
    """Where transformers' class takes them, for it; timm's and ours always, and all the same."""
    made(tmp_path / "in", name)
    base = load_pretrained(str(tmp_path / "in"), (32, 48))
    base = replace(base, shape=replace(base.shape, decoder_width=64, decoder_depth=1))
    decoder = MAEDecoder(base.shape).state_dict()
    export_mae(tmp_path / "out", base.shape, base.encoder, decoder, MEAN, STD)
    found = load_pretrained(str(tmp_path / "out"))
    assert found.shape == base.shape
    assert found.decoder is not None
    assert all(torch.equal(found.decoder[k], v) for k, v in decoder.items())
    images = torch.randn(2, 3, 32, 48)
    wanted = ours(base)(images)
    assert torch.equal(ours(found)(images), wanted)
    theirs = of_timm(tmp_path / "out" / "timm", base)
    assert torch.allclose(theirs(images), wanted[:, 0], atol=2e-5)
    taken = name in ("vit", "deit", "dinov3")
    assert (tmp_path / "out" / "config.json").exists() == taken
    if taken:
        again = AutoModel.from_pretrained(tmp_path / "out").eval()
        assert torch.allclose(features(again, images), wanted, atol=2e-5)


@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_classifiers(tmp_path: Path, name: str, pool: str, size: Size) -> None:
    """transformers' class, where it has one that pools so, or its wrapper of timm's; timm's."""
    made(tmp_path / "in", name)
    base = load_pretrained(str(tmp_path / "in"), size)
    classifier = ViTClassifier(ours(base), 3, pool=pool).eval()
    kit.randomise(classifier.head)
    head = classifier.head.state_dict()
    out, classes = tmp_path / "out", ["a", "b", "c"]
    export_classifier(out, base.shape, base.encoder, head, classes, pool, MEAN, STD)
    images = torch.randn(2, 3, *sides(size))
    wanted = classifier(images)
    assert torch.allclose(of_timm(out / "timm", base)(images), wanted, atol=1e-5)
    theirs, told = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not told["unexpected_keys"]
    assert theirs.config.id2label == {0: "a", 1: "b", 2: "c"}
    wrapped = type(theirs).__name__ == "TimmWrapperForImageClassification"
    assert not (wrapped and (name, pool) in POOLED and (size == 32 or name in ("vit", "deit")))
    # The files cannot say the norms' epsilon: the architecture of CLIP and DINOv3 has 1e-5.
    near = wrapped and base.shape.norm_eps == 1e-12
    assert torch.allclose(theirs.eval()(images).logits, wanted, atol=1e-3 if near else 1e-5)
    again = load_pretrained(str(out))
    assert again.shape == base.shape
    if wrapped:  # with registers the class token has taken its position with it
        assert torch.allclose(ours(again)(images), ours(base)(images), atol=1e-5)
    else:
        assert all(torch.equal(again.encoder[k], v) for k, v in base.encoder.items())


#: timm's architecture -> arguments that make it small.
TIMM = {
    "deit_tiny_distilled_patch16_224": {"embed_dim": 128, "num_heads": 2},
    "vit_small_patch14_dinov2": {"embed_dim": 128, "num_heads": 2},
    "vit_small_patch14_reg4_dinov2": {"embed_dim": 128, "num_heads": 2},
    "vit_giant_patch14_dinov2": {"embed_dim": 192, "num_heads": 3},
    "vit_base_patch16_clip_quickgelu_224": {"embed_dim": 128, "num_heads": 2},
    "vit_base_patch16_clip_224": {"embed_dim": 128, "num_heads": 2},
    "vit_base_patch16_siglip_224": {"embed_dim": 128, "num_heads": 2},
    "vit_small_patch16_dinov3": {"embed_dim": 128, "num_heads": 2, "dynamic_img_size": False},
    "vit_small_patch16_dinov3_qkvb": {"embed_dim": 128, "num_heads": 2, "dynamic_img_size": False},
    "vit_huge_plus_patch16_dinov3": {"embed_dim": 128, "num_heads": 2, "dynamic_img_size": False},
}


@pytest.mark.parametrize("name", TIMM)
@torch.no_grad()
def test_timms_own(tmp_path: Path, name: str) -> None:
    """As its hub saves them, and, where a file of tensors tells enough, as such."""
    sizes = TIMM[name] | {"img_size": 32, "patch_size": 4, "depth": 2}
    model = timm.create_model(name, num_classes=0, **sizes).eval()
    kit.randomise(model)
    save_for_hf(model, tmp_path / "hub", model_args=sizes)
    torch.save(model.state_dict(), tmp_path / "file.pth")
    images = torch.randn(2, 3, 32, 32)
    found = model.forward_features(images)
    theirs = found[:, model.num_prefix_tokens :]
    summary = found[:, 0] if model.cls_token is not None else model.attn_pool(found)
    theirs = torch.cat([summary[:, None], theirs], dim=1)
    for source in (tmp_path / "hub", *([tmp_path / "file.pth"] if "dinov2" in name else [])):
        assert torch.allclose(ours(load_pretrained(str(source)))(images), theirs, atol=2e-5)
    if "clip" in name:
        assert "activation" in refusal(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["dinov2_registers", "dinov2_gated", "dinov3", "dinov3_gated"])
def test_names_of_meta(tmp_path: Path, name: str) -> None:
    """Of the files that the authors of DINOv2 and DINOv3 publish."""
    made(tmp_path / "in", name)
    base = load_pretrained(str(tmp_path / "in"), 224 if "dinov3" in name else None)
    state = dict(base.encoder)
    for block in (0, 1) if "gated" in name else ():
        before = f"blocks.{block}.mlp"
        for leaf in ("weight", "bias"):
            both = state.pop(f"{before}.fc1.{leaf}")
            state[f"{before}.w3.{leaf}"] = state.pop(f"{before}.fc2.{leaf}")
            if "dinov2" in name:
                state[f"{before}.w12.{leaf}"] = both
            else:
                state[f"{before}.w1.{leaf}"], state[f"{before}.w2.{leaf}"] = both.chunk(2)
    if "dinov3" in name:
        state |= {"storage_tokens": state.pop("reg_token"), "rope_embed.periods": torch.ones(4)}
        for block in (0, 1):
            mask = torch.ones(96)
            mask[32:64] = torch.nan
            state[f"blocks.{block}.attn.qkv.bias_mask"] = mask
            state[f"blocks.{block}.attn.qkv.bias"] = state[f"blocks.{block}.attn.qkv.bias"] * mask
    elif "registers" in name:
        state["register_tokens"] = state.pop("reg_token")
    torch.save(state | {"mask_token": torch.zeros(1, 32)}, tmp_path / "x.pth")
    found = load_pretrained(str(tmp_path / "x.pth"))
    assert found.decoder is None
    assert all(torch.equal(found.encoder[k], v) for k, v in base.encoder.items())
    if "dinov3" in name:
        assert found.shape == base.shape
        torch.save(state | {"rope_embed.periods": torch.ones(3)}, tmp_path / "odd.pth")
        assert "no whole number of heads" in refusal(tmp_path / "odd.pth")
    if "dinov2" in name:  # positions are resized as those of transformers' folder are
        a, b = (
            load_pretrained(str(tmp_path / x), 16).encoder["pos_embed"] for x in ("in", "x.pth")
        )
        assert torch.equal(a, b)


def test_where_no_table_has_positions_the_size_is_part_of_the_weights_hash(tmp_path: Path) -> None:
    """So that a stage at another size is another stage."""
    for name, alike in (("dinov3", False), ("dinov2", False)):
        made(tmp_path / name, name)
        one, other = (load_pretrained(str(tmp_path / name), size).sha256 for size in (16, 32))
        assert (one == other) == alike
        assert one == load_pretrained(str(tmp_path / name), 16).sha256


def test_keys_of_dinov3_learn_no_bias(tmp_path: Path) -> None:
    made(tmp_path, "dinov3")
    encoder = ours(load_pretrained(str(tmp_path)))
    encoder(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for block in encoder.blocks:
        query, key, value = block.attn.qkv.bias.grad.chunk(3)
        assert float(key.abs().max()) == 0
        assert min(float(part.abs().max()) for part in (query, value)) > 0


def test_what_is_not_known_is_refused(tmp_path: Path) -> None:
    for name, change, says in (
        ("dinov2", {"mlp_ratio": "4"}, "mlp_ratio"),
        ("dinov2", {"model_type": "detr"}, "is a detr, none of the image encoders known here"),
        ("dinov2", {"model_type": "resnet"}, ", ".join(one.title for one in TYPES)),
        ("vit", {"hidden_act": "relu"}, "activation is 'relu'"),
        ("siglip", {"hidden_act": "silu"}, "activation is 'silu'"),
        ("dinov3", {"hidden_act": "silu"}, "activation is 'silu'"),
        ("dinov3_gated", {"hidden_act": "gelu"}, "use_gated_mlp with hidden_act 'gelu'"),
        ("vit", {"qkv_bias": False}, "only models with biases"),
        ("dinov3", {"key_bias": True}, "key_bias True, as no published DINOv3"),
        ("dinov3", {"rope_theta": "x"}, "rope_theta"),
        ("siglip", {"vision_use_head": False}, "vision_use_head"),
        ("clip", {"image_size": [32, 64]}, "encoder.pos_embed is (1, 65, 32)"),
        ("clip", {"image_size": [30, 64]}, "image size 30x64 is not a multiple of patch size 4"),
    ):
        if not (tmp_path / name).exists():
            made(tmp_path / name, name)
        path = tmp_path / name / "config.json"
        text = path.read_text()
        path.write_text(json.dumps(json.loads(text) | change))
        assert says in refusal(tmp_path / name)
        path.write_text(text)


@pytest.mark.multi
def test_from_a_folder_to_a_table(tmp_path: Path) -> None:
    """Every stage on two ranks, the decoder first, under ZeRO 1 and 3; positions to 16 pixels.

    One with MAE's decoder, the others with one that costs less.
    """
    from selfdistill.data.pack import pack

    make_images(tmp_path / "images")
    pack(str(tmp_path / "images"), str(tmp_path / "shards"))
    cases = (
        *(("dinov2", "zero1"), ("dinov2_registers", "zero1"), ("dinov2_registers", "zero3")),
        *(("dinov3", "zero3"), ("clip", "zero1"), ("siglip", "zero3")),
    )
    for name in {name for name, _ in cases}:
        made(tmp_path / name, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFDISTILL_DECODERS", str(tmp_path / "shelf"))
        said = run_cases(
            tmp_path,
            [
                {
                    "stage": "all",
                    "data": str(tmp_path / "shards"),
                    "model": str(tmp_path / name),
                    "model.image_size": 16,
                    "output": str(tmp_path / f"run-{name}-{zero}"),
                    "zero": zero,
                    "decoder.steps": 2,
                    "decoder.batch": 8,
                    "pretrain.steps": 2,
                    "distill.steps": 2,
                    "finetune.steps": 2,
                    "finetune.warmup": 1,
                }
                | ({} if name == "dinov2" else {"decoder.width": 32, "decoder.depth": 1})
                for name, zero in cases
            ],
        )
    assert "has no decoder" not in said
    for stage in ("pretrain", "distill-1"):
        a, b = (
            load_file(tmp_path / run / stage / "export" / "model.safetensors")
            for run in ("run-dinov2_registers-zero1", "run-dinov2_registers-zero3")
        )
        assert "embeddings.register_tokens" in a
        assert max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-3
    assert metrics(tmp_path / "run-dinov2-zero1" / "decoder")
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "run-dinov2-zero1" / "finetune" / "export"
    )
    assert model.config.model_type == "dinov2"
