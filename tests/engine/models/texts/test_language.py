"""Language models against transformers' own on the same weights, ids and masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import Texts
from selfdistill.engine.checkpoints.export import export_transformers
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models.texts.language import HEADS
from selfdistill.engine.models.texts.weights import load_language
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.text import TextModality
from selfdistill.engine.training.modalities.tokens import Encoder
from selfdistill.engine.training.views import MaskTokens
from tests.kit import texts as text_kit


def kind_of(model: Path, **more: Any) -> TextModality:
    config = Config()
    config.model.path = str(model)
    for name, value in more.items():
        section, _, leaf = name.partition("__")
        setattr(getattr(config, section), leaf, value)
    return TextModality(Run(config, Ranks(0, 0, 1, torch.device("cpu")), Path()), None)


def batch_of(tokenizer: Any, texts: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch, masked by a generator of its own."""
    found = tokenizer(texts, padding=True, return_tensors="pt", return_special_tokens_mask=True)
    ids, special = found["input_ids"], found["special_tokens_mask"].bool()
    generator = torch.Generator().manual_seed(seed)
    chosen = (torch.rand(ids.shape, generator=generator) < 0.4) & ~special
    return {
        "input_ids": ids,
        "attention_mask": found["attention_mask"],
        "masked_ids": ids.masked_fill(chosen, tokenizer.mask_token_id),
        "masked_at": chosen.flatten().nonzero().flatten(),
        "originals": ids[chosen],
        "labels": ids.masked_fill(~chosen, -100),
    }


