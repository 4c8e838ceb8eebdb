"""`import selfdistill as sd`: the commands from Python; what their files hold is the oracle."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import ViTForImageClassification

import selfdistill as sd
from selfdistill.launcher.api.training import words_of
from tests.kit import warm
from tests.kit.launches import (
    COMMON,
    ROOT,
    environment,
    free_port,
    make_base,
    make_images,
    read_events,
)

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("python")
    make_images(root / "images")
    make_base(root / "base")
    assert sd.pack(root / "images", root / "shards", name="squares") == root / "shards"
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> sd.Run:
    short = {"pretrain.steps": 2, "distill.steps": 2, "finetune.steps": 2, "finetune.warmup": 1}
    return sd.train(
        **COMMON | short,
        data=root / "shards",
        model=root / "base",
        output=root / "run",
        compare=True,
        finetune={"seeds": 2},
        master_port=free_port(),
    )


def test_importing_takes_no_time_and_names_are_there() -> None:
    code = (
        "import sys, selfdistill as sd; heavy = {'torch', 'numpy', 'pandas', 'fire'};"
        "assert not heavy & sys.modules.keys(); assert sd.UserError.__name__ == 'UserError';"
        "assert {'pack', 'train', 'predict', 'Run'} <= set(dir(sd));"
        "sd.train, sd.Run; assert not {'torch', 'pandas'} & sys.modules.keys(); sd.nothing"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1].endswith("'selfdistill' has no attribute 'nothing'")


def test_a_run_holds_what_its_folder_holds(run: sd.Run, root: Path) -> None:
    result = json.loads((run.folder / "finetune" / "result.json").read_text())
    assert run.metrics == result["metrics"]
    assert list(run.results)[:2] == ["pretrain", "distill-1"]
    assert run.results["finetune"] == result
    table = run.compare().set_index("method")
    assert list(table.index) == ["fine-tuning", "further pre-training", "self-distillation"]
    assert table.loc["self-distillation", "mean"] == result["metrics"]["test_accuracy"]
    assert table.loc["self-distillation", "std"] == result["std"]["test_accuracy"]
    assert (table["n"] == 2).all()
    assert list(run.compare("val_loss")["metric"].unique()) == ["val_loss"]
    both = run.compare("val_loss,val_accuracy")
    assert list(both["metric"].unique()) == ["val_loss", "val_accuracy"]
    assert list(both.columns) == ["method", "metric", "mean", "std", "n", "seconds"]
    assert "finetune" in repr(run)
    assert sd.Run(root / "run").metrics == run.metrics


def test_curves_are_those_of_tensorboard(run: sd.Run) -> None:
    curves = run.curves
    assert list(curves.columns) == ["stage", "step", "tag", "value"]
    seeds = [f"{name}/seed-{n}" for name in ("model", "pretrain") for n in (0, 1)]
    stages = ["pretrain", "distill-1", *(f"finetune-{one}" for one in seeds)]
    assert list(curves["stage"].unique()) == [*stages, "finetune/seed-0", "finetune/seed-1"]
    for stage in ("distill-1", "finetune/seed-1"):
        scalars = read_events(run.folder / stage).scalars
        ours = curves[curves["stage"] == stage]
        for tag, points in ours.groupby("tag"):
            found = list(zip(points["step"], points["value"], strict=True))
            assert [step for step, _ in found] == [step for step, _ in scalars[str(tag)]]
            values = [value for _, value in scalars[str(tag)]]
            assert [value for _, value in found] == pytest.approx(values, rel=1e-6)


def test_exports_load_in_transformers_and_here(run: sd.Run) -> None:
    exports = run.exports
    assert {"pretrain", "distill-1", "finetune/seed-0", "finetune/seed-1"} <= exports.keys()
    model = ViTForImageClassification.from_pretrained(exports["finetune/seed-0"])
    assert sorted(model.config.id2label.values()) == ["blue", "green", "red"]
    assert sd.load(run).classes == ["blue", "green", "red"]
    assert sd.load(exports["pretrain"]).classes == []


def test_predictions_and_features_are_tables_and_arrays(run: sd.Run, root: Path) -> None:
    pictures = sorted((root / "images" / "test").rglob("*.png"))
    table = sd.predict(run, root / "images" / "test")
    assert len(table) == len(pictures) == 15
    assert set(table["class"]) <= {"blue", "green", "red"}
    assert table["probability"].between(1 / 3, 1).all()
    # The same as a list, and as the file of the command.
    broken = root / "broken.png"
    broken.write_text("no picture")
    listed = sd.predict(run, [*pictures, broken], root / "labels.csv")
    assert list(listed["path"]) == [*pictures, broken]
    assert list(listed["class"][:15]) == list(table["class"])
    assert list(listed["error"].isna()) == [True] * 15 + [False]
    assert listed["probability"].dtype == "float64"
    assert (root / "labels.csv").read_text().count("\n") == 17
    ids, vectors = sd.embed(run.exports["distill-1"], root / "images" / "test")
    assert (vectors.shape, len(ids)) == ((15, 24), 15)
    kept = sd.embed(run.exports["distill-1"], pictures, root / "features.npy").vectors
    assert (kept == vectors).all()
    assert (np.load(root / "features.npy") == vectors).all()
    for call, match in (
        (lambda: sd.predict(run, root / "images", top="few"), "option top: "),
        (lambda: sd.predict(run, root / "images", root / "labels.csv"), "labels.csv"),
        (lambda: sd.predict(run.exports["pretrain"], root / "images"), "is an encoder"),
        (lambda: sd.embed(run, pictures, root / "x.parquet"), "sd.embed writes .npy"),
    ):
        with pytest.raises(sd.UserError, match=match):
            call()


def test_scores_are_tables(run: sd.Run, root: Path) -> None:
    export = run.exports["finetune/seed-1"]
    figures, classes, confusion = sd.evaluate(export, root / "shards", root / "page")
    scored = run.results["finetune/seed-1"]["metrics"]
    value = figures.set_index("figure")
    assert value.loc["accuracy", "value"] == scored["test_accuracy"]
    assert value.loc["accuracy", "low"] <= value.loc["accuracy", "value"]
    assert list(classes["class"]) == ["blue", "green", "red"]
    assert confusion is not None
    assert confusion.sum() == classes["support"].sum() == 15
    assert (root / "page" / "evaluation.html").is_file()
    with pytest.raises(sd.UserError, match="is an encoder"):
        sd.evaluate(run.exports["pretrain"], root / "shards")


def test_mistakes_are_exceptions_with_the_commands_line(
    root: Path, run: sd.Run, capfd: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str | Path) -> str:
        done = subprocess.run(
            [warm.executable(), "-m", "selfdistill", *map(str, words)],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        return done.stderr.removeprefix("error: ").removesuffix("\n")

    with pytest.raises(sd.UserError) as error:
        sd.pack(root / "images", root / "shards")
    line = told("pack", root / "images", root / "shards")
    assert str(error.value) == line.replace("--overwrite", "overwrite=True")
    with pytest.raises(sd.UserError) as error:
        sd.pack(root / "images", root / "other", samples_per_shard="many")
    line = told("pack", root / "images", root / "other", "--samples_per_shard=many")
    assert str(error.value) == line.replace("--", "")
    with pytest.raises(sd.UserError, match=r"unknown option sise\. Did you mean size\?"):
        sd.pack(root / "images", root / "other", sise=32)
    with pytest.raises(sd.UserError, match=r"unknown option distil\.steps\. Did you mean"):
        sd.train(output=root / "other", distil={"steps": 3})
    with pytest.raises(sd.UserError, match=r"inputs\[1\] is nan, neither a path nor a text"):
        sd.predict(run, ["a.png", float("nan")])
    with pytest.raises(sd.UserError, match="output is missing"):
        sd.train(num_gpus=None)
    with pytest.raises(sd.UserError, match="nowhere: no such folder"):
        sd.Run(root / "nowhere")
    with pytest.raises(sd.UserError, match="has no 'no_such'"):
        run.compare("no_such")
    # What the ranks find comes out of their processes.
    capfd.readouterr()
    with pytest.raises(sd.UserError, match="is complete, made with seed = 0, now it is 1"):
        sd.train(
            **COMMON | {"pretrain.steps": 2, "seed": 1},
            stage="pretrain",
            data=root / "shards",
            output=run,
        )


def test_arguments_become_words() -> None:
    words = words_of(
        {
            "data": Path("a b"),
            "finetune.crop": (0.08, 1),
            "distill": {"epochs": 3, "match": "cls"},
            "overwrite": True,
            "model": None,
        }
    )
    assert words == [
        *("--data=a b", "--finetune.crop=0.08,1", "--distill.epochs=3", "--distill.match=cls"),
        *("--overwrite=true", "--model=None"),
    ]
