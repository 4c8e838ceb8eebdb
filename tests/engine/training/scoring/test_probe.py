"""Probes of a planted overfit, and what is kept, against transformers and scikit-learn.

The base was trained for labels that stand in faint patterns; masked auto-encoding at a high rate
looks at the noise, and the features lose them. One start of two ranks for all.
"""

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, ViTMAEForPreTraining, ViTMAEModel

from selfdistill.data import pack
from selfdistill.engine.checkpoints.folder import open_run
from selfdistill.engine.config import options as configuration
from selfdistill.engine.run import run_stages
from selfdistill.engine.training.scoring.probe import judge, spread_out
from tests.kit.launches import COMMON, make_base, metrics, run_cases
from tests.kit.plain_loop import ZERO3
from tests.kit.texts import make_language, make_texts

pytestmark = pytest.mark.multi

ZEROS = ("zero0", "zero3")
OFF = {"probe.every": 0}
FIGURES = {"probe/knn", "probe/linear", "probe/rank", "probe/spread"}
TRAIN, VAL, STEPS = 180, 90, 12
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def faint(generator: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 16, 16, 3] of noise and a faint pattern, and its number among three."""
    patterns = np.random.default_rng(0).choice([-1, 1], (3, 16, 16, 3))
    labels = np.arange(number) % 3
    return (generator.integers(64, 192, (number, 16, 16, 3)) + 12 * patterns[labels]).astype(
        np.uint8
    ), labels


def pixels(images: np.ndarray) -> torch.Tensor:
    """As the model takes them, [n, 3, 16, 16]."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - MEAN) / STD


def feature(vit: ViTMAEModel, images: np.ndarray) -> torch.Tensor:
    """The mean of the patches' tokens [n, D], all of them visible."""
    vit.config.mask_ratio = vit.embeddings.config.mask_ratio = 0.0
    tokens: torch.Tensor = vit(pixels(images)).last_hidden_state
    return tokens[:, 1:].mean(1)