@pytest.mark.parametrize("name", HEADS)
def test_loss_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / name, kind=name)
    oracle = AutoModelForMaskedLM.from_pretrained(folder).train()
    kind = kind_of(folder, mlm__dropout=0.0)
    model = kind.autoencoder(kind.load()).train()
    batch = batch_of(AutoTokenizer.from_pretrained(folder), text_kit.SENTENCES)
    count = len(batch["masked_at"])
    ours = model.reconstruct(**batch, scale=torch.tensor(1 / count))["loss"]
    theirs = oracle(
        input_ids=batch["masked_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["labels"],
    ).loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    ours.backward()
    theirs.backward()
    gradients = {n: p.grad for n, p in model.network.named_parameters()}
    largest = max(p.grad.norm() for p in oracle.parameters() if p.grad is not None)
    for key, parameter in oracle.named_parameters():
        if parameter.grad is None:
            assert gradients[key] is None, key
            continue
        # Key biases have no gradient but rounding: against the largest, not their own.
        error = (gradients[key] - parameter.grad).norm()
        assert error <= 1e-5 * max(parameter.grad.norm(), 1e-3 * largest), key


@pytest.mark.parametrize("name", HEADS)
def test_features_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / name, kind=name)
    oracle = AutoModel.from_pretrained(folder).eval()
    kind = kind_of(folder)
    encoder = kind.encoder(kind.load()).eval()
    batch = batch_of(AutoTokenizer.from_pretrained(folder), text_kit.SENTENCES)
    names = ("input_ids", "attention_mask")
    with torch.no_grad():
        ours, counts = encoder.encode(**batch)
        theirs = oracle(**{k: batch[k] for k in names}).last_hidden_state
    assert torch.equal(counts, batch["attention_mask"])
    assert torch.allclose(ours, theirs, atol=1e-6)
    # A teacher has no dropout and padding changes nothing.
    alone = batch_of(AutoTokenizer.from_pretrained(folder), text_kit.SENTENCES[:1])
    with torch.no_grad():
        short = encoder.encode(**alone)[0]
    assert torch.allclose(short[0], ours[0, : short.shape[1]], atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_settings_tell_what_tensors_do_not(name: str, tmp_path: Path) -> None:
    base = load_language(str(text_kit.make_language(tmp_path / "x", kind=name)))
    assert load_language(str(tmp_path / "x")).settings == base.settings
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    activation = next(k for k in config if k in ("hidden_act", "activation", "hidden_activation"))
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {activation: "relu"}))
    assert load_language(str(tmp_path / "x")).settings != base.settings
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert load_language(str(tmp_path / "x")).settings == base.settings
    lower = json.loads((tmp_path / "x" / "tokenizer.json").read_text())
    lower["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "x" / "tokenizer.json").write_text(json.dumps(lower))
    assert load_language(str(tmp_path / "x")).settings != base.settings


@pytest.mark.parametrize("name", HEADS)
def test_classifier_is_that_of_transformers_and_exports_to_it(name: str, tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / name, kind=name)
    kind = kind_of(folder, finetune__dropout=0.0)
    base = kind.load()
    model = kind.classifier(base, ["a", "b", "c"], seed=3).eval()
    state = dict(model.network.named_parameters())
    export_transformers(tmp_path / "out", model.network, state, base.tokenizer, base.config)
    oracle = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert oracle.config.id2label == {0: "a", 1: "b", 2: "c"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = batch_of(tokenizer, text_kit.SENTENCES)
    with torch.no_grad():
        ours = model.classify(**batch)
        theirs = oracle(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(ours, theirs, atol=1e-6)
    # The encoder is the base's.
    again = load_language(str(tmp_path / "out"))
    shared = again.encoder.keys() & base.encoder.keys()
    assert shared == {k for k in base.encoder if "pooler" not in k}
    assert all(torch.equal(again.encoder[k], base.encoder[k]) for k in shared)
    assert not again.decoder  # EuroBERT's is its embeddings


@pytest.mark.parametrize("name", HEADS)
def test_export_is_exact_and_ties_stay(name: str, tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / name, kind=name)
    kind = kind_of(folder, mlm__dropout=0.3)
    base = kind.load()
    model = kind.autoencoder(base)
    embedding = model.network.get_input_embeddings().weight
    assert model.network.get_output_embeddings().weight is embedding
    state = dict(model.network.named_parameters())
    export_transformers(tmp_path / "out", model.network, state, base.tokenizer, base.config)
    first, second = (load_file(p / "model.safetensors") for p in (folder, tmp_path / "out"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert load_language(str(tmp_path / "out")).sha256 == base.sha256
    before, after = (
        AutoModelForMaskedLM.from_pretrained(p).config for p in (folder, tmp_path / "out")
    )
    rate = "dropout" if name == "distilbert" else "hidden_dropout_prob"
    assert getattr(before, rate) == getattr(after, rate) == 0.0


def refusal(source: Path, max_length: int | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_language(str(source), max_length)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_without_a_pad_id_takes_its_tokenizers(tmp_path: Path) -> None:
    """As some are published; positions are counted from it, so it is not to be guessed."""
    whole = load_language(str(text_kit.make_language(tmp_path / "whole")))
    folder = text_kit.make_language(tmp_path / "null")
    config = json.loads((folder / "config.json").read_text())
    for value in (None, "absent"):
        if value is None:
            config["pad_token_id"] = None
        else:
            del config["pad_token_id"]
        (folder / "config.json").write_text(json.dumps(config))
        found = load_language(str(folder))
        assert found.sha256 == whole.sha256
        assert found.max_length == whole.max_length
        assert found.config.pad_token_id == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_position_embeddings", None),
        ("vocab_size", None),
        ("hidden_size", "wide"),
        ("num_attention_heads", 5),
        ("model_type", None),
    ],
)
def test_a_config_with_a_hole_is_one_line(name: str, value: object, tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {name: value}))
    assert str(folder) in refusal(folder)


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    tokenizer = text_kit.make_tokenizer()
    config = GPT2Config(vocab_size=300, n_embd=24, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    assert "'gpt2'" in refusal(tmp_path / "gpt2")
    assert "no weights at" in refusal(tmp_path / "nowhere" / "at" / "all")

    bare = text_kit.make_language(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "tokenizer" in refusal(bare)

    small = text_kit.make_language(tmp_path / "small")
    larger = text_kit.make_tokenizer()
    larger.add_tokens([f"word{i}" for i in range(50)])
    larger.save_pretrained(small)
    assert "has ids up to" in refusal(small)

    whole = text_kit.make_language(tmp_path / "whole", tokenizer=tokenizer)
    assert "62 tokens at most" in refusal(whole, 100)
    tensors = load_file(whole / "model.safetensors")
    key = "roberta.encoder.layer.1.output.dense.weight"
    save_file({k: v for k, v in tensors.items() if k != key}, whole / "model.safetensors")
    assert key in refusal(whole)
    save_file(
        tensors | {key: torch.full_like(tensors[key], torch.nan)}, whole / "model.safetensors"
    )
    assert "NaN" in refusal(whole)

    headless = text_kit.make_language(
        tmp_path / "headless", tokenizer=text_kit.make_tokenizer(mask=False)
    )
    kind = kind_of(headless)
    with pytest.raises(UserError, match="no mask token"):
        kind.mask(kind.load())


def test_an_encoder_alone_gets_a_new_head(tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / "whole")
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "alone")
    text_kit.make_tokenizer().save_pretrained(tmp_path / "alone")
    kind = kind_of(tmp_path / "alone")
    base = kind.load()
    assert base.decoder is None
    whole = AutoModelForMaskedLM.from_pretrained(folder)
    assert whole.lm_head.dense.bias.any()
    assert not kind.autoencoder(base).network.lm_head.dense.bias.any()


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "roberta"])
def test_segments_are_those_of_the_tokenizer(name: str) -> None:
    """Also where a text has a separator written out; a model of one segment gets none."""
    words = ["a", "b </s> c", "<pad> d"]
    tokenizer = text_kit.make_tokenizer(segments=name != "roberta")
    encode = Encoder(tokenizer, 32, 1 if name == "roberta" else 2)
    codec = Texts(encode, pad_id=1, special_ids=frozenset({0, 2}), max_length=32, bucket=32)
    pairs = [(a, b) for a in words for b in words]
    arrays = [np.asarray(encode(a, b)) for a, b in pairs]
    found = codec.collate(arrays, [""] * len(arrays))
    theirs = tokenizer(*map(list, zip(*pairs, strict=True)), padding="max_length", max_length=32)
    assert found["input_ids"].tolist() == theirs["input_ids"]
    assert found["attention_mask"].tolist() == theirs["attention_mask"]
    if name == "roberta":
        assert "token_type_ids" not in found
    else:
        assert found["token_type_ids"].tolist() == theirs["token_type_ids"]
        assert found["token_type_ids"].any()


def test_masks_are_keyed_and_leave_special_tokens() -> None:
    ids = torch.randint(5, 300, (64, 40))
    maskable = torch.rand(64, 40) < 0.8
    positions = np.arange(64, dtype=np.int64)
    mask = MaskTokens(0, 0.15, "mask", 4, 300)
    found = mask(positions, {"input_ids": ids, "maskable": maskable})
    chosen = np.zeros(64 * 40, bool)
    chosen[found["masked_at"]] = True
    chosen = chosen.reshape(64, 40)
    assert not (chosen & ~maskable.numpy()).any()
    assert chosen.sum() / maskable.sum() == pytest.approx(0.15, abs=0.03)
    assert (found["masked_ids"][chosen] == 4).all()
    assert (found["masked_ids"][~chosen] == ids.numpy()[~chosen]).all()
    assert (found["originals"] == ids.numpy()[chosen]).all()
    # Of a sample alone, padded to another length, the same tokens are masked.
    one = mask(positions[7:8], {"input_ids": ids[7:8, :32], "maskable": maskable[7:8, :32]})
    assert (one["masked_ids"][0] == found["masked_ids"][7, :32]).all()


def test_bert_policy_has_its_shares() -> None:
    ids = torch.randint(5, 300, (256, 64))
    everything = torch.ones_like(ids, dtype=torch.bool)
    found = MaskTokens(0, 0.15, "bert", 4, 300)(
        np.arange(256, dtype=np.int64), {"input_ids": ids, "maskable": everything}
    )
    after = found["masked_ids"].reshape(-1)[found["masked_at"]]
    masked, same = (after == 4).mean(), (after == found["originals"]).mean()
    assert masked == pytest.approx(0.8, abs=0.03)
    assert same == pytest.approx(0.1, abs=0.03)
    assert len(after) / ids.numel() == pytest.approx(0.15, abs=0.01)


def test_no_maskable_token_gives_no_loss(tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / "model")
    kind = kind_of(folder)
    model = kind.autoencoder(kind.load())
    ids = torch.tensor([[0, 2]])
    view = kind.mask(kind.load())(
        np.zeros(1, np.int64), {"input_ids": ids, "maskable": torch.zeros(1, 2, dtype=torch.bool)}
    )
    batch = {k: torch.from_numpy(v) for k, v in view.items()} | {
        "attention_mask": torch.ones_like(ids)
    }
    loss = model.reconstruct(**batch, scale=torch.tensor(1.0))["loss"]
    assert loss.item() == 0
    loss.backward()
