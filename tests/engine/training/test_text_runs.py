"""Texts through the whole of a run: packed, all stages on two ranks, scored, exported; mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from selfdistill.data import pack
from tests.kit import texts as text_kit
from tests.kit.launches import make_base, metrics, run_cases

pytestmark = pytest.mark.multi

CLASSES = ("cell", "parse", "tweet")


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def labelled(count: int, seed: int) -> list[dict[str, str]]:
    """Texts of 3 to 30 words, each with words of its class among them."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(count):
        own = text_kit.SENTENCES[number % 3].split()
        every = " ".join(text_kit.SENTENCES).split()
        words = [str(generator.choice(own if i % 2 else every)) for i in range(3 + number % 28)]
        found.append({"text": " ".join(words), "label": CLASSES[number % 3]})
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text-runs")
    for split, count in (("train", 21), ("val", 8), ("test", 11)):
        write(root / "texts" / f"{split}.jsonl", labelled(count, seed=count))
    write(root / "more.jsonl", labelled(13, seed=1))
    pack.pack(
        str(root / "texts"),
        str(root / "shards"),
        unlabelled=str(root / "more.jsonl"),
        metric="macro_f1",
    )
    text_kit.make_language(root / "base")
    text_kit.make_language(root / "headless", tokenizer=text_kit.make_tokenizer(mask=False))
    larger = text_kit.make_tokenizer()
    larger.add_tokens([f"word{i}" for i in range(50)])
    larger.save_pretrained(text_kit.make_language(root / "foreign"))
    make_base(root / "images")
    text_kit.make_tokenizer().save_pretrained(root / "tokenizer")
    return root


def test_all_stages_and_what_they_leave(root: Path) -> None:
    run = root / "runs" / "x"
    case = {
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "output": str(run),
        "text.bucket": 8,
        "finetune.steps": 12,
        "finetune.lr": 1e-3,
        "picture_every": 3,
    }
    other = case | {"output": str(root / "runs" / "y"), "overwrite": True}
    shape = {"model.shape.width": 24, "model.shape.depth": 2, "model.shape.heads": 3}
    scratch = other | {"model": "scratch", "stage": "pretrain"} | shape
    printed = run_cases(
        root / "cases",
        [
            case | {"stage": "all", "compare": True, "mlm.policy": "bert"},
            scratch | {"model.tokenizer": str(root / "tokenizer"), "text.max_length": 24},
            scratch | {"expect_error": "--model scratch needs --model.tokenizer"},
            scratch
            | {"model.tokenizer": str(root / "nowhere")}
            | {"expect_error": "there is no tokenizer at"},
            other | {"model": str(root / "foreign"), "expect_error": "has ids up to"},
            other | {"model": str(root / "headless"), "expect_error": "no mask token"},
            other | {"model": str(root / "images"), "expect_error": "'vit_mae'"},
            other | {"kind": "image", "expect_error": "recipe for images"},
            other | {"text.max_length": 1000, "expect_error": "62 tokens at most"},
            other
            | {"stage": "distill", "teacher": str(root / "base"), "teacher.mode": "cached"}
            | {"distill.feature": "tokens", "expect_error": "make no table"},
            other | {"text.max_length": 2, "expect_error": "greater than or equal to 3"},
            other | {"mlm.ratio": 1.5, "expect_error": "less than 1"},
        ],
    )
    assert "of them long, make" in printed
    assert "windows of at most 24 tokens; tokens left out: 0" in printed
    for stage in ("pretrain", "distill-1"):
        # 34 texts: those of train, and the unlabelled ones.
        assert json.loads((run / stage / "result.json").read_text())["losses"]["loss/mlm"] > 0
        assert all("speed/tokens_per_second" in line for line in metrics(run / stage))
        network = AutoModelForMaskedLM.from_pretrained(run / stage / "export")
        embeddings = network.get_input_embeddings().weight
        assert network.lm_head.decoder.weight is embeddings
        assert AutoTokenizer.from_pretrained(run / stage / "export").mask_token == "<mask>"
    result = json.loads((run / "finetune" / "result.json").read_text())
    assert result["metric"] == "macro_f1"

    # The exported classifier, in transformers, on the texts as they were before packing.
    folder = run / "finetune" / "export"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (root / "texts" / "test.jsonl").read_text().splitlines()]
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        logits = model(**batch).logits
    predicted = [model.config.id2label[i] for i in logits.argmax(-1).tolist()]
    true = [row["label"] for row in rows]
    assert result["metrics"]["test_macro_f1"] == pytest.approx(
        f1_score(true, predicted, average="macro"), abs=1e-9
    )
    assert result["metrics"]["test_samples"] == 11


def test_rows_of_several_texts_change_no_figure(root: Path) -> None:
    """All stages, two ranks, two micro-batches: as padded, up to rounding; figures and scores."""
    shared = {
        "stage": "all",
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "teacher": str(root / "base"),
        "teacher.mode": "replicated",
        "distill.accumulation": 2,
        "finetune.start": "model",
    }
    cases = [
        shared | {"text.packed": packed, "output": str(root / "runs" / f"packed-{packed}")}
        for packed in (False, True)
    ]
    pooled = {"stage": "finetune", "finetune.pool": "mean"}
    cases += [case | pooled | {"output": f"{case['output']}-mean"} for case in cases]
    run_cases(root / "packed", cases)
    for pool in ("", "-mean"):
        padded, packed = (
            json.loads((root / f"runs/packed-{p}{pool}/finetune-model/result.json").read_text())[
                "analysis"
            ]
            for p in (False, True)
        )
        for name in ("feature_drift", "feature_cosine", "test_loss"):
            assert packed[name] == pytest.approx(padded[name], rel=1e-3), (pool, name)
    for stage, terms in (
        ("pretrain", ("loss",)),
        ("distill-1", ("loss", "mlm", "distill")),
        ("finetune-model", ("loss",)),
    ):
        padded, packed = (
            metrics(root / "runs" / f"packed-{packed}" / stage) for packed in (False, True)
        )
        for one, other in zip(padded, packed, strict=True):
            for term in terms:
                key = f"loss/{term}"
                if key in one:  # not a line of scores
                    assert other[key] == pytest.approx(one[key], rel=1e-3), (stage, key)
