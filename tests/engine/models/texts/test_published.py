"""Text models as some are published: another padding, another head, other special tokens."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from selfdistill.data.formats.texts import pack_rows
from selfdistill.engine.checkpoints.export import export_transformers
from selfdistill.engine.models.texts.language import HEADS
from selfdistill.engine.models.texts.sentences import Pooling
from selfdistill.engine.models.texts.weights import TOKENIZER_FILES, load_language
from tests.engine.models.texts.test_language import batch_of, kind_of, refusal
from tests.kit import texts as text_kit

OFFSET = ("roberta", "xlm-roberta", "camembert", "mpnet")


def padded(folder: Path, kind: str) -> Path:
    """A model whose configuration pads with 0, its tokenizer with 1; row 0 is not zero."""
    tokenizer = text_kit.make_tokenizer()
    config = text_kit.config_of(kind, len(tokenizer))
    config.pad_token_id = 0
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[0].normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [name for name in HEADS if name not in OFFSET])
def test_the_tokenizers_padding_is_taken(name: str, tmp_path: Path) -> None:
    """As of multilingual MiniLM and e5: features, gradients and exports are transformers'."""
    folder = padded(tmp_path / name, name)
    kind = kind_of(folder, mlm__dropout=0.0)
    base = kind.load()
    batch = batch_of(AutoTokenizer.from_pretrained(folder), text_kit.SENTENCES)
    there = batch["attention_mask"].bool()
    assert (batch["input_ids"][~there] == 1).any()
    names = ("input_ids", "attention_mask")
    ours, theirs = kind.encoder(base).train(), AutoModel.from_pretrained(folder).train()
    found = ours.encode(**batch)[0]
    wanted = theirs(**{k: batch[k] for k in names}).last_hidden_state
    torch.testing.assert_close(found[there], wanted[there], rtol=1e-5, atol=1e-6)
    for hidden in (found, wanted):
        hidden[there].pow(3).sum().backward()
    rows = [m.get_input_embeddings().weight.grad for m in (ours.encoder, theirs)]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)
    assert not rows[0][0].any()  # transformers gives padding's row nothing, whatever stands there
    assert rows[0][2].any()

    model = kind.autoencoder(base).train()
    oracle = AutoModelForMaskedLM.from_pretrained(folder).train()
    count = len(batch["masked_at"])
    loss = model.reconstruct(**batch, scale=torch.tensor(1 / count))["loss"]
    asked = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    other = oracle(input_ids=batch["masked_ids"], **asked).loss
    assert loss.item() == pytest.approx(other.item(), rel=1e-6)
    for network, one in ((model.network, loss), (oracle, other)):
        one.backward()
        torch.optim.SGD(network.parameters(), lr=0.1).step()
    stepped = [m.get_input_embeddings().weight for m in (model.network, oracle)]
    torch.testing.assert_close(*stepped, rtol=1e-5, atol=1e-6)

    state = dict(model.network.named_parameters())
    export_transformers(tmp_path / "out", model.network, state, base.tokenizer, base.config)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 1
    assert load_language(str(tmp_path / "out")).config.pad_token_id == 0


@torch.no_grad()
def test_another_padding_in_rows_of_several_texts(tmp_path: Path) -> None:
    folder = padded(tmp_path, "bert")
    kind = kind_of(folder)
    encoder = kind.encoder(kind.load()).eval()
    texts = [*text_kit.SENTENCES, "a", "of it", "in the"]
    batch = batch_of(AutoTokenizer.from_pretrained(folder), texts)
    there = batch["attention_mask"].bool()
    lengths, width = batch["attention_mask"].sum(1).tolist(), batch["input_ids"].shape[1]
    at, to = map(torch.from_numpy, pack_rows(lengths, width))
    assert len(at) < len(texts)
    alone = encoder.encode(**batch)[0]
    together = encoder.encode(**batch, packed_at=at, packed_to=to)[0]
    assert torch.allclose(alone[there], together[there], atol=1e-5)


@pytest.mark.parametrize("name", OFFSET)
def test_padding_that_positions_are_counted_from_is_to_agree(name: str, tmp_path: Path) -> None:
    assert "pads with id 1, the model with 0" in refusal(padded(tmp_path / name, name))


