"""Texts that share rows or need no mask, and what a step reads back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoTokenizer,
)

from selfdistill.data.formats.texts import pack_rows
from selfdistill.engine.models.texts.language import HEADS
from tests.engine.models.texts.test_language import batch_of, kind_of
from tests.kit import texts as text_kit

# Without padding, without waiting

CUT = ["bert", "roberta", "xlm-roberta", "camembert"]


@pytest.mark.parametrize("name", CUT)
def test_packed_rows_give_what_padded_ones_do(name: str, tmp_path: Path) -> None:
    """Losses, every gradient, features and logits, of texts that share rows."""
    folder = text_kit.make_language(tmp_path / name, kind=name)
    kind = kind_of(folder, mlm__dropout=0.0, finetune__dropout=0.0)
    base = kind.load()
    texts = [*text_kit.SENTENCES, text_kit.SENTENCES[0][:9], "a", "of it", "in the"]
    batch = batch_of(AutoTokenizer.from_pretrained(folder), texts)
    lengths, width = batch["attention_mask"].sum(1).tolist(), batch["input_ids"].shape[1]
    at, to = map(torch.from_numpy, pack_rows(lengths, width))
    assert len(at) < len(texts)
    packed = batch | {"packed_at": at, "packed_to": to}
    scale = torch.tensor(0.1)
    both = []
    for entries in (batch, packed):
        model = kind.autoencoder(base).train()
        loss = model.reconstruct(**entries, scale=scale)["loss"]
        tokens, counts = model.encode(**entries)
        cls, _ = model.encode(**entries, cls_only=True)
        (loss + tokens[counts.bool()].pow(2).mean() + cls.pow(2).mean()).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        logits = kind.classifier(base, ["x", "y"], seed=1).eval().classify(**entries)
        both.append((loss, tokens[counts.bool()], cls, logits, gradients))
    for one, other in zip(both[0][:4], both[1][:4], strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert both[0][4].keys() == both[1][4].keys()
    largest = max(g.norm() for g in both[0][4].values())
    for key, gradient in both[0][4].items():
        error = (both[1][4][key] - gradient).norm()
        assert error <= 1e-4 * max(gradient.norm(), 1e-2 * largest), key


#: Models that take a mask of numbers, or count with it.
OWN_MASKS = {"mpnet", "eurobert"}


@pytest.mark.parametrize("name", HEADS)
def test_nothing_padded_needs_no_mask(name: str, tmp_path: Path) -> None:
    folder = text_kit.make_language(tmp_path / name, kind=name)
    encoder = kind_of(folder).encoder(kind_of(folder).load()).eval()
    batch = batch_of(AutoTokenizer.from_pretrained(folder), text_kit.SENTENCES[:1] * 2)
    assert batch["attention_mask"].all()
    with torch.no_grad():
        masked, _ = encoder.encode(**batch)
        plain, _ = encoder.encode(**batch, unpadded=torch.ones(2, dtype=torch.bool))
    assert torch.allclose(masked, plain, atol=1e-6)


class Reads(TorchDispatchMode):
    """What would wait for a device: numbers that the host reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__.split(".")[0] in ("_local_scalar_dense", "all", "nonzero", "equal"):
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(HEADS.keys() - OWN_MASKS))
def test_a_step_on_texts_reads_nothing_back(name: str, tmp_path: Path) -> None:
    """Padded, of one length, and several in a row."""
    folder = text_kit.make_language(tmp_path / name, kind=name)
    kind, tokenizer = kind_of(folder), AutoTokenizer.from_pretrained(folder)
    base = kind.load()
    model = kind.autoencoder(base).train()
    classifier = kind.classifier(base, ["x", "y"], seed=1).train()
    batch = batch_of(tokenizer, [*text_kit.SENTENCES, "a", "of it"])
    equal = batch_of(tokenizer, text_kit.SENTENCES[:1] * 2)
    assert not batch["attention_mask"].all()
    forms = [batch, equal | {"unpadded": torch.ones(2, dtype=torch.bool)}]
    if name in CUT:
        lengths, width = batch["attention_mask"].sum(1).tolist(), batch["input_ids"].shape[1]
        at, to = map(torch.from_numpy, pack_rows(lengths, width))
        forms.append(batch | {"packed_at": at, "packed_to": to})
    for entries in forms:
        with Reads() as reads:
            out = model.reconstruct(**entries, scale=torch.tensor(1.0))
            tokens, _ = model.encode(**entries)
            cls, _ = model.encode(**entries, cls_only=True)
            logits = classifier.classify(**entries)
            (out["loss"] + tokens.sum() + cls.sum() + logits.sum()).backward()
        assert reads.found == []
    # What is predicted is looked up when it is to be shown.
    assert "prediction" not in out
    shown = model.reconstruct(**batch, scale=torch.tensor(1.0), shown=True)
    assert shown["prediction"].shape == batch["masked_at"].shape


def test_attention_on_a_cpu_is_in_fp32(tmp_path: Path) -> None:
    """Backward it is faster than in bf16 (`engine.models.images.rows_block`)."""
    folder = text_kit.make_language(tmp_path / "roberta")
    kind = kind_of(folder)
    model = kind.autoencoder(kind.load()).train()
    batch = batch_of(AutoTokenizer.from_pretrained(folder), text_kit.SENTENCES)
    seen: set[torch.dtype] = set()

    class Kinds(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "scaled_dot_product" in func.__name__:
                seen.update(a.dtype for a in args[:3])
            return func(*args, **(kwargs or {}))

    with Kinds():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.reconstruct(**batch, scale=torch.tensor(1.0))["loss"]
        loss.backward()
    assert seen == {torch.float32}
