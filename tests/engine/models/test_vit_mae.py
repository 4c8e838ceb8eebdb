"""ViT-MAE against transformers' own classes: same weights, images and mask, same gradients."""

from functools import partial
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTForImageClassification
from transformers.models.vit_mae import modeling_vit_mae

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.options import load
from selfdistill.engine.models.images.patches import patchify, unpatchify
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.vit import ViT, split_decoder
from selfdistill.engine.models.images.vit_mae import (
    ViTClassifier,
    ViTEncoder,
    ViTMAE,
    mae_loss,
    position_table,
    random_mask,
)
from selfdistill.engine.models.images.weights import Pretrained, load_pretrained
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.image import ImageModality
from tests.kit import models as kit

TINY = Shape(16, 4, 32, 2, 2, 48, 16, 1, 2, 24)


def assert_same_gradients(ours: nn.Module, theirs: dict[str, Tensor]) -> None:
    """Within 1e-4 of each tensor's norm; key biases, zero up to rounding, absolutely."""
    gradients = {k: p.grad for k, p in ours.named_parameters() if p.requires_grad}
    assert gradients.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = gradients[name]
        assert got is not None, name
        if name.endswith("qkv.bias"):
            third = len(expected) // 3
            key, key_expected = got[third : 2 * third], expected[third : 2 * third]
            assert key.abs().max() < 1e-6
            assert key_expected.abs().max() < 1e-6
            keep = torch.ones(len(expected), dtype=torch.bool)
            keep[third : 2 * third] = False
            got, expected = got[keep], expected[keep]
        assert expected.norm() > 0, name
        assert (got - expected).norm() <= 1e-4 * expected.norm(), name


