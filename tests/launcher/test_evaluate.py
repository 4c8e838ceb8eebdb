"""launcher.evaluate: what a run scored, to the last digit, on sets of any form; and its page."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk
from torch.nn import functional as F
from transformers import ViTForImageClassification

from selfdistill.data import pack
from selfdistill.data.errors import UserError
from selfdistill.data.packing.encoding import ImageModality
from selfdistill.data.packing.writer import write_split
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.samples import Sample
from selfdistill.engine.inference.model import load
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.launcher.evaluate import evaluate
from tests.engine.inference.test_model import trained
from tests.kit import texts as text_kit
from tests.kit.launches import launch, make_base, make_images

CLASSES = ("blue", "green", "red")


class World:
    """Images, their shards, and a run on them, half learnt."""

    def __init__(self, root: Path, ranks: Ranks) -> None:
        self.root, self.images, self.shards = root, root / "images", root / "shards"
        make_images(self.images, other=20)
        for split in ("val", "test"):  # wrong labels: else every sample would be right
            for true, other, count in (("red", "blue", 4), ("green", "red", 2)):
                for number in range(count):
                    file = self.images / split / true / f"{number:03d}.png"
                    file.rename(self.images / split / other / f"of {true} {number}.png")
        pack.pack(str(self.images), str(self.shards))
        make_base(root / "base")
        options = {"data.path": str(self.shards), "model.path": str(root / "base")}
        more = {"finetune.start": "model", "finetune.steps": 12, "finetune.lr": 3e-3}
        self.run = trained(ranks, output=str(root / "run"), **options, **more)
        self.stage = self.run / "finetune-model"
        self.result = json.loads((self.stage / "result.json").read_text())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Iterator[World]:
    threads = torch.get_num_threads()
    yield World(tmp_path_factory.mktemp("world"), ranks)
    torch.set_num_threads(threads)


def told(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


@torch.no_grad()
def exported_logits(export: Path, files: list[Path]) -> torch.Tensor:
    """What transformers computes from an exported classifier."""
    model = ViTForImageClassification.from_pretrained(export).eval()
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    pixels = torch.from_numpy(np.stack([np.array(Image.open(file)) for file in files]))
    logits: torch.Tensor = model((pixels.permute(0, 3, 1, 2) / 255 - mean) / std).logits
    return logits


def test_figures_are_those_of_the_run(world: World, tmp_path: Path) -> None:
    came = evaluate(str(world.run), str(world.shards), out=str(tmp_path / "one"))
    assert came is not None
    found = told(tmp_path / "one")
    of_run = {
        name.removeprefix("test_"): value
        for name, value in world.result["metrics"].items()
        if name.startswith("test_")
    }
    assert found["metrics"] | {"samples": found["samples"]} == of_run
    assert 0.7 < found["metrics"]["accuracy"] < 1
    assert found["intervals"].keys() == found["metrics"].keys()
    for name, bounds in world.result["intervals"].items():
        assert found["intervals"][name.removeprefix("test_")] == bounds

    # Against the exported classifier in transformers, and scikit-learn.
    files = [(n, f) for n in CLASSES for f in sorted((world.images / "test" / n).iterdir())]
    logits = exported_logits(world.stage / "export", [file for _, file in files])
    labels = np.array([CLASSES.index(name) for name, _ in files])
    shares, predicted = logits.double().softmax(1).numpy(), logits.argmax(1).numpy()
    wanted = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predicted),
        "macro_f1": sk.f1_score(labels, predicted, average="macro"),
        "auroc": sk.roc_auc_score(labels, shares, multi_class="ovr"),
        "loss": float(F.cross_entropy(logits, torch.from_numpy(labels))),
    }
    assert {k: found["metrics"][k] for k in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found["confusion"] == sk.confusion_matrix(labels, predicted).tolist()
    wrong = np.nonzero(predicted != labels)[0]
    assert found["mistakes"][0]["probability"] == pytest.approx(shares[wrong].max(), rel=1e-5)
    sure = [one["probability"] for one in found["mistakes"]]
    assert sure == sorted(sure, reverse=True)
    assert len(sure) == min(24, len(wrong))


@pytest.mark.multi
def test_two_ranks_and_sets_of_other_forms_give_the_same(world: World, tmp_path: Path) -> None:
    wanted = world.result["metrics"]["test_accuracy"]
    words = ["--module", "selfdistill.launcher.evaluate", world.stage, world.shards]
    done = launch(*words, "--out", tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    first = told(tmp_path / "two")
    assert first["metrics"]["accuracy"] == wanted
    assert first["metrics"]["loss"] == pytest.approx(world.result["metrics"]["test_loss"], rel=1e-6)

    # Pictures that were never packed: class folders with splits, a table, and one split's folder.
    listing = tmp_path / "test.csv"
    files = [f for name in CLASSES for f in sorted((world.images / "test" / name).iterdir())]
    lines = [f"{file},{file.parent.name}" for file in files]
    listing.write_text("\n".join(["file,kind", *lines]))
    table = {"path_column": "file", "label_column": "kind"}
    given: list[tuple[Path, dict[str, Any]]] = [
        (world.images, {}),
        (world.images / "test", {}),
        (listing, table),
    ]
    for number, (source, options) in enumerate(given):
        evaluate(str(world.run), str(source), out=str(tmp_path / str(number)), **options)
        found = told(tmp_path / str(number))
        assert found["metrics"] == {k: pytest.approx(v) for k, v in first["metrics"].items()}

    # Other numbers for the same names, and a class of the model's that is not there.
    order = ["red", "blue"]
    samples = [
        Sample(f"{number}", file, order.index(file.parent.name))
        for number, file in enumerate(files)
        if file.parent.name in order
    ]
    write_split(samples, order, tmp_path / "some", split="val", kind=ImageModality(16))
    evaluate(str(world.run), str(tmp_path / "some" / "val"), out=str(tmp_path / "fewer"))
    fewer = told(tmp_path / "fewer")
    assert [fewer["confusion"][0], fewer["confusion"][2]] == [
        first["confusion"][0],
        first["confusion"][2],
    ]
    assert fewer["confusion"][1] == [0, 0, 0]
    assert fewer["classes"]["green"]["recall"] is None


def test_the_page_needs_nothing_else(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(str(world.run), str(world.shards), out=str(tmp_path), split="val")
    page = (tmp_path / "evaluation.html").read_text()
    found = told(tmp_path)
    assert page.count("data:image/png;base64,") >= len(found["mistakes"]) > 0
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    for words in ("balanced accuracy", "95% interval", "confusion matrix of 3", "Worst mistakes"):
        assert words in page
    assert f"{100 * found['metrics']['accuracy']:.2f}%" in page
    shown = capsys.readouterr().out
    assert "AUROC, mean over the classes" in shown
    assert "the commonest class alone" in shown
    with pytest.raises(UserError, match=r"evaluation.json is there already: .*--overwrite true"):
        evaluate(str(world.run), str(world.shards), out=str(tmp_path))
    with pytest.raises(UserError, match=r"is the split test, and --split val asks for another"):
        evaluate(str(world.run), str(world.shards / "test"), split="val")
    evaluate(str(world.run), str(world.shards), out=str(tmp_path), overwrite=True)
    assert told(tmp_path)["split"] == "test"


def test_pictures_are_fitted_as_those_that_the_model_learnt_from(
    world: World, tmp_path: Path
) -> None:
    wide = tmp_path / "wide"
    for file in (world.images / "test").rglob("*.png"):
        (wide / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(file).resize((40, 16)).save(wide / file.parent.name / file.name)
    model = shutil.copytree(world.stage / "export", tmp_path / "model")
    said = json.loads((model / "selfdistill.json").read_text())
    said["image"]["fit"] = "pad"
    (model / "selfdistill.json").write_text(json.dumps(said))
    pack.pack(str(wide), str(tmp_path / "shards"), size=16, fit="pad", split="test")
    losses = []
    for name, one, data in (
        ("packed", model, tmp_path / "shards"),
        ("loose", model, wide),
        ("cropped", world.stage / "export", wide),
    ):
        evaluate(str(one), str(data), out=str(tmp_path / name))
        losses.append(told(tmp_path / name)["metrics"]["loss"])
    assert losses[0] == pytest.approx(losses[1])
    assert losses[0] != pytest.approx(losses[2], rel=1e-3)


def test_texts(tmp_path: Path, ranks: Ranks) -> None:
    text_kit.make_texts(tmp_path / "shards", other=24)
    text_kit.make_language(tmp_path / "base")
    options = {"data.path": str(tmp_path / "shards"), "model.path": str(tmp_path / "base")}
    more = {"finetune.start": "model", "finetune.steps": 8, "finetune.lr": 2e-3}
    run = trained(ranks, output=str(tmp_path / "run"), **options, **more)
    result = json.loads((run / "finetune-model" / "result.json").read_text())["metrics"]
    evaluate(str(run), str(tmp_path / "shards"), out=str(tmp_path / "out"))
    found = told(tmp_path / "out")
    for name, value in found["metrics"].items():
        assert value == result[f"test_{name}"]
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count("<blockquote>") == len(found["mistakes"]) > 0
    with pytest.raises(UserError, match=r"holds images, .* takes texts: give texts"):
        evaluate(str(run), str(make_images(tmp_path / "images")))


def test_several_labels_a_sample(world: World, tmp_path: Path, ranks: Ranks) -> None:
    rows = ["path,label,split"]
    for file in sorted(world.images.glob("*/*/*.png")):
        names = {"red": "warm;light", "green": "light", "blue": ""}[file.parent.name]
        rows.append(f"{file},{names},{file.parts[-3]}")
    (tmp_path / "sets.csv").write_text("\n".join(rows))
    pack.pack(str(tmp_path / "sets.csv"), str(tmp_path / "sets"), label_separator=";")
    options = {"data.path": str(tmp_path / "sets"), "model.path": str(world.root / "base")}
    more = {"finetune.start": "model", "finetune.steps": 12, "finetune.lr": 3e-3}
    run = trained(ranks, output=str(tmp_path / "run"), **options, **more)
    result = json.loads((run / "finetune-model" / "result.json").read_text())["metrics"]
    evaluate(str(run), str(tmp_path / "sets"), out=str(tmp_path / "packed"))
    found = told(tmp_path / "packed")
    for name, value in found["metrics"].items():
        assert value == pytest.approx(result[f"test_{name}"], rel=1e-9), name
    assert found["intervals"].keys() == found["metrics"].keys() - {"loss"}
    page = (tmp_path / "packed" / "evaluation.html").read_text()
    assert "mAP" in page
    files = sorted(world.images.glob("test/*/*.png"))
    truths = [{"red": (1, 1), "green": (1, 0), "blue": (0, 0)}[file.parent.name] for file in files]
    shares = exported_logits(run / "finetune-model" / "export", files).double().sigmoid().numpy()
    given = shares >= 0.5
    sure = np.where(given, shares, 1 - shares)
    sure[given == np.array(truths, bool)] = 0  # columns: light, warm
    told_sure = [one["probability"] for one in found["mistakes"]]
    assert told_sure == pytest.approx(
        sorted(filter(None, sure.max(1)), reverse=True)[:24], rel=1e-4
    )
    assert all(
        one["predicted"].removeprefix("not ") in ("light", "warm")
        and one["predicted"].startswith("not ") == (one["predicted"][4:] in one["label"])
        for one in found["mistakes"]
    )
    assert page.count('<span class="wrong">says ') == len(found["mistakes"])
    first = found["mistakes"][0]
    assert f"says {first['predicted']}</span> ({100 * first['probability']:.1f}%)" in page
    test = [rows[0], *(row for row in rows if row.endswith(",test"))]
    (tmp_path / "test.csv").write_text("\n".join(test))
    evaluate(
        *(str(run), str(tmp_path / "test.csv")), out=str(tmp_path / "table"), label_separator=";"
    )
    assert told(tmp_path / "table")["metrics"] == {
        k: pytest.approx(v) for k, v in found["metrics"].items()
    }
    # Each has one label here, and still the model gives several.
    light = [row for row in test if not row.partition(",")[2].startswith(("warm", ","))]
    (tmp_path / "light.csv").write_text("\n".join(light))
    came = evaluate(str(run), str(tmp_path / "light.csv"), label_separator=";")
    assert came is not None
    assert came.n == came.by_class[came.classes.index("light")].support == len(light) - 1
    with pytest.raises(UserError, match=r"has one class a sample, .* gives several classes a"):
        evaluate(str(run), str(world.shards))


def test_sets_that_are_no_training(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one class, of deep pictures that predict shows too, among strays, in part broken."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "test"):
        (tmp_path / "set" / split / "red").mkdir(parents=True)
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    files = []
    for number, file in enumerate(sorted(world.images.glob("*/red/*.png"))[:24]):
        values = np.array(Image.open(file).convert("L")).astype(np.uint16)
        files.append(tmp_path / "set" / "test" / "red" / f"{number:03d}.png")
        Image.fromarray(values * 257).save(files[-1])  # of 16 bits
    (tmp_path / "set" / "test" / "red" / "broken.png").write_text("")
    came = evaluate(str(world.run), "~/set", out="~/out", skip_broken=True)
    assert came is not None
    assert (came.n, came.skipped) == (24, 1)
    assert told(tmp_path / "out")["skipped"] == 1
    assert "1 broken samples were left out" in (tmp_path / "out" / "evaluation.html").read_text()
    shares = load(world.run)(map(str, files))[:, CLASSES.index("red")]
    assert came.figures["loss"] == pytest.approx(-np.log(shares).mean(), rel=1e-5)


def test_bad_input_is_one_line(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(pattern: str, *words: Path | str, **options: Any) -> None:
        with pytest.raises(UserError, match=pattern) as caught:
            evaluate(*map(str, words), **options)
        assert "\n" not in str(caught.value)

    run, shards = world.run, world.shards
    refused("is an encoder, which has no classes", world.root / "base", shards)
    refused("holds no model", world.images, shards)
    refused("there is no", run, tmp_path / "nowhere")
    refused("has no split 'val'", run, _only_test(world, tmp_path), split="val")
    refused("there is no split 'tset'", run, shards, split="tset")

    pack.pack(str(world.images), str(tmp_path / "plain"), unlabelled=True)
    refused("has no labels, which an evaluation needs", run, tmp_path / "plain" / "train")
    make_images(tmp_path / "other", train=3, other=3)
    for split in ("train", "val", "test"):
        (tmp_path / "other" / split / "red").rename(tmp_path / "other" / split / "rad")
    refused(
        r"class 'rad' of .* is none of the model's. Did you mean red\?"
        r" The set has 3 \(blue, green, rad\); .* has 3 \(blue, green, red\)",
        *(run, tmp_path / "other"),
    )
    shutil.copytree(world.images / "test" / "red", tmp_path / "single" / "red")
    came = evaluate(str(run), str(tmp_path / "single"))
    assert came is not None
    assert "auroc" not in came.figures
    assert "all samples are of one class" in capsys.readouterr().out
    inputs = (run, shards)
    (tmp_path / "file").write_text("")
    refused("file is a file: give a folder", run, shards, out=str(tmp_path / "file"))
    refused(r"file/out cannot be made .*name another", *inputs, out=str(tmp_path / "file" / "out"))
    refused(r"/proc/x cannot be made", *inputs, out="/proc/x")
    refused("--batch 0", run, shards, batch=0)


def _only_test(world: World, tmp_path: Path) -> Path:
    shutil.copytree(world.shards / "test", tmp_path / "only" / "test")
    assert Manifest.load_split(str(tmp_path / "only"), "test").samples == 60
    return tmp_path / "only"
