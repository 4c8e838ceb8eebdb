"""Text: every stage against a plain PyTorch loop over transformers' own models."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import RobertaForMaskedLM, RobertaForSequenceClassification

from selfdistill.data.loading.loader import Loader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.text import TextModality
from tests.kit import texts as text_kit
from tests.kit.plain_loop import (
    BATCH,
    CASES,
    RATE,
    STEPS,
    adamw,
    check_teacher_modes,
    finetuning_rates,
    is_bias_or_1d,
    largest_difference,
    run_every_case,
)

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity-text")
    text_kit.make_texts(root / "shards")
    text_kit.make_language(root / "base")
    run_every_case(root, {"text.bucket": 8, "text.split": False})
    return root


def kind_of(root: Path) -> TextModality:
    config = Config()
    config.text.bucket = 8
    config.finetune.dropout = 0.0
    return TextModality(Run(config, Ranks(0, 0, 1, torch.device("cpu")), root), None)


def batches(root: Path, kind: TextModality, *, masked: bool) -> Iterator[dict[str, torch.Tensor]]:
    """The global batches, as a single process sees them."""
    base = kind.load(str(root / "base"))
    split = Manifest.load_split(str(root / "shards"), "train")
    keyed = kind.mask(base) if masked else None
    loader = Loader(split, batch=BATCH, seed=0, keyed=keyed, codec=kind.codec(base, split))
    for batch, _ in zip(loader, range(STEPS), strict=False):
        yield batch


def oracle_masked(root: Path, teacher: Path | None) -> tuple[dict[str, torch.Tensor], list[int]]:
    model = RobertaForMaskedLM.from_pretrained(root / "base").train()
    frozen = None
    if teacher is not None:
        frozen = RobertaForMaskedLM.from_pretrained(teacher).roberta.eval()
    optimizer: Any = adamw(model, is_bias_or_1d, RATE, (0.9, 0.95))
    halves = []
    for step, batch in enumerate(batches(root, kind_of(root), masked=True)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (STEPS - step) / STEPS
        labels = torch.full_like(batch["input_ids"], -100).flatten()
        labels[batch["masked_at"]] = batch["originals"]
        labels = labels.view_as(batch["input_ids"])
        halves += [int((labels[half] >= 0).sum()) for half in (slice(0, 4), slice(4, 8))]
        names = {"attention_mask": batch["attention_mask"]}
        # Its loss is the mean over the masked tokens of the whole batch.
        loss = model(batch["masked_ids"], labels=labels, **names).loss
        if frozen is not None:
            student = model.roberta(batch["input_ids"], **names).last_hidden_state[:, 0]
            with torch.no_grad():
                target = frozen(batch["input_ids"], **names).last_hidden_state[:, 0]
            loss = loss + 0.5 * (student - target).pow(2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict(), halves


def test_masked_stages_equal_the_plain_loop(runs: Path) -> None:
    base = RobertaForMaskedLM.from_pretrained(runs / "base").state_dict()
    teacher = runs / "runs" / "zero0-1" / "pretrain" / "export"
    first, halves = oracle_masked(runs, None)
    assert any(a != b for a, b in zip(halves[::2], halves[1::2], strict=True)), "uneven over ranks"
    oracles = {"pretrain": first, "distill-1": oracle_masked(runs, teacher)[0]}
    assert largest_difference(base, oracles["pretrain"]) > 1e-3  # it did train
    assert largest_difference(oracles["pretrain"], oracles["distill-1"]) > 1e-4  # the term matters
    for stage, oracle in oracles.items():
        for case in CASES:
            export = runs / "runs" / case / stage / "export"
            model = RobertaForMaskedLM.from_pretrained(export)
            assert model.lm_head.decoder.weight is model.roberta.embeddings.word_embeddings.weight
            assert largest_difference(model.state_dict(), oracle) < 1e-5, (stage, case)


def test_finetuning_equals_the_plain_loop(runs: Path) -> None:
    for case in CASES:
        start = runs / "runs" / case / "distill-1" / "export"
        model = RobertaForSequenceClassification.from_pretrained(start, num_labels=3).train()
        kind = kind_of(runs)
        # The fresh head is random: the oracle takes ours, everything after it is its own.
        ours = kind.classifier(kind.load(str(start)), ["a", "b", "c"], seed=0)
        model.classifier.load_state_dict(ours.network.classifier.state_dict())

        def decays(name: str, _: torch.Tensor) -> bool:
            return not name.endswith("bias") and "position_embeddings" not in name

        optimizer: Any = adamw(model, decays, RATE, (0.9, 0.999))
        for rate, batch in zip(finetuning_rates(), batches(runs, kind, masked=False), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = model(
                batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
            ).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        export = runs / "runs" / case / "finetune" / "export"
        after = RobertaForSequenceClassification.from_pretrained(export)
        assert after.config.id2label == {0: "a", 1: "b", 2: "c"}
        assert largest_difference(after.state_dict(), model.state_dict()) < 1e-5, case


def test_teacher_modes_agree(runs: Path) -> None:
    check_teacher_modes(runs, "loss/loss", "loss/mlm", "loss/distill")
