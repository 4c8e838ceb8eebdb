"""Sentence encoders: how they pool, and what is written for sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
)

from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import pack_rows
from selfdistill.engine.checkpoints.export import export_transformers
from selfdistill.engine.models.texts.classifier import OWN_POOLING
from selfdistill.engine.models.texts.language import HEADS, cuts
from selfdistill.engine.models.texts.sentences import FILES, Pooling, Sentences, read, transformer
from selfdistill.engine.models.texts.weights import load_language
from selfdistill.engine.training.modalities.base import settle_pooling
from tests.engine.models.texts.test_language import batch_of, kind_of
from tests.kit import texts as text_kit


def make(folder: Path, pooling: dict[str, Any] | None, at: str = "") -> Path:
    """A folder as sentence-transformers lays it out; the transformer's files lie at `at`."""
    text_kit.make_language(folder / at, kind="bert")
    modules = [("0", at, "Transformer"), ("1", "1_Pooling", "Pooling"), ("2", "2", "Normalize")]
    listed = [
        {"idx": int(i), "name": i, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, path, kind in modules
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("told", "pooling", "said"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean", ""),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, "cls", ""),
        ({"pooling_mode": "cls", "embedding_dimension": 24}, "cls", ""),
        ({"pooling_mode": ["mean"]}, "mean", ""),
        ({"pooling_mode": "lasttoken"}, "mean", "pools by lasttoken, which is not known here"),
        (
            {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
            "mean",
            "pools by max_tokens, mean",
        ),
        (None, "mean", ""),  # the library's default
    ],
)
def test_how_a_folder_pools(
    tmp_path: Path, told: dict[str, Any] | None, pooling: str, said: str
) -> None:
    found = load_language(str(make(tmp_path, told)))
    assert found.sentences is not None
    assert found.pooling == pooling
    assert said in "".join(found.sentences.notes)
    assert bool(found.sentences.notes) == bool(said)
    assert found.sentences.normalizes


def test_other_folders(tmp_path: Path) -> None:
    text_kit.make_language(tmp_path / "plain", kind="bert")
    assert load_language(str(tmp_path / "plain")).pooling == "cls"
    below = make(tmp_path / "below", {"pooling_mode": "mean"}, at="0_Transformer")
    assert transformer(below) == below / "0_Transformer"
    assert load_language(str(below)).pooling == "mean"
    outside = make(tmp_path / "outside", {"pooling_mode": "cls"})
    text = (outside / "modules.json").read_text().replace("1_Pooling", "../below/1_Pooling")
    (outside / "modules.json").write_text(text)
    assert read(outside) == Sentences(normalizes=True)  # nothing outside the folder is read
    for content in ("[", '{"a": 1}', '[{"path": 3, "type": "x"}]'):
        (outside / "modules.json").write_text(content)
        with pytest.raises(UserError, match=r"modules\.json"):
            load_language(str(outside))


@pytest.mark.parametrize("name", sorted(HEADS.keys() - OWN_POOLING.keys()))
@torch.no_grad()
def test_classifiers_of_the_mean(tmp_path: Path, name: str) -> None:
    """The logits are a linear layer's on the mean of transformers' features, before and after."""
    folder = text_kit.make_language(tmp_path / name, kind=name)
    kind = kind_of(folder, finetune__dropout=0.0, finetune__pool="mean")
    base = kind.load()
    model = kind.classifier(base, ["a", "b", "c"], seed=3).eval()
    torch.nn.init.normal_(model.network.classifier.weight)
    batch = batch_of(AutoTokenizer.from_pretrained(folder), [*text_kit.SENTENCES, "a"])
    logits = model.classify(**batch)
    tensors = {k: v.detach() for k, v in model.network.named_parameters()}
    out = tmp_path / "out"
    export_transformers(out, model.network, tensors, base.tokenizer, base.config, Sentences())
    modules = json.loads((out / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == ["Transformer", "Pooling", "Dense"]
    dense = load_file(out / "2_Dense" / "model.safetensors")
    for source in (folder, out):
        oracle = AutoModel.from_pretrained(source).eval()
        mask = batch["attention_mask"]
        hidden = oracle(batch["input_ids"], attention_mask=mask).last_hidden_state
        mean = torch.stack([h[m.bool()].mean(0) for h, m in zip(hidden, mask, strict=True)])
        theirs = mean @ dense["linear.weight"].T + dense["linear.bias"]
        assert torch.allclose(logits, theirs, atol=1e-5)
    again = load_language(str(out))
    assert again.pooling == "mean"
    assert all(torch.equal(again.encoder[k], v) for k, v in base.encoder.items())
    if cuts(base.config):
        lengths, width = batch["attention_mask"].sum(1).tolist(), batch["input_ids"].shape[1]
        at, to = map(torch.from_numpy, pack_rows(lengths, width))
        packed = model.classify(**batch, packed_at=at, packed_to=to)
        assert torch.allclose(packed, logits, atol=1e-5)


@pytest.mark.parametrize("told", ["cls", "mean"])
def test_what_stands_beside_the_weights_is_written_again(tmp_path: Path, told: Pooling) -> None:
    """After stages 1 and 2: pooling, length 1, tokens read; a linear layer is left out and said."""
    folder = make(tmp_path / "in", {"pooling_mode": told})
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 16}')
    kind = kind_of(folder)
    base = kind.load()
    assert base.max_length == 16
    network = kind.autoencoder(base).network
    tensors = {k: v.detach() for k, v in network.named_parameters()}
    out = tmp_path / "out"
    export_transformers(out, network, tensors, base.tokenizer, base.config, base.sentences)
    assert read(out) == Sentences(told, normalizes=True, longest=16)
    text = (folder / "modules.json").read_text().replace("models.Normalize", "models.Dense")
    (folder / "modules.json").write_text(text)
    assert read(folder) == Sentences(
        told,
        longest=16,
        notes=("left out Dense: vectors are those before it",),
    )


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", sorted(OWN_POOLING))
@torch.no_grad()
def test_classifiers_that_pool_by_their_configuration(
    tmp_path: Path, name: str, pool: Pooling
) -> None:
    """Texts of several lengths; the export is transformers' class, and pools so."""
    folder = text_kit.make_language(tmp_path / name, kind=name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"classifier_pooling": "mean"}))
    kind = kind_of(folder, finetune__dropout=0.0, finetune__pool=pool)
    base = kind.load()
    assert base.pooling == "mean"
    model = kind.classifier(base, ["a", "b", "c"], seed=3).eval()
    tensors = {k: v.detach() for k, v in model.network.named_parameters()}
    out = tmp_path / "out"
    export_transformers(out, model.network, tensors, base.tokenizer, base.config)
    oracle = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert oracle.config.classifier_pooling == OWN_POOLING[name][pool]
    batch = batch_of(AutoTokenizer.from_pretrained(folder), [*text_kit.SENTENCES, "a"])
    theirs = oracle(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(model.classify(**batch), theirs, atol=1e-5)


def test_the_models_own_pooling_is_taken_unless_told(tmp_path: Path) -> None:
    folder = make(tmp_path, {"pooling_mode": "mean"})
    kind = kind_of(folder)
    base = kind.load()
    line = settle_pooling(kind.config, kind, base)
    assert "--distill.feature mean, --finetune.pool mean (the model's own is mean)" in line
    told = kind_of(folder, distill__feature="cls", finetune__pool="cls")
    line = settle_pooling(told.config, told, base)
    assert "--distill.feature cls, --finetune.pool cls (the model's own is mean)" in line
    assert told.classifier(base, ["a", "b"], seed=0).mean is False


def test_what_lies_beside_the_transformer_counts_first(tmp_path: Path) -> None:
    """As sentence-transformers reads it, in the folder of the transformer's own files."""
    folder = make(tmp_path, {"pooling_mode": "mean"}, at="0_Transformer")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    assert load_language(str(folder)).max_length == 20
    own = folder / "0_Transformer" / "sentence_bert_config.json"
    own.write_text('{"max_seq_length": 16}')
    assert load_language(str(folder)).max_length == 16
    assert "0_Transformer/*" in FILES


@pytest.mark.parametrize("name", ["plain", "bert"])
def test_letters_are_made_small_first(tmp_path: Path, name: str) -> None:
    """do_lower_case, of a tokenizer that has both letters; every export then reads as here."""
    folder = make(tmp_path / "in", {"pooling_mode": "mean"})
    if name == "bert":  # of a class of its own, that transformers makes anew
        words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "A", "the", "The"]
        names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
        names |= {"unk_token": "<unk>", "mask_token": "<mask>"}
        vocabulary = {word: i for i, word in enumerate(words)}
        tokenizer = BertTokenizer(vocabulary, do_lower_case=False, model_max_length=62, **names)
        text_kit.make_language(folder, kind="bert", tokenizer=tokenizer)
    path = folder / "sentence_bert_config.json"
    path.write_text('{"max_seq_length": 16, "do_lower_case": true}')
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs("The A")["input_ids"] != theirs("the a")["input_ids"]
    kind = kind_of(folder)
    base = kind.load()
    assert base.sentences is not None
    assert base.sentences.lowers
    wanted = theirs("the a", "the")
    assert dict(base.tokenizer("The A", "THE")) == dict(wanted)
    assert base.tokenizer("<mask> A")["input_ids"] == theirs("<mask> a")["input_ids"]
    for told in (base.sentences, None):
        network = kind.autoencoder(base).network
        tensors = {k: v.detach() for k, v in network.named_parameters()}
        out = tmp_path / "out"
        export_transformers(out, network, tensors, base.tokenizer, base.config, told)
        again = AutoTokenizer.from_pretrained(out)
        assert dict(again("The A", "THE")) == dict(wanted)
        assert load_language(str(out)).settings == base.settings or told is None
    export_transformers(out, network, tensors, base.tokenizer, base.config, base.sentences)
    assert json.loads((out / "sentence_bert_config.json").read_text())["do_lower_case"] is True
