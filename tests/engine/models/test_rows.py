"""What is left out after the last block changes nothing that is read: against the whole pass."""

from collections.abc import Callable

import pytest
import torch
from timm.layers import Attention
from torch import Tensor, nn

from selfdistill.engine.models.images.rows_block import RowsAttention
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE
from selfdistill.engine.models.texts.classifier import TextClassifier
from selfdistill.engine.models.texts.language import MaskedLanguageModel
from tests.kit.texts import config_of

SHAPE = Shape(32, 8, 48, 3, 3, 100, 32, 1, 2, 64)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of all parameters that the loss depends on."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: g for n, g in zip(named, found, strict=True) if g is not None}


def same(model: nn.Module, short: Callable[[], Tensor], whole: Callable[[], Tensor]) -> None:
    """Both give the same vectors and, of a curved loss, the same gradients; in float64."""
    ours, theirs = short(), whole()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    one, two = (gradients(model, v.sin().pow(2).sum()) for v in (ours, theirs))
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-9, atol=1e-12, msg=name)


def test_images() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(SHAPE).double()
    nn.init.normal_(encoder.blocks[-1].attn.qkv.bias)  # zeros would hide a wrong slice
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    assert encoder(images, cls_only=True).shape == (3, 1, 48)
    same(encoder, lambda: encoder(images, cls_only=True)[:, 0], lambda: encoder(images)[:, 0])
    keep = torch.tensor([[5, 1, 9], [0, 2, 3], [15, 4, 8]])
    same(
        encoder,
        lambda: encoder(images, keep, cls_only=True)[:, 0],
        lambda: encoder(images, keep)[:, 0],
    )


def test_attention_is_timms_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = RowsAttention(48, num_heads=3, qkv_bias=True), Attention(48, 3, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 17, 48)
    one, two = ours(x), theirs(x)
    assert torch.equal(one, two)
    found = [gradients(m, v.sin().sum()) for m, v in ((ours, one), (theirs, two))]
    assert set(found[0]) == {f"{n}.{k}" for n in ("qkv", "proj") for k in ("weight", "bias")}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_masked_patches_of_the_decoder() -> None:
    torch.manual_seed(0)
    mae = ViTMAE(SHAPE).double()
    for block in (*mae.encoder.blocks, *mae.decoder.blocks):
        nn.init.normal_(block.attn.qkv.bias)
    images, noise = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.rand(3, 16)
    read = mae(images, noise)
    assert read["prediction"].shape == (3, 12, 192)

    def whole() -> Tensor:
        found = mae(images, noise, whole=True)
        assert found["prediction"].shape == (3, 16, 192)
        masked: Tensor = found["prediction"][found["mask"].bool()]
        return masked.view(3, 12, 192)

    same(mae, lambda: mae(images, noise)["prediction"], whole)
    losses = [mae(images, noise, whole=w)["loss"] for w in (False, True)]
    torch.testing.assert_close(*losses)


def test_dropout_of_the_row_has_its_rate() -> None:
    torch.manual_seed(0)
    encoder = ViTEncoder(SHAPE, dropout=0.5)
    rows: list[Tensor] = []
    encoder.blocks[-1].attn.proj_drop.register_forward_hook(lambda *a: rows.append(a[2]))
    network = ViTClassifier(encoder, 4)
    network(torch.randn(64, 3, 32, 32))
    assert rows[0].shape == (64, 1, 48)
    assert float((rows[0] == 0).float().mean()) == pytest.approx(0.5, abs=0.05)
    network.eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(network(images), network(images))


@pytest.mark.parametrize("kind", ["roberta", "bert", "xlm-roberta", "camembert", "mpnet"])
def test_texts(kind: str) -> None:
    torch.manual_seed(0)
    config = config_of(kind, 40)
    model = MaskedLanguageModel(config).double().eval()
    ids = torch.randint(5, config.vocab_size, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    ids[0, 7:] = config.pad_token_id
    view = {"input_ids": ids, "attention_mask": mask}
    short = model.encode(cls_only=True, **view)[0]
    assert short.shape[1] == (12 if kind == "mpnet" else 1)
    same(
        model,
        lambda: model.encode(cls_only=True, **view)[0][:, 0],
        lambda: model.encode(**view)[0][:, 0],
    )
    at = torch.tensor([1, 3, 14, 15, 30])

    def whole() -> Tensor:
        hidden = model.encode(**view)[0].flatten(0, 1)[at]
        return model.head(model.network, hidden).float()

    def ours() -> Tensor:
        masked = {"masked_ids": ids, "attention_mask": mask, "masked_at": at}
        scale = torch.tensor(1.0, dtype=torch.float64)
        return model.reconstructed(**masked, originals=ids.flatten()[at], scale=scale)[1]

    torch.testing.assert_close(ours(), whole())
    config.num_labels = 3
    classifier = TextClassifier(config).double().eval()
    same(
        classifier,
        lambda: classifier.classify(**view),
        lambda: classifier.network(**classifier.inputs(**view)).logits,
    )
