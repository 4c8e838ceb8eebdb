"""Labels as they are: several a sample, unbalanced classes, mixtures, against plain loops.

The loops' models are transformers', their losses torch's, weights and scores scikit-learn's. One
start of two ranks for all.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import accuracy_score, average_precision_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from transformers import (
    RobertaForSequenceClassification,
    ViTForImageClassification,
    ViTMAEForPreTraining,
)

from selfdistill.data import pack
from selfdistill.data.loading.balanced import classes_of
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.packing.encoding import TextModality
from selfdistill.data.packing.writer import write_split
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.samples import Sample
from selfdistill.engine.training.views import Augment, Flips, Mixes, Together
from tests.engine.training import test_parity_text as text_parity
from tests.engine.training.test_parity_training import MEAN, STD, fresh_classifier
from tests.kit import texts as text_kit
from tests.kit.launches import make_base, make_images, metrics, run_cases
from tests.kit.plain_loop import (
    BATCH,
    RATE,
    STEPS,
    adamw,
    finetuning_rates,
    largest_difference,
)

pytestmark = pytest.mark.multi

Batch = dict[str, torch.Tensor]
SETS: list[tuple[int, ...]] = [(0,), (0, 2), (), (1,), (0, 1, 2), (1, 2), (2,)]
MIXED: dict[str, object] = {
    "finetune.augment": "strong",
    "finetune.mixup": 0.4,
    "finetune.cutmix": 1.0,
}
LIGHT: dict[str, object] = {"finetune.augment": "light", "finetune.crop": (0.6, 1.0)}
BALANCED: dict[str, object] = {"finetune.sampler": "balanced"}
WEIGHTED: dict[str, object] = {
    "finetune.class_weights": "balanced",
    "finetune.label_smoothing": 0.1,
}

PROBED: dict[str, object] = {
    "stage": "pretrain",
    "pretrain.steps": 2,
    "pretrain.warmup": 0,
    "probe.every": 2,
}


def make_sets(root: Path) -> None:
    """The same pictures with lists of labels, and texts with such."""
    rows = ["path,label,split"]
    for split in ("train", "val", "test"):
        files = sorted((root / "images" / split).glob("*/*.png"))
        for number, file in enumerate(files):
            names = ";".join("abc"[label] for label in SETS[number % len(SETS)])
            rows.append(f"{file.relative_to(root)},{names},{split}")
    (root / "sets.csv").write_text("\n".join(rows) + "\n")
    pack.pack(str(root / "sets.csv"), str(root / "sets"), label_separator=";")
    for split, count in (("train", 27), ("val", 14), ("test", 14)):
        samples = [
            Sample(str(i), text_kit.SENTENCES[i % 4].encode(), SETS[i % len(SETS)])
            for i in range(count)
        ]
        write_split(samples, ["a", "b", "c"], root / "texts", split=split, kind=TextModality())
    text_kit.make_language(root / "language")


def case(
    root: Path, name: str, data: str, *more: dict[str, object], **given: object
) -> dict[str, object]:
    found: dict[str, object] = {
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.lr": RATE,
        "zero": "zero1",
        "data": str(root / data),
        "model": str(root / ("language" if data == "texts" else "base")),
        "output": str(root / "runs" / name),
        "log_samples": True,
    }
    for one in more:
        found |= one
    return found | given


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("labels")
    make_images(root / "images")
    for split, keep in (("train", {"green": 5, "blue": 2}), ("test", {"blue": 1})):
        for name, count in keep.items():  # unbalanced: 9, 5, 2
            for file in sorted((root / "images" / split / name).iterdir())[count:]:
                file.unlink()
    pack.pack(str(root / "images"), str(root / "shards"))
    make_base(root / "base")
    make_sets(root)
    bucket: dict[str, object] = {"text.bucket": 8}
    parts: dict[str, object] = {"finetune.accumulation": 2}
    cases = [
        case(root, "weighted", "shards", WEIGHTED),
        case(root, "weighted-2", "shards", WEIGHTED, parts, zero="zero2"),
        case(root, "balanced", "shards", BALANCED),
        case(root, "mixed", "shards", MIXED),
        case(root, "mixed-weighted", "shards", MIXED, WEIGHTED, parts),
        case(root, "light", "shards", LIGHT),
        case(root, "sets", "sets", parts),
        case(root, "sets-mixed", "sets", MIXED, zero="zero0"),
        case(root, "texts", "texts", bucket, parts),
    ]
    cases.append(case(root, "probed", "sets", PROBED))
    every = {"mixed": MIXED, "balanced": BALANCED, "light": LIGHT}
    for name, options in every.items():
        cases.append(case(root, f"left-{name}", "shards", options, leave_at="step 4"))
        cases.append(case(root, f"left-{name}", "shards", options))
    refused: list[tuple[str, dict[str, object], str]] = [
        ("sets", WEIGHTED, "--finetune.class_weights balanced is for one label a sample"),
        ("sets", BALANCED, "--finetune.sampler balanced is for one label a sample"),
        ("sets", {"finetune.label_smoothing": 0.1}, "label_smoothing 0.1 is for one label"),
        ("sets", {"finetune.metric": "balanced_accuracy"}, "metric balanced_accuracy is for one"),
        ("sets", {"finetune.regularizer": "r3f"}, "--finetune.regularizer r3f is for one label"),
        ("shards", MIXED | {"finetune.batch": 6}, "leaves one alone: give 8"),
        ("shards", BALANCED | {"data.partitions": 2}, "--data.partitions 2 divides them: take 1"),
        ("texts", {"finetune.augment": "light"}, "--finetune.augment is for images"),
        ("texts", {"finetune.mixup": 0.2}, "--finetune.mixup is for images"),
        ("texts", {"finetune.cutmix": 1.0}, "--finetune.cutmix is for images"),
        (
            "sets",
            {"stage": "pretrain", "pretrain.objective": "supcon"},
            "contrasts classes, and samples of",
        ),
    ]
    for data, options, said in refused:
        cases.append(case(root, "refused", data, options, expect_error=said))
    printed = run_cases(root, cases)
    assert printed.count("resumed at step 3") == len(every)
    assert "all labels of a sample are right in" in printed
    return root


def batches(root: Path, data: str, keyed: Any, **options: Any) -> Iterator[Batch]:
    """The global batches of one process, with normalised and mirrored pixels."""
    split = Manifest.load_split(str(root / data), "train")
    loader = Loader(split, batch=BATCH, seed=0, keyed=keyed, **options)
    for batch, _ in zip(loader, range(STEPS), strict=False):
        pixels = (batch["images"].float() / 255 - MEAN) / STD
        batch["pixels"] = torch.where(batch["flip"].view(-1, 1, 1, 1), pixels.flip(-1), pixels)
        yield batch


def train(model: Any, found: Iterable[Batch], loss_of: Callable[[Batch], torch.Tensor]) -> Batch:
    """The plain loop: the weights after the last step."""

    def decays(name: str, _: torch.Tensor) -> bool:
        return not name.endswith(("bias", "cls_token")) and "position_embeddings" not in name

    optimizer: Any = adamw(model, decays, RATE, (0.9, 0.999))
    for rate, batch in zip(finetuning_rates(), found, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    weights: Batch = model.state_dict()
    return weights


def exported(root: Path, name: str) -> Batch:
    export = root / "runs" / name / "finetune-model" / "export"
    weights: Batch = ViTForImageClassification.from_pretrained(export).state_dict()
    return weights


def sklearn_weights(root: Path) -> torch.Tensor:
    file = Manifest.load_split(str(root / "shards"), "train")
    labels = np.repeat(np.arange(3), file.class_counts)
    assert sorted(file.class_counts) == [2, 5, 9]
    return torch.from_numpy(
        compute_class_weight("balanced", classes=np.arange(3), y=labels)
    ).float()


def mixed(batch: Batch, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and targets of a batch whose neighbours are mixed, one sample after the other."""
    pixels, labels = batch["pixels"], batch["labels"]
    whole = labels.float() if labels.dtype == torch.bool else F.one_hot(labels, classes).float()
    out, targets = [], []
    for i in range(len(pixels)):
        other = i + 1 if i % 2 == 0 else i - 1
        own, (top, left, bottom, right) = float(batch["blend"][i]), batch["box"][i].tolist()
        picture = own * pixels[i] + (1 - own) * pixels[other]
        picture[:, top:bottom, left:right] = pixels[other][:, top:bottom, left:right]
        share = float(batch["share"][i])
        out.append(picture)
        targets.append(share * whole[i] + (1 - share) * whole[other])
    return torch.stack(out), torch.stack(targets)


