"""What a plan says of stage 0, against transformers' modules, PyTorch's counter and its hooks."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import RobertaConfig, ViTMAEConfig, ViTMAEForPreTraining

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images import rows_block
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTMAE, random_mask
from selfdistill.engine.models.texts.language import MaskedLanguageModel, with_dropout
from selfdistill.engine.runtime import zero
from selfdistill.launcher.plan.activations import Blocks, masked_images, masked_texts
from selfdistill.launcher.plan.tables import need, time_sheet
from tests.kit.shards import uneven
from tests.launcher.plan.test_plan import SHAPE, made, saved


@pytest.mark.parametrize(
    ("recipe", "more", "first"),
    [
        ("dinov2_small", {}, "decoder"),
        ("minilm", {}, "decoder"),
        ("vit_base", {}, "pretrain"),
        ("roberta_base", {}, "pretrain"),
        ("quickstart", {}, "pretrain"),  # folders, which are read
        ("quickstart_text", {}, "pretrain"),
        ("dinov2_small", {"decoder__auto": False}, "pretrain"),
        ("dinov2_small", {"stage": "decoder", "decoder__auto": False}, "decoder"),
        ("dinov2_small", {"stage": "distill"}, "distill"),
    ],
)
def test_it_is_planned_where_there_is_none(
    recipe: str, more: dict[str, object], first: str
) -> None:
    jobs = made({"tokens": 100}, recipe=recipe, **({"stage": "all"} | more)).jobs
    assert jobs[0].name == first
    assert [job.stage for job in jobs].count("decoder") == (first == "decoder")


def test_a_model_with_a_decoder_is_refused() -> None:
    with pytest.raises(UserError, match="facebook/vit-mae-base has a decoder"):
        made(recipe="vit_base", stage="decoder")


def test_general_data_are_counted(tmp_path: Path) -> None:
    uneven(tmp_path / "train", [7, 3], size=16)
    more = {"decoder__data": str(tmp_path), "decoder__epochs": 4, "decoder__batch": 5}
    found = made(recipe="dinov2_small", **more)
    general, own = found.jobs[:2]
    assert (general.samples, own.samples) == (10, 6000)
    assert general.sample_bytes is not None


@pytest.mark.parametrize("width", [None, 128])
def test_the_decoder_alone_is_trained(width: int | None) -> None:
    """DINOv2-S with MAE's decoder, or a thinner one: transformers' has the same parameters."""
    with torch.device("meta"):
        config = ViTMAEConfig(image_size=224, patch_size=14, hidden_size=384, num_attention_heads=6)
        if width:
            config.decoder_hidden_size, config.decoder_intermediate_size = width, 4 * width
            config.decoder_num_hidden_layers = 2
        theirs = ViTMAEForPreTraining(config).decoder
    asked = {"decoder__width": width, "decoder__depth": 2} if width else {}
    found = made(recipe="dinov2_small", precision="fp32", **asked)
    parameters = found.work.parameters("decoder", 0)
    assert parameters.trained == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert parameters.all == found.work.parameters("pretrain", 0).all
    job, later = found.jobs[:2]
    alone, full = (need(found, one, zero.read("zero0")) for one in (job, later))
    assert alone.optimizer == 8 * parameters.trained
    assert alone.weights == full.weights
    assert alone.activations < full.activations


def test_the_head_alone_is_trained() -> None:
    """BERT's: a dense layer, LayerNorm and a bias; its matrix is the encoder's embedding."""
    found = made({"tokens": 100}, recipe="minilm").work.parameters("decoder", 0)
    assert found.trained == 384**2 + 3 * 384 + 30_522


def test_its_time_is_what_the_counter_counts() -> None:
    found = made(recipe="dinov2_small")
    shape: Shape = found.work.base.shape
    with torch.device("meta"):
        model = ViTMAE(shape)
        model.encoder.requires_grad_(False)
        images, noise = torch.randn(2, 3, 224, 224), torch.rand(2, shape.patches)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            keep, hidden, _ = random_mask(noise, shape.mask_ratio)
            model.decoder(model.encoder(images, keep), keep, hidden).sum().backward()
    # The encoder's output needs no gradient: of the embedding's backward one product is left out.
    spared = 2 * (1 + shape.kept) * shape.width * shape.decoder_width
    job = found.jobs[0]
    one = found.work.flops("decoder", found.mode, 0)
    assert one - spared == pytest.approx(counter.get_total_flops() / 2, rel=1e-9)
    rows = [row for row in time_sheet(found).rows if row and row[0] == "decoder"]
    assert rows[0][1:4] == ("2,000", "64", f"{one / 1e9:.1f}")
    assert job.section.batch == 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        rows_block, "_attention", lambda q, k, v, p: attention(q, k, v, dropout_p=p)
    )
    images, noise = torch.randn(4, 3, 64, 64), torch.rand(4, SHAPE.patches)
    mae = ViTMAE(SHAPE)
    mae.encoder.requires_grad_(False)
    found = saved(mae, lambda: mae(images, noise), dtype) / 4
    assert 0.97 < masked_images(SHAPE, dtype.itemsize, frozen=True) / found < 1.2


def test_activations_of_texts() -> None:
    batch, tokens, vocabulary = 4, 64, 1000
    config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=384,
        max_position_embeddings=130,
        type_vocab_size=1,
    )
    model = MaskedLanguageModel(with_dropout(config, 0.0))
    model.encoder.requires_grad_(False)
    ids = torch.randint(5, vocabulary, (batch, tokens))
    at = torch.arange(0, batch * tokens, 7)
    view = {"masked_ids": ids, "attention_mask": torch.ones_like(ids), "masked_at": at}
    view |= {"originals": ids.flatten()[at], "scale": torch.tensor(1.0)}
    found = saved(model, lambda: model.reconstruct(**view)["loss"], torch.float32) / batch
    masked = len(at) / batch
    sizes = (tokens, masked, vocabulary, 4)
    estimate = masked_texts(Blocks(3, 96, 384, 3), *sizes, mask=0, cuts=True, frozen=True)
    later = 4 * masked * vocabulary  # the logits' gradient, which is made in the backward
    assert 0.97 <= (estimate - later) / found < 1.12