def train_base(folder: Path) -> None:
    """A ViT-MAE whose feature tells the patterns apart."""
    model = ViTMAEForPreTraining.from_pretrained(make_base(folder))
    head, generator = torch.nn.Linear(24, 3), np.random.default_rng(1)
    optimizer = torch.optim.AdamW([*model.vit.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(60):
        images, labels = faint(generator, 48)
        loss = F.cross_entropy(head(feature(model.vit, images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.config.mask_ratio = 0.75
    model.save_pretrained(folder)


def case(root: Path, name: str, zero: str = "zero0", **more: object) -> dict[str, object]:
    return {
        "stage": "pretrain",
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "output": str(root / "runs" / name),
        "zero": str(root / "zero3.json") if zero == "zero3" else zero,
        "distill.feature": "mean",
        "finetune.batch": 64,  # of which the size of a probe's passes comes
        "pretrain.steps": STEPS,
        "pretrain.lr": 0.1,
        "pretrain.warmup": 4,
        "probe.every": 3,
        "save_every": 5,
        **more,
    }


def tuning(root: Path, name: str, zero: str = "zero1", **more: object) -> dict[str, object]:
    """Fine-tuning whose high rate spoils what a low one, in its warm-up, makes better."""
    plan = {
        "steps": 8,
        "lr": 0.03,
        "warmup": 7,
        "eval_every": 2,
        "start": "model",
        "keep": "best",
        "batch": 8,
    }
    tuned = {f"finetune.{option}": value for option, value in plan.items()}
    return case(root, name, zero, stage="finetune", **(tuned | {"finetune.pool": "mean"} | more))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("probe")
    generator = np.random.default_rng(2)
    for split, number in (("train", TRAIN), ("val", VAL)):
        for i, (image, label) in enumerate(zip(*faint(generator, number), strict=True)):
            folder = root / "images" / split / "abc"[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i:03d}.png")
    pack.pack(str(root / "images"), str(root / "shards"))
    pack.pack(str(root / "images" / "train"), str(root / "alone"), splits="1,0,0")
    train_base(root / "base")
    (root / "zero3.json").write_text(ZERO3)
    best: dict[str, Any] = {"pretrain.keep": "best"}
    cases = []
    for zero in ZEROS:
        cases += [case(root, f"off-{zero}", zero, **OFF), case(root, f"on-{zero}", zero)]
    cases += [
        case(root, "best", "zero1", **best),
        case(root, "left", "zero3", **best, leave_at="probing val at step 6"),
        case(root, "left", "zero3", **best),
        case(root, "moved", "zero1", **best, leave_at="step 8"),
        case(root, "moved", "zero3", **best),
        case(root, "patient", "zero0", **best, **{"pretrain.patience": 2}),
        case(root, "patient", "zero0", **best, **{"pretrain.patience": 2}),  # complete
        case(root, "auto", "zero1", **{"probe.every": "auto", "probe.samples": 60}),
        case(root, "alone", data=str(root / "alone"), **{"probe.every": "auto"}),
        case(root, "no", data=str(root / "alone"), expect_error="alone/train has no val split"),
    ]
    taught = {"stage": "distill", "teacher": str(root / "base"), "distill.steps": 4}
    # With dropout, which an encoder left in the mode of evaluation would not have.
    contrast = {"pretrain.objective": "supcon", "supcon.dropout": 0.5, "pretrain.steps": 5}
    texts = make_texts(root / "text" / "shards")
    language = {"data": str(texts), "model": str(make_language(root / "text" / "base"))}
    cases += [
        case(root, "text", "zero3", **language, **{"pretrain.steps": 2, "pretrain.warmup": 0}),
        case(root, "distil-off", "zero1", **taught, **OFF),
        case(root, "distil-on", "zero1", **taught, **{"probe.every": 2}),
        case(root, "contrast-off", "zero1", **contrast, **OFF),
        case(root, "contrast-on", "zero1", **contrast, **{"probe.every": 2}),
        tuning(root, "tuned", "zero3"),
        tuning(root, "left-tuned", "zero3", leave_at="step 8"),
        tuning(root, "left-tuned", "zero3"),
        tuning(root, "averaged", "zero1", **{"finetune.ema": 0.5}),
        tuning(root, "tired", "zero0", **{"finetune.patience": 1, "finetune.keep": "last"}),
        tuning(
            root, "unscored", data=str(root / "alone"), expect_error="alone/train has no val split"
        ),
    ]
    printed = run_cases(root, cases)
    assert f"no probe: {root}/alone/train has no val split" in printed
    assert "pretrain: stops at step 6 of 12: no better probe/linear" in printed
    assert printed.count("resumed at step 7") == 2
    assert "resumed at step 6 of 12" in printed
    (root / "printed.txt").write_text(printed)
    return root


def weights(root: Path, name: str, stage: str = "pretrain") -> dict[str, torch.Tensor]:
    export = root / "runs" / name / stage / "export"
    return load_file((export / "timm" if "tune" in stage else export) / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def curve(root: Path, name: str, stage: str = "pretrain") -> dict[int, dict[str, float]]:
    """Step -> figures, each probe of which has left one line."""
    lines = [line for line in metrics(root / "runs" / name / stage) if "probe/knn" in line]
    assert len({line["step"] for line in lines}) == len(lines)
    assert all(line.keys() - {"step", "time"} == FIGURES for line in lines)
    return {int(line["step"]): {tag: line[tag] for tag in FIGURES} for line in lines}


def result(root: Path, name: str, stage: str = "pretrain") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((root / "runs" / name / stage / "result.json").read_text())
    return content


def by_hand(root: Path, export: Path) -> dict[str, float]:
    """The probe's figures of an exported folder, by transformers and scikit-learn."""
    vit = ViTMAEForPreTraining.from_pretrained(export).vit
    found = {}
    for split in ("train", "val"):
        files = sorted((root / "images" / split).rglob("*.png"))
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        with torch.no_grad():
            found[split] = feature(vit, images).numpy(), [file.parent.name for file in files]
    (x, y), (z, named) = found["train"], found["val"]
    scaler = StandardScaler().fit(x)
    linear = RidgeClassifier(alpha=0.1 * TRAIN).fit(scaler.transform(x), y)
    knn = KNeighborsClassifier(20, metric="cosine").fit(x, y)
    singular = torch.linalg.svdvals(torch.from_numpy(x).double())
    share = singular / singular.sum()
    unit = F.normalize(torch.from_numpy(x))
    return {
        "probe/knn": float(knn.score(z, named)),
        "probe/linear": float(linear.score(scaler.transform(z), named)),
        "probe/rank": float(torch.exp(-(share * share.log()).sum())),
        "probe/spread": float(unit.std(0, correction=0).mean()),
    }


def close(one: dict[str, float], other: dict[str, float]) -> None:
    """Equal but for rounding, which may turn one sample of val."""
    for tag in FIGURES:
        near = 1.01 / VAL if tag in ("probe/knn", "probe/linear") else 1e-3 * other[tag]
        assert one[tag] == pytest.approx(other[tag], abs=near), tag


def test_figures_are_those_of_transformers_and_scikit_learn(root: Path) -> None:
    for zero in ZEROS:
        found = curve(root, f"on-{zero}")
        assert found.keys() == {0, 3, 6, 9, 12}
        close(found[0], by_hand(root, root / "base"))
        close(found[12], by_hand(root, root / "runs" / f"on-{zero}" / "pretrain" / "export"))


def test_texts_are_probed_as_transformers_reads_them(root: Path) -> None:
    base = root / "text" / "base"
    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    found = []
    for split in ("train", "val"):
        with tarfile.open(next((root / "text" / "shards" / split).glob("*.tar"))) as tar:
            files = {m.name: tar.extractfile(m).read().decode() for m in tar.getmembers()}
        names = sorted(name.removesuffix(".txt") for name in files if name.endswith(".txt"))
        labels = np.array([int(files[f"{name}.cls"]) for name in names])
        vectors = []
        for name in names:
            read = tokenizer(files[f"{name}.txt"], return_tensors="pt", truncation=True)
            with torch.no_grad():
                vectors.append(model(**read).last_hidden_state[0].mean(0).numpy())
        found += [np.stack(vectors), labels]
    expected = {f"probe/{name}": value for name, value in judge(*found).items()}
    curves = curve(root, "text")
    assert curves.keys() == {0, 2}
    assert curves[0] == pytest.approx(expected, rel=1e-3)
    assert curves[2] != pytest.approx(expected, rel=1e-3)


def test_a_planted_overfit_is_noticed_and_the_better_weights_are_kept(root: Path) -> None:
    found, told = curve(root, "best"), result(root, "best")
    linear = {step: figures["probe/linear"] for step, figures in found.items()}
    best = max(linear, key=lambda step: linear[step])
    assert best < STEPS // 2
    assert linear[best] > linear[6] + 0.1  # seen by half of the stage
    assert told["curve"]["best"]["step"] == told["kept"]["step"] == best
    assert told["curve"]["last"] == {"step": 12, **found[12]}
    exported = by_hand(root, root / "runs" / "best" / "pretrain" / "export")
    close(exported, found[best])
    assert exported["probe/linear"] > linear[12] + 0.1
    patient = result(root, "patient")
    assert (patient["stopped"], patient["steps"]) == (6, 6)
    assert same(weights(root, "patient"), weights(root, "best"))


def test_a_feature_that_got_worse_is_told(root: Path) -> None:
    """Unless the best weights were kept."""
    names = [*(f"on-{zero}" for zero in ZEROS), "auto", "text", "contrast-on"]
    curves = {name: curve(root, name) for name in names}
    curves["distil-on"] = curve(root, "distil-on", "distill-1")
    ends = {n: (c[0]["probe/linear"], c[max(c)]["probe/linear"]) for n, c in curves.items()}
    fell = sorted(f"{a:.4f} to {b:.4f}" for a, b in ends.values() if a - b >= 0.02)
    assert len(ZEROS) <= len(fell)
    printed = (root / "printed.txt").read_text()
    assert sorted(re.findall(r"probe/linear fell from (.*?), so", printed)) == fell


def test_probing_changes_no_bit_of_the_training(root: Path) -> None:
    for zero in ZEROS:
        assert same(weights(root, f"off-{zero}"), weights(root, f"on-{zero}")), zero
        assert "curve" not in result(root, f"off-{zero}")
    assert same(weights(root, "distil-off", "distill-1"), weights(root, "distil-on", "distill-1"))
    assert same(weights(root, "contrast-off"), weights(root, "contrast-on"))
    assert curve(root, "distil-on", "distill-1").keys() == {0, 2, 4}


def test_what_was_left_goes_on_bit_for_bit(root: Path) -> None:
    assert same(weights(root, "best"), weights(root, "left"))
    assert curve(root, "left").keys() == curve(root, "best").keys()
    # The kept weights came through a checkpoint of another layout.
    assert same(weights(root, "best"), weights(root, "moved"))
    tuned, left = (weights(root, name, "finetune-model") for name in ("tuned", "left-tuned"))
    assert same(tuned, left)


def test_fine_tuning_keeps_and_stops_by_the_scores_of_val(root: Path) -> None:
    for name in ("tuned", "averaged"):
        told = result(root, name, "finetune-model")
        lines = metrics(root / "runs" / name / "finetune-model")
        scored = [line for line in lines if "val/accuracy" in line]
        scores = {line["step"]: line for line in scored}
        assert scores.keys() == {2, 4, 6, 8}
        assert scored[-1]["step"] == told["kept"]["step"]  # of the weights that are left
        accuracies = {int(step): line["val/accuracy"] for step, line in sorted(scores.items())}
        best = max(accuracies, key=lambda step: accuracies[step])
        assert best < 8
        assert accuracies[best] > accuracies[8] + 0.1
        assert told["kept"] == {"step": best, "val/accuracy": accuracies[best]}
        assert told["metrics"]["val_accuracy"] == accuracies[best]
        assert told["metrics"]["val_loss"] == pytest.approx(scores[best]["val/loss"], rel=1e-5)
    tired = result(root, "tired", "finetune-model")
    assert tired["stopped"] < 8
    assert "kept" not in tired
    assert tired["metrics"]["val_accuracy"] == tired["curve"]["last"]["val/accuracy"]


def test_auto_probes_at_the_ends_at_least(root: Path) -> None:
    found = curve(root, "auto")
    assert {0, 12} <= found.keys() <= {0, 2, 4, 6, 8, 10, 12}
    assert not curve(root, "alone")


def test_one_rank_finds_the_same(root: Path, ranks: Any) -> None:
    options = COMMON | case(root, "one")
    run = open_run(configuration.load(options), ranks)
    try:
        run_stages(run)
    finally:
        run.close()
    one, two = curve(root, "one"), curve(root, "on-zero0")
    assert one.keys() == two.keys()
    close(one[0], two[0])
    close(one[3], two[3])


def test_chosen_samples_are_spread_out() -> None:
    assert spread_out(5, 9).tolist() == [0, 1, 2, 3, 4]
    assert spread_out(1000, 3).tolist() == [0, 499, 999]


def test_collapsed_features_are_worth_nothing() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(300) % 3
    one = np.repeat(generator.normal(size=(1, 16)), 300, axis=0).astype(np.float32)
    found = judge(one, labels, one, labels)
    assert found["rank"] == pytest.approx(1, abs=1e-3)
    assert found["spread"] == pytest.approx(0, abs=1e-6)
    assert found["linear"] == pytest.approx(1 / 3)
    sphere = generator.normal(size=(3000, 16)).astype(np.float32)
    found = judge(sphere, np.arange(3000) % 3, sphere[:300], labels, "macro_f1")
    assert found["rank"] == pytest.approx(16, rel=0.01)
    assert found["spread"] == pytest.approx(1 / 4, rel=0.01)
