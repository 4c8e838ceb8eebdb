"""An export in its own library, fed from raw inputs, gives the scores that the run reports.

transformers and timm load each export as they load any; transformers' own tokenizer or image
processor reads the texts and pictures as they were before packing.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import f1_score
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from selfdistill.data import pack
from selfdistill.engine.models.texts.language import HEADS
from tests.kit import texts as text_kit
from tests.kit.launches import make_base, run_cases

pytestmark = pytest.mark.multi

#: Written out in texts: special tokens of one tokenizer or another, and what looks like them.
WRITTEN = ("</s>", "<s>", "<pad>", "<mask>", "[SEP]", "[CLS]", "<unk>", "< / s >")
#: Kinds that a tokenizer with segments goes with.
SEGMENTED = ("bert", "deberta-v2")
SIZES = [(21, 16), (16, 33), (40, 50), (16, 16), (97, 31), (17, 16)]


def labelled(count: int, seed: int) -> list[dict[str, str]]:
    """Single texts and pairs, up to twice as long as is read, with special tokens in them."""
    generator = np.random.default_rng(seed)
    every = [w for sentence in text_kit.SENTENCES for w in sentence.split()]
    found = []
    for number in range(count):
        parts = []
        for _ in range(2):
            length = int(generator.integers(1, 30))
            own = text_kit.SENTENCES[number % 3].split()
            chosen = [own if generator.random() < 0.8 else every for _ in range(length)]
            parts.append([str(generator.choice(words)) for words in chosen])
            for _ in range(generator.integers(0, 3)):
                at = int(generator.integers(len(parts[-1]) + 1))
                parts[-1].insert(at, str(generator.choice(WRITTEN)))
        row = {"text": " ".join(parts[0]), "label": "abc"[number % 3]}
        if number % 4:
            row["text_pair"] = " ".join(parts[1])
        found.append(row)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of fine-tuning for every model type, in one process group of one rank."""
    root = tmp_path_factory.mktemp("exported")
    (root / "texts").mkdir()
    for split, count in (("train", 24), ("val", 8), ("test", 60)):
        lines = [json.dumps(row) + "\n" for row in labelled(count, seed=count)]
        (root / "texts" / f"{split}.jsonl").write_text("".join(lines))
    pack.pack(str(root / "texts"), str(root / "text-shards"), metric="macro_f1")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2), ("test", 20)):
        for label, name in enumerate(("red", "green", "blue")):
            (root / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                width, height = SIZES[(i + label) % len(SIZES)]
                pixels = generator.integers(0, 200, (height, width, 3), dtype=np.uint8)
                pixels[: height // 2, :, label] += 55
                image = Image.fromarray(pixels)
                image = image.convert("L") if i % 5 == 4 else image
                image.save(root / "pictures" / split / name / f"{i}.{('png', 'jpg')[i % 2]}")
    pack.pack(str(root / "pictures"), str(root / "image-shards"), size=16)
    shared = {"stage": "finetune", "finetune.start": "model", "finetune.seeds": 1}
    shared |= {"finetune.steps": 40, "finetune.lr": 5e-3}
    cases: list[dict[str, object]] = []
    for name in HEADS:
        tokenizer = text_kit.make_tokenizer(segments=name in SEGMENTED)
        text_kit.make_language(root / f"{name}-base", kind=name, tokenizer=tokenizer)
        cases.append(
            {
                "data": str(root / "text-shards"),
                "model": str(root / f"{name}-base"),
                "output": str(root / name),
                "text.max_length": 40,
            }
        )
    make_base(root / "vit-base")
    for pool in ("cls", "mean"):
        cases.append(
            {
                "data": str(root / "image-shards"),
                "model": str(root / "vit-base"),
                "output": str(root / f"vit-{pool}"),
                "finetune.pool": pool,
            }
        )
    run_cases(root / "cases", [shared | case for case in cases], ranks=1)
    return root


def scores(run: Path) -> dict[str, float]:
    metrics = json.loads((run / "finetune-model" / "result.json").read_text())["metrics"]
    return {k: v for k, v in metrics.items() if k.startswith("test_")}


def check(
    found: dict[str, float], logits: torch.Tensor, labels: list[int], near: float = 2e-6
) -> None:
    """Figures of a run against those of raw logits, computed by torch and scikit-learn."""
    predicted = logits.argmax(1).tolist()
    assert len(set(predicted)) > 1, "the model says the same of everything: nothing is tested"
    loss = F.cross_entropy(logits, torch.tensor(labels)).item()
    assert found["test_loss"] == pytest.approx(loss, abs=near)
    assert found["test_macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["test_samples"] == len(labels)


@pytest.mark.parametrize("name", HEADS)
def test_a_text_classifier(root: Path, name: str) -> None:
    folder = root / name / "finetune-model" / "export"
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length == 40  # it cuts where the run did
    rows = [json.loads(line) for line in (root / "texts" / "test.jsonl").read_text().splitlines()]
    logits = []
    with torch.no_grad():
        for row in rows:
            batch = tokenizer(
                row["text"], row.get("text_pair"), truncation=True, return_tensors="pt"
            )
            logits.append(model(**batch).logits[0])
    labels = [model.config.label2id[row["label"]] for row in rows]
    check(scores(root / name), torch.stack(logits), labels)


def pictures(root: Path) -> tuple[list[Path], list[int]]:
    paths = sorted((root / "pictures" / "test").rglob("*.*g"))
    return paths, [("blue", "green", "red").index(path.parent.name) for path in paths]


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_image_classifier_in_transformers(root: Path, pool: str) -> None:
    """By its ViT, which pools by CLS, and by its wrapper of timm's, whose norms' eps is another."""
    folder = root / f"vit-{pool}" / "finetune-model" / "export"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert model.config.label2id == {"blue": 0, "green": 1, "red": 2}
    paths, labels = pictures(root)
    opened = [Image.open(path) for path in paths]
    exact = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        logits = model(**exact(opened, return_tensors="pt")).logits
        check(scores(root / f"vit-{pool}"), logits, labels, 2e-6 if pool == "cls" else 2e-5)
        # By torchvision pixels may be one level of 255 off.
        near = AutoImageProcessor.from_pretrained(folder)
        assert type(near) is not type(exact)
        torch.testing.assert_close(
            model(**near(opened, return_tensors="pt")).logits, logits, atol=0.05, rtol=0
        )


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_image_classifier_in_timm(root: Path, pool: str) -> None:
    folder = root / f"vit-{pool}" / "finetune-model" / "export" / "timm"
    told = json.loads((folder / "config.json").read_text())
    norm = functools.partial(torch.nn.LayerNorm, eps=told["norm_eps"])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, norm_layer=norm).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    paths, labels = pictures(root)
    # Near, not equal: timm's centre is half a pixel beside where the difference of sides is odd.
    with torch.no_grad():
        ours = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        logits = model(ours)
    found = scores(root / f"vit-{pool}")
    predicted = logits.argmax(1).tolist()
    assert found["test_macro_f1"] == pytest.approx(
        f1_score(labels, predicted, average="macro"), abs=0.1
    )
    assert found["test_loss"] == pytest.approx(
        F.cross_entropy(logits, torch.tensor(labels)).item(), abs=0.02
    )