def hf_gradients(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    decoder, rest = split_decoder(found)
    encoder, _ = ViT.names.ours(rest)
    return encoder, decoder


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-2])
def test_loss_and_every_gradient_equal_transformers(
    tmp_path: Path, normalized: bool, eps: float
) -> None:
    oracle = kit.hf_mae(norm_pix_loss=normalized, layer_norm_eps=eps)
    oracle.save_pretrained(tmp_path)
    model = kit.built(load_pretrained(str(tmp_path)))
    images, noise = kit.batch()

    expected = oracle(images, noise=noise)
    got = model(images, noise)
    assert got["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-5)
    masked = expected.logits[expected.mask.bool()].view_as(got["prediction"])
    torch.testing.assert_close(got["prediction"], masked, rtol=1e-4, atol=1e-5)
    whole = model(images, noise, whole=True)
    torch.testing.assert_close(whole["prediction"], expected.logits, rtol=1e-4, atol=1e-5)
    assert whole["loss"].item() == pytest.approx(expected.loss.item(), rel=1e-5)
    assert torch.equal(got["mask"], expected.mask)

    expected.loss.backward()
    got["loss"].backward()
    encoder, decoder = hf_gradients(oracle)
    assert_same_gradients(model.encoder, encoder)
    assert_same_gradients(model.decoder, decoder)


def test_distillation_gradient_through_both_views_equals_transformers(tmp_path: Path) -> None:
    oracle = kit.hf_mae()
    oracle.save_pretrained(tmp_path)
    model = kit.built(load_pretrained(str(tmp_path)))
    images, noise = kit.batch()
    target = torch.randn(5, 128, generator=torch.Generator().manual_seed(3))

    masked = oracle(images, noise=noise).loss
    # transformers' encoder always masks: ratio 0 with rising noise is the whole image in order.
    oracle.config.mask_ratio = 0.0
    rising = torch.arange(16.0).expand(5, -1)
    cls = oracle.vit(images, noise=rising).last_hidden_state[:, 0]
    (masked + (cls - target).pow(2).sum(1).mean()).backward()

    ours = model.encoder(images)
    torch.testing.assert_close(ours[:, 0], cls, rtol=1e-5, atol=1e-5)
    (model(images, noise)["loss"] + (ours[:, 0] - target).pow(2).sum(1).mean()).backward()
    assert_same_gradients(model.encoder, hf_gradients(oracle)[0])


@pytest.mark.parametrize("eps", [1e-12, 1e-2])
def test_classifier_logits_and_gradients_equal_transformers(tmp_path: Path, eps: float) -> None:
    oracle = kit.hf_classifier(layer_norm_eps=eps)
    oracle.save_pretrained(tmp_path)
    weights = load_pretrained(str(tmp_path))
    encoder = ViTEncoder(weights.shape)
    encoder.load_state_dict(weights.encoder)
    model = ViTClassifier(encoder, classes=3)
    model.head.load_state_dict(oracle.classifier.state_dict())
    images, _ = kit.batch()
    labels = torch.tensor([0, 1, 2, 1, 0])

    expected = oracle(images, labels=labels)
    logits = model(images)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    expected.loss.backward()
    F.cross_entropy(logits, labels).backward()
    assert_same_gradients(model.encoder, hf_gradients(oracle)[0])
    torch.testing.assert_close(model.head.weight.grad, oracle.classifier.weight.grad)
    # transformers' ViT trains its position embeddings; so does ours, once it is a classifier.
    assert model.encoder.pos_embed.grad is not None


def test_mean_pooling_takes_the_patches_alone() -> None:
    model = ViTClassifier(ViTEncoder(TINY), classes=4, pool="mean").eval()
    images, _ = kit.batch()
    tokens = model.encoder(images)
    torch.testing.assert_close(model(images), model.head(tokens[:, 1:].mean(1)))


def test_dropout_sits_where_transformers_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = ViTForImageClassification(kit.hf_classifier(hidden_dropout_prob=0.25).config)
    calls: list[float] = []
    real = F.dropout

    def count(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        calls.append(p if training else 0.0)
        return real(x, p, training, inplace)

    monkeypatch.setattr(F, "dropout", count)
    images, _ = kit.batch()
    ViTEncoder(TINY, dropout=0.25).train()(images)
    ours = [p for p in calls if p]
    calls.clear()
    oracle.train()(images)
    assert ours == [p for p in calls if p] == [0.25] * 5


def test_mask_equals_transformers_also_where_rounding_bites() -> None:
    for patches, ratio in ((16, 0.75), (49, 0.75), (196, 0.6), (9, 0.7)):
        noise = torch.rand(4, patches, generator=torch.Generator().manual_seed(patches))
        embeddings = modeling_vit_mae.ViTMAEEmbeddings(kit.hf_mae(mask_ratio=ratio).config)
        tokens = torch.arange(4.0 * patches).view(4, patches, 1)
        kept, mask, _ = embeddings.random_masking(tokens, noise)
        keep, hidden, our_mask = random_mask(noise, ratio)
        assert torch.equal(our_mask, mask)
        assert torch.equal(hidden, mask.nonzero()[:, 1].view(4, -1))
        assert torch.equal(tokens.gather(1, keep[:, :, None]), kept)


def test_encoder_of_kept_patches_ignores_the_masked_ones() -> None:
    encoder = ViTEncoder(TINY).eval()
    images, noise = kit.batch()
    keep, _, mask = random_mask(noise, 0.75)
    hidden = mask.view(5, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].bool()
    changed = torch.where(hidden, torch.randn_like(images), images)
    assert encoder(images, keep).shape == (5, 1 + 4, 32)
    torch.testing.assert_close(encoder(images, keep), encoder(changed, keep))
    assert not torch.allclose(encoder(images), encoder(changed))


def test_patches_are_cut_in_transformers_order_and_put_back() -> None:
    images, _ = kit.batch()
    assert torch.equal(patchify(images, 4), kit.hf_mae().patchify(images))
    assert torch.equal(unpatchify(patchify(images, 4), 4, (images.shape[2] // 4,) * 2), images)


def test_position_table_is_transformers_with_width_first() -> None:
    config = kit.hf_mae().config
    embeddings = modeling_vit_mae.ViTMAEEmbeddings(config)
    embeddings.initialize_weights()
    assert torch.equal(position_table(128, 4), embeddings.position_embeddings)
    # The first half tells the column: patches 1 and 5 of a grid of 4 share it.
    table = position_table(128, 4)[0, 1:]
    for rows, columns in ((4, 2), (2, 4), (1, 4)):  # a part of the square's
        part = table.view(4, 4, 128)[:rows, :columns].reshape(-1, 128)
        assert torch.equal(position_table(128, (rows, columns))[0, 1:], part)
    assert torch.equal(table[1, :64], table[5, :64])
    assert not torch.equal(table[1, 64:], table[5, 64:])


def test_fresh_weights_are_maes_and_train() -> None:
    torch.manual_seed(0)
    model = ViTMAE(Shape(16, 4, 64, 2, 2, 128, 32, 1, 2, 64))
    qkv = model.encoder.blocks[0].attn.qkv.weight
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.95 * bound < qkv.abs().max() <= bound
    patch = model.encoder.patch_embed.proj.weight
    bound = (6 / (64 + 48)) ** 0.5
    assert 0.95 * bound < patch.abs().max() <= bound
    assert 0.01 < model.encoder.cls_token.std() < 0.03
    assert 0.01 < model.decoder.mask_token.std() < 0.03
    fixed = {k for k, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"encoder.pos_embed", "decoder.pos_embed"}
    assert model.decoder.pos_embed.abs().max() == 1

    images = torch.randn(16, 3, 16, 16).cumsum(-1).cumsum(-2)
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    losses = []
    for _ in range(40):
        loss = model(images, torch.rand(16, 16))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_half_precision_model_has_an_fp32_loss() -> None:
    model = ViTMAE(TINY)
    images, noise = kit.batch()
    exact = model(images, noise)["loss"]
    half = model.bfloat16()(images, noise)
    assert half["loss"].dtype == torch.float32
    assert half["prediction"].dtype == torch.bfloat16
    assert half["loss"].item() == pytest.approx(exact.item(), rel=0.02)


@pytest.mark.parametrize("normalized", [True, False])
def test_half_precision_prediction_meets_an_unrounded_target(normalized: bool) -> None:
    images, noise = kit.batch()
    prediction = torch.randn(5, 12, 48).bfloat16()
    hidden = random_mask(noise, 0.75)[1]
    loss = mae_loss(prediction, images, hidden, normalized)
    assert torch.equal(loss, mae_loss(prediction.float(), images, hidden, normalized))


def test_parameters_are_used_in_their_owners_forward_only() -> None:
    """ZeRO-3 in miniature: a parameter exists while its owner's own forward runs, and else not."""
    mae, images, noise = ViTMAE(TINY).eval(), *kit.batch()
    classifier = ViTClassifier(ViTEncoder(TINY), classes=3).eval()
    with torch.no_grad():
        expected = mae(images, noise)["loss"], classifier(images)
    for model in (mae, classifier):
        for module in model.modules():
            own = {k: p.data for k, p in module.named_parameters(recurse=False)}

            def gather(module: nn.Module, *_: object, own: dict[str, Tensor] = own) -> None:
                for name, value in own.items():
                    getattr(module, name).data = value

            def release(module: nn.Module, *_: object, own: dict[str, Tensor] = own) -> None:
                for name in own:
                    getattr(module, name).data = torch.empty(0)

            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            release(module)
    with torch.no_grad():
        got = mae(images, noise)["loss"], classifier(images)
        # The hooks do bite: a reach from outside finds nothing.
        assert mae.encoder.cls_token.numel() == 0
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_size": 18}, "not a multiple of patch size"),
        ({"width": 30}, "30 is not a multiple of both 4 and its 2 heads"),
        ({"decoder_heads": 3}, "decoder_width 16"),
        ({"mask_ratio": 0.99}, "keeps 0 of 16"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, int], says: str) -> None:
    with pytest.raises(UserError, match=says):
        Shape(**{**TINY.__dict__, **change})


def test_stochastic_depth_is_timms() -> None:
    """The same draws, and so the same tokens."""
    shape = Shape(32, 8, 48, 4, 3, 96, 32, 1, 2, 64)
    base = Pretrained.fresh(ViTMAE(shape))
    config = load({"finetune.drop_path": 0.5, "finetune.dropout": 0})
    run = Run(config, Ranks(0, 0, 1, torch.device("cpu")), Path())
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
        norm_layer=partial(nn.LayerNorm, eps=shape.norm_eps),
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
    whole = ViTEncoder(shape)
    whole.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(images), whole(images))