STRONG = Together((Augment(0, "strong"), Flips(0), Mixes(0, 0.4, 1.0)))


@pytest.mark.parametrize(
    ("names", "data", "keyed"),
    [
        (("weighted", "weighted-2"), "shards", Together((Flips(0),))),
        (("mixed",), "shards", STRONG),
        (("mixed-weighted",), "shards", STRONG),
        (("light",), "shards", Together((Augment(0, "light", (0.6, 1.0)), Flips(0)))),
        (("balanced",), "shards", Flips(0)),
        (("sets",), "sets", Flips(0)),
        (("sets-mixed",), "sets", STRONG),
    ],
)
def test_images_equal_the_plain_loop(
    root: Path, names: tuple[str, ...], data: str, keyed: object
) -> None:
    model = fresh_classifier(root, root / "base")
    weights = sklearn_weights(root)

    def loss_of(batch: Batch) -> torch.Tensor:
        logits, labels = model(batch["pixels"]).logits, batch["labels"]
        if names == ("mixed-weighted",):  # torch's weighted mean, of two labels a sample
            pixels, _ = mixed(batch)
            logits, share = model(pixels).logits, batch["share"]
            other = labels.view(-1, 2).flip(1).flatten()
            sums = [
                F.cross_entropy(logits, one, weights, reduction="none", label_smoothing=0.1)
                for one in (labels, other)
            ]
            total = (share * weights[labels] + (1 - share) * weights[other]).sum()
            return (share * sums[0] + (1 - share) * sums[1]).sum() / total
        if "blend" in batch:
            pixels, targets = mixed(batch)
            logits = model(pixels).logits
            if labels.dtype == torch.bool:
                return torch.nn.BCEWithLogitsLoss()(logits, targets)
            return F.cross_entropy(logits, targets)
        if labels.dtype == torch.bool:
            return torch.nn.BCEWithLogitsLoss()(logits, labels.float())
        if names[0] == "weighted":
            return F.cross_entropy(logits, labels, weight=weights, label_smoothing=0.1)
        return F.cross_entropy(logits, labels)

    options: dict[str, Any] = {}
    if names == ("balanced",):
        split = Manifest.load_split(str(root / "shards"), "train")
        options["balanced"] = classes_of(split, None, 1.0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    oracle = train(model, batches(root, data, keyed, **options), loss_of)
    assert largest_difference(before, oracle) > 1e-3  # it did train
    for name in names:
        assert largest_difference(exported(root, name), oracle) < 1e-5, name


def test_texts_equal_the_plain_loop(root: Path) -> None:
    model = RobertaForSequenceClassification.from_pretrained(
        root / "language", num_labels=3
    ).train()
    kind = text_parity.kind_of(root)
    base = kind.load(str(root / "language"))
    ours = kind.classifier(base, ["a", "b", "c"], seed=0)
    model.classifier.load_state_dict(ours.network.classifier.state_dict())
    split = Manifest.load_split(str(root / "texts"), "train")
    loader = Loader(split, batch=BATCH, seed=0, codec=kind.codec(base, split))

    def loss_of(batch: Batch) -> torch.Tensor:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return torch.nn.BCEWithLogitsLoss()(logits, batch["labels"].float())

    found = (batch for batch, _ in zip(loader, range(STEPS), strict=False))
    oracle = train(model, found, loss_of)
    export = root / "runs" / "texts" / "finetune-model" / "export"
    after = RobertaForSequenceClassification.from_pretrained(export)
    assert after.config.problem_type == "multi_label_classification"
    assert largest_difference(after.state_dict(), oracle) < 1e-5


def test_scores_of_sets_are_scikit_learns(root: Path) -> None:
    stage = root / "runs" / "sets" / "finetune-model"
    model = ViTForImageClassification.from_pretrained(stage / "export").eval()
    assert model.config.problem_type == "multi_label_classification"
    timm = json.loads((stage / "export" / "timm" / "config.json").read_text())
    assert timm["problem_type"] == "multi_label_classification"
    result = json.loads((stage / "result.json").read_text())
    assert result["metric"] == "average_precision"
    for split in ("val", "test"):
        file = Manifest.load_split(str(root / "sets"), split)
        (batch,) = Sequential(file, batch=file.samples)
        labels = batch["labels"]
        assert labels.tolist() != [[False] * 3] * len(labels)
        with torch.no_grad():
            out = model((batch["images"].float() / 255 - MEAN) / STD, labels=labels.float())
        probabilities = out.logits.sigmoid().numpy()
        predicted = probabilities >= 0.5
        wanted = {
            "average_precision": average_precision_score(labels, probabilities, average="macro"),
            "accuracy": accuracy_score(labels, predicted),
            "macro_f1": f1_score(labels, predicted, average="macro", zero_division=0),
            "micro_f1": f1_score(labels, predicted, average="micro", zero_division=0),
            "loss": float(out.loss),  # transformers' own for this kind of problem
            "samples": len(labels),
        }
        for name, value in wanted.items():
            assert result["metrics"][f"{split}_{name}"] == pytest.approx(value, rel=1e-5), name
        recalls = predicted[labels.numpy()[:, 0], 0].mean()
        assert result["analysis"]["per_class_accuracy"][split]["a"] == pytest.approx(recalls)


def test_a_probe_of_sets_is_scikit_learns(root: Path) -> None:
    vit = ViTMAEForPreTraining.from_pretrained(root / "base").vit.eval()
    vit.config.mask_ratio = 0.0
    found = {}
    for split in ("train", "val"):
        file = Manifest.load_split(str(root / "sets"), split)
        (batch,) = Sequential(file, batch=file.samples)
        with torch.no_grad():
            pixels = (batch["images"].float() / 255 - MEAN) / STD
            order = torch.arange(16).float().expand(len(pixels), -1)  # none is hidden or moved
            tokens = vit(pixels, noise=order).last_hidden_state
        found[split] = tokens[:, 0].numpy(), batch["labels"].numpy().astype(int)
    (x, y), (z, known) = found["train"], found["val"]
    models = {
        "linear": make_pipeline(StandardScaler(), RidgeClassifier(alpha=0.1 * len(x))),
        "knn": KNeighborsClassifier(len(x) // 3, metric="cosine"),
    }
    (line,) = (line for line in metrics(root / "runs" / "probed" / "pretrain") if line["step"] == 0)
    for name, model in models.items():
        value = f1_score(known, model.fit(x, y).predict(z), average="macro", zero_division=0)
        assert line[f"probe/{name}"] == pytest.approx(value, abs=0.1), name  # a sample may turn
        assert 0 < value < 1


def test_a_run_that_was_left_ends_in_the_same_bits(root: Path) -> None:
    for name in ("mixed", "balanced", "light"):
        one, other = (
            load_file(root / "runs" / run / "finetune-model" / "export" / "model.safetensors")
            for run in (name, f"left-{name}")
        )
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_each_class_comes_equally_often(root: Path) -> None:
    split = Manifest.load_split(str(root / "shards"), "train")
    label = classes_of(split, None, 1.0)
    places = root / "runs" / "balanced" / "finetune-model" / "samples"
    lines = [
        json.loads(x) for f in sorted(places.glob("*.jsonl")) for x in f.read_text().splitlines()
    ]
    taken = [i for line in lines for i in line["ids"]]
    assert len(taken) == STEPS * BATCH
    counts = Counter(label[i] for i in taken)
    assert max(counts.values()) - min(counts.values()) <= 1
