"""Adapters on each kind of encoder: which layers, and merged what they were beside the weights."""

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models import adapters
from selfdistill.engine.models.images.vit_mae import ViTEncoder
from selfdistill.engine.models.texts.language import HEADS, MaskedLanguageModel
from tests.engine.models.test_rows import SHAPE, same
from tests.kit.texts import config_of

#: In a layer: projections of attention, and linear layers in all.
LAYERS = dict.fromkeys(HEADS, (4, 6)) | {"modernbert": (2, 4), "eurobert": (4, 7)}
LAYERS["image"] = (2, 4)


def made(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "image":
        return ViTEncoder(SHAPE)
    return MaskedLanguageModel(config_of(kind, 300)).encoder


def settings(adapt: str, **more: float) -> Config:
    return Config.model_validate({"adapt": adapt, "seed": 3, "lora": {"rank": 4} | more})


def inputs(kind: str) -> Callable[[Any], Iterator[Tensor]]:
    """What an encoder makes of some inputs, whole and in part."""
    generator = torch.Generator().manual_seed(1)
    if kind == "image":
        images = torch.randn(3, 3, 32, 32, generator=generator)
        keep = torch.tensor([[5, 1, 9], [0, 2, 3], [15, 4, 8]])

        def encode(encoder: Any) -> Iterator[Tensor]:
            yield encoder(images)
            yield encoder(images, keep)
            yield encoder(images, cls_only=True)

        return encode
    ids = torch.randint(5, 300, (3, 9), generator=generator)
    return lambda encoder: iter([encoder(ids).last_hidden_state])


def moved(encoder: nn.Module) -> nn.Module:
    """As after some steps: B is no longer zero."""
    with torch.no_grad():
        for _, up, _ in adapters.updates(encoder):
            up.normal_(std=0.1)
    return encoder


@pytest.mark.parametrize("kind", LAYERS)
def test_attention_alone_is_trained(kind: str) -> None:
    encoder = made(kind)
    attention, all_of_them = LAYERS[kind]
    depth = SHAPE.depth if kind == "image" else 2
    found = adapters.attention_layers(encoder)
    assert len(found) == depth * attention, sorted(found)
    assert len(adapters.linear_layers(encoder)) == depth * all_of_them
    adapters.adapt(encoder, settings("attention"))
    trained = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[0] for n in trained} == set(found)
    assert not [n for n in trained if "norm" in n.lower() or "embed" in n]


@pytest.mark.parametrize("kind", LAYERS)
def test_updates_merge_into_a_plain_model(kind: str) -> None:
    plain, encode, config = made(kind).eval(), inputs(kind), settings("lora", alpha=6)
    encoder = copy.deepcopy(plain)
    adapters.adapt(encoder, config)
    for ours, theirs in zip(encode(encoder), encode(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # B is zero
    moved(encoder)
    tensors = adapters.merged(encoder.state_dict(), config.lora)
    before = list(encode(plain))
    plain.load_state_dict(tensors)
    for ours, theirs, first in zip(encode(encoder), encode(plain), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert (ours - first).abs().max() > 1e-2
    # PEFT's own merging.
    for module in encoder.modules():
        if hasattr(module, "lora_A"):
            layer: Any = module
            layer.merge()
    theirs = {n.replace("base_layer.", ""): v for n, v in encoder.state_dict().items()}
    for name, value in tensors.items():
        torch.testing.assert_close(value, theirs[name])


def test_some_rows_are_those_of_the_whole_pass() -> None:
    """Values and gradients of the CLS row that the last block makes alone, in float64."""
    encoder = made("image")
    adapters.adapt(encoder, settings("lora"))
    moved(encoder).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    same(encoder, lambda: encoder(images, cls_only=True)[:, 0], lambda: encoder(images)[:, 0])


def test_first_values_are_those_of_the_seed() -> None:
    """Whatever was drawn before; B is zero, A differs between layers and seeds."""
    found = []
    for draws, seed in ((0, 3), (7, 3), (0, 4)):
        encoder, config = made("image"), settings("lora")
        config.seed = seed
        torch.rand(draws)
        adapters.adapt(encoder, config)
        found.append([(a, b) for a, b, _ in adapters.updates(encoder)])
    assert all(torch.equal(x[0], y[0]) for x, y in zip(found[0], found[1], strict=True))
    assert not any(torch.equal(x[0], y[0]) for x, y in zip(found[0], found[2], strict=True))
    assert not torch.equal(found[0][0][0], found[0][1][0])
    assert not any(b.any() for _, b in found[0])


def test_dropout_is_before_the_update() -> None:
    encoder = made("image")
    adapters.adapt(encoder, settings("lora", dropout=0.5))
    moved(encoder)
    images = torch.randn(2, 3, 32, 32)
    for cls_only in (False, True):
        one, two = (encoder.train()(images, cls_only=cls_only) for _ in range(2))
        assert not torch.equal(one, two)
        one, two = (encoder.eval()(images, cls_only=cls_only) for _ in range(2))
        assert torch.equal(one, two)


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"--lora.rank 48: .* 48 wide.* give at most 24"):
        adapters.adapt(made("image"), settings("lora", rank=48))


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    sys.path_importer_cache.clear()
    adapters.check(settings("attention"))
    with pytest.raises(UserError, match="pip install peft"):
        adapters.check(settings("lora"))


def test_fp16_is_refused() -> None:
    with pytest.raises(UserError, match="rounds the weights that --adapt attention freezes"):
        adapters.check(settings("attention").model_copy(update={"precision": "fp16"}))
    adapters.check(settings("full").model_copy(update={"precision": "fp16"}))