@pytest.mark.parametrize("kind", ["relative_key", "relative_key_query"])
@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "camembert", "electra"])
def test_relative_positions_are_refused(name: str, kind: str, tmp_path: Path) -> None:
    """transformers 5 passes the entry over."""
    folder = text_kit.make_language(tmp_path / name, kind=name)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"position_embedding_type": "absolute"}))
    load_language(str(folder))
    path.write_text(json.dumps(config | {"position_embedding_type": kind}))
    assert f"position_embedding_type {kind!r}" in refusal(folder)


def test_debertas_newer_head(tmp_path: Path) -> None:
    """Its loss and gradients are transformers', and it comes back from an export."""
    tokenizer = text_kit.make_tokenizer()
    config = text_kit.config_of("deberta-v2", len(tokenizer))
    config.legacy = False
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.lm_predictions.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    oracle = AutoModelForMaskedLM.from_pretrained(folder).train()
    kind = kind_of(folder, mlm__dropout=0.0)
    base = kind.load()
    assert base.decoder is not None
    ours = kind.autoencoder(base).train()
    batch = batch_of(tokenizer, text_kit.SENTENCES)
    scale = torch.tensor(1 / len(batch["masked_at"]))
    loss = ours.reconstruct(**batch, scale=scale)["loss"]
    asked = {"attention_mask": batch["attention_mask"], "labels": batch["labels"]}
    theirs = oracle(input_ids=batch["masked_ids"], **asked).loss
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-6)
    loss.backward()
    theirs.backward()
    gradients = {n: p.grad for n, p in ours.network.named_parameters()}
    for key, parameter in oracle.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[key], parameter.grad, rtol=1e-4, atol=1e-6)
    state = dict(ours.network.named_parameters())
    export_transformers(tmp_path / "out", ours.network, state, base.tokenizer, base.config)
    assert load_language(str(tmp_path / "out")).sha256 == base.sha256


def test_a_tokenizer_of_other_special_tokens(tmp_path: Path) -> None:
    """EuroBERT's has bos, eos, pad and mask alone; nothing here asks for cls and sep by name."""
    tokenizer = text_kit.make_tokenizer()
    ids = tokenizer("a b")["input_ids"]
    tokenizer.cls_token = tokenizer.sep_token = None
    folder = text_kit.make_language(tmp_path / "x", kind="eurobert", tokenizer=tokenizer)
    kind = kind_of(folder)
    base = kind.load()
    assert base.tokenizer.cls_token_id is None
    assert base.tokenizer("a b")["input_ids"] == ids
    kind.mask(base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert "has no pad token" in refusal(folder)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("task", ["regression", "multi_label_classification"])
def test_a_classifiers_task_is_not_its_bases(task: str, pool: Pooling, tmp_path: Path) -> None:
    """By it transformers chooses softmax or sigmoids, and `predict` refuses regressions."""
    folder = text_kit.make_language(tmp_path / "in", kind="bert")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"problem_type": task}))
    kind = kind_of(folder, finetune__pool=pool)
    base = kind.load()
    assert base.config.problem_type == task
    model = kind.classifier(base, ["a", "b", "c"], seed=1)
    state = dict(model.network.named_parameters())
    export_transformers(tmp_path / "out", model.network, state, base.tokenizer, base.config)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told.get("problem_type") is None


@pytest.mark.parametrize("name", ["bert", "distilbert", "electra"])
def test_dropout_before_a_classifier_is_set(name: str, tmp_path: Path) -> None:
    """Every rate of a model, whatever its configuration calls it, and the head's among them."""
    folder = text_kit.make_language(tmp_path / name, kind=name)
    for pool in ("cls", "mean"):
        kind = kind_of(folder, finetune__pool=pool, finetune__dropout=0.3)
        model = kind.classifier(kind.load(), ["a", "b", "c"], seed=1)
        rates = [m.p for m in model.network.modules() if isinstance(m, torch.nn.Dropout)]
        assert set(rates) == {0.3}


def test_files_of_slow_tokenizers_are_fetched() -> None:
    assert {"bpe.codes", "added_tokens.json"} <= set(TOKENIZER_FILES)
