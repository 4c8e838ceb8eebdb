"""What people have in a notebook: tables, arrays, pictures in memory; and what comes back."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image
from transformers import AutoModelForSequenceClassification

import selfdistill as sd
from selfdistill.engine.checkpoints.results import RESULT
from selfdistill.launcher.api.mistakes import in_python
from tests.kit.launches import COMMON, ROOT, environment, make_world
from tests.kit.texts import SENTENCES, config_of, make_language, make_tokenizer

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def run(root: Path) -> sd.Run:
    steps = {
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.steps": 2,
        "finetune.warmup": 1,
    }
    given = {"data": root / "shards", "model": root / "base", "output": root / "run"}
    return sd.train(**COMMON | steps | given)


@pytest.fixture
def pictures(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Relative to where the caller is; one is not there, one is spelt in two ways."""
    monkeypatch.chdir(root)
    found = sorted(str(path.relative_to(root)) for path in root.glob("images/test/*/*.png"))
    return [*found[:3], "nowhere.png", f"./{found[0]}", *found[3:]]


def test_paths_come_back_as_they_were_given(run: sd.Run, pictures: list[str]) -> None:
    table = pandas.DataFrame({"path": pictures, "label": "?"}, index=range(50, 50 + len(pictures)))
    labels = sd.predict(run, table)
    assert list(labels["path"]) == pictures
    assert list(labels.index) == list(table.index)
    assert len(table.merge(labels, on="path")) == len(pictures)
    assert list(labels["error"].isna()) == [name != "nowhere.png" for name in pictures]
    for given in (table["path"], np.array(pictures), pictures, (one for one in pictures)):
        found = sd.predict(run, given)
        assert list(found["path"]) == pictures
        assert list(found["class"].dropna()) == list(labels["class"].dropna())
    named = sd.predict(run, table.rename(columns={"path": "file"}), path_column="file")
    assert list(named["path"]) == pictures
    paths = [Path(one) for one in pictures]
    assert list(sd.predict(run, paths)["path"]) == paths


def test_texts_of_a_table_may_be_pairs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    language = make_language(root / "language")
    texts = [*SENTENCES, "images"]  # a text, though a folder is called so
    monkeypatch.setenv("HOME", str(root))
    alone = sd.embed(language, texts, "~/alone.npy").vectors
    assert (root / "alone.npy").is_file()
    assert sd.load(language)(texts) == pytest.approx(alone, abs=1e-6)
    table = pandas.DataFrame({"text": texts, "text_pair": [None, "a pair", None, "another", None]})
    ids, vectors = sd.embed(language, table)
    assert list(ids["id"]) == ["0", "1", "2", "3", "4"]
    same = [np.allclose(a, b, atol=1e-5) for a, b in zip(vectors, alone, strict=True)]
    assert same == [True, False, True, False, True]
    near = sd.embed(language, table[["text"]], nearest=1).nearest
    assert near is not None
    assert set(near["name"]) == set(ids["id"])
    with pytest.raises(sd.UserError, match="a DataFrame without a column text2: correct pair"):
        sd.embed(language, table, pair_column="text2")
    with pytest.raises(sd.UserError, match="a DataFrame without a column text: give"):
        sd.embed(language, table[["text_pair"]])


def test_neighbours_come_as_a_table(
    run: sd.Run, pictures: list[str], capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    features = sd.embed(run, pictures, nearest=2)
    ids, vectors = features
    assert list(ids["path"]) == [one for one in pictures if one != "nowhere.png"]
    near = features.nearest
    assert near is not None
    assert list(near.columns) == ["name", "rank", "neighbour", "cosine"]
    assert len(near) == 2 * len(vectors)
    assert set(near["name"]) | set(near["neighbour"]) <= set(pictures)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    place = {name: number for number, name in enumerate(ids["path"])}
    pairs = zip(near["name"], near["neighbour"], strict=True)
    cosines = [unit[place[one]] @ unit[place[other]] for one, other in pairs]
    assert near["cosine"].to_numpy() == pytest.approx(np.array(cosines), abs=1e-5)
    assert repr(features) == f"<Features: ids 16 rows, vectors 16 x 24, nearest {len(near)} rows>"
    # What was printed names no file that is gone.
    printed = capsys.readouterr().out
    assert re.search(r"^17 inputs, .*1 unreadable, such as .*nowhere\.png", printed, re.M)
    assert "selfdistill-" not in printed
    assert "\nthe 2 nearest of each\n" in printed
    assert sd.embed(run, pictures, root / "kept.npy").nearest is None
    assert f"{root / 'kept.npy'}: 17 inputs" in capsys.readouterr().out


def test_what_lies_in_memory_is_refused_in_a_line(
    run: sd.Run, pictures: list[str], root: Path
) -> None:
    table = pandas.DataFrame({"file": pictures})
    picture = Image.open(pictures[0])
    cure = r"write it with df\.to_csv\('set\.csv', index=False\) and give that file"
    calls: list[tuple[Any, str]] = [
        (lambda: sd.pack(table, "x"), f"source is a DataFrame: {cure}"),
        (lambda: sd.evaluate(run, table), f"data is a DataFrame: {cure}"),
        (lambda: sd.train(data=table, output="x"), f"data is a DataFrame: {cure}"),
        (lambda: sd.predict(run, table), r"a DataFrame without a column path: give df\['\.\.\.'\]"),
        (lambda: sd.predict(run, picture), "inputs is a picture in memory: give its path"),
        (lambda: sd.predict(run, [picture]), r"inputs\[0\] is a picture in memory: give its path"),
        (lambda: sd.predict(run, np.zeros((2, 8))), r"inputs\[0\] is an array of shape \(8,\)"),
        (lambda: sd.predict(run, None), "inputs is None: give a path, or a list of paths"),
        (lambda: sd.predict(run, {"path": pictures}), "inputs is a dict: give a path, or a list"),
        (lambda: sd.embed(run, []), "inputs is empty"),
        (lambda: sd.predict(run, ["images", "base"]), "a list takes files; give one folder by"),
        (lambda: sd.predict(run, pictures, device="cpu"), 'sd.load\\(model, device="cpu"\\)'),
        (lambda: sd.train(device="cpu", output="x"), "device is no option: a training takes"),
        (lambda: sd.train(epochs=np.int64(3), output="x"), r'pretrain=\{"epochs": 3\}$'),
        (lambda: sd.train(workers=3, output="x"), r'data: \*\*\{"data.workers": 3\}$'),
        (lambda: sd.train(finetune=3, output="x"), r'a dictionary, such as finetune=\{"epochs": 3'),
        (lambda: sd.load(run, device="gpu"), "device gpu: give cpu, cuda"),
        (lambda: sd.load(run, sise=3), "unknown option sise: there are precision"),
        (lambda: sd.Run(root / "images"), "images holds no training: name the output of sd.train"),
    ]
    for call, match in calls:
        with pytest.raises(sd.UserError, match=match):
            call()
    assert not (root / "x").exists()


def test_a_training_that_is_not_complete_is_to_be_called_again(run: sd.Run, root: Path) -> None:
    half = Path(shutil.copytree(run.folder, root / "half"))
    (half / "finetune" / RESULT).unlink(missing_ok=True)
    for result in half.rglob(RESULT):
        result.unlink()
    with pytest.raises(
        sd.UserError, match=r"half is not complete, .*: wait for it, or call sd\.train"
    ):
        sd.predict(sd.Run(half), root / "images")


def test_sizes_may_be_numpys_or_two_sides(root: Path) -> None:
    for name, size in (("a", np.int64(24)), ("b", (24, 32)), ("c", np.array([24, 32]))):
        packed = sd.pack(root / "images", root / name, size=size)
        image = json.loads((packed / "train" / "manifest.json").read_text())["image"]
        assert image["size"] == (24 if name == "a" else [24, 32])


def test_a_loaded_model_takes_lists(run: sd.Run, pictures: list[str]) -> None:
    given = [one for one in pictures if one != "nowhere.png"]
    model = sd.load(run, device="cpu")
    shares = model(given)
    assert shares.shape == (16, 3)
    assert shares.sum(axis=1) == pytest.approx(np.ones(16))
    labels = sd.predict(run, given)
    assert [model.classes[i] for i in shares.argmax(axis=1)] == list(labels["class"])
    assert shares.max(axis=1) == pytest.approx(labels["probability"].to_numpy(), abs=1e-5)
    for wrong, match in ((["nowhere.png"], "cannot be read"), ([], "no inputs"), ("a", "a list")):
        with pytest.raises(sd.UserError, match=match):
            model(wrong)


def test_a_model_is_loaded_in_silence(tmp_path: Path) -> None:
    """Of a classifier's export transformers would tell a page of unused weights."""
    tokenizer = make_tokenizer()
    model = AutoModelForSequenceClassification.from_config(config_of("roberta", len(tokenizer)))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = "import selfdistill as sd; print(sd.load('model', device='cpu')(['a', 'b']).shape)"
    variables = environment(PYTHONPATH=str(ROOT))
    variables.pop("TRANSFORMERS_VERBOSITY", None)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=variables, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("(2, 2)\n", "")


def test_scores_say_their_figures(run: sd.Run, root: Path) -> None:
    scores = sd.evaluate(run, root / "shards")
    accuracy = scores.figures.set_index("figure").loc["accuracy", "value"]
    assert repr(scores).startswith(f"<Scores: accuracy {accuracy:.4g}, ")
    assert repr(scores).endswith("; 3 classes, 15 samples>")
    assert scores._repr_html_() == scores.figures.to_html(index=False)


def test_messages_come_in_pythons_words() -> None:
    for line, said in (
        ("x is there: --overwrite replaces it", "x is there: overwrite=True replaces it"),
        ("pack it (python -m data.pack SOURCE a/b)", "pack it (sd.pack(SOURCE, 'a/b'))"),
        ("(python -m data.index --overwrite)", "(python -m data.index --overwrite)"),
        ("links (tar --dereference --hard-dereference)", None),
        ("/a/--b and a--b --c", "/a/--b and a--b c"),
        ("launcher.embed gives its features", "sd.embed gives its features"),
        ("engine/run.py --stage all --compare true", 'sd.train stage="all" compare=True'),
        ("is not complete: launch its run again with the same command, and", "sd.train again, and"),
        ("(--data.skip_broken 0.01)", '(**{"data.skip_broken": 0.01})'),
        ("give it, and see --help for all", "see `selfdistill predict --help` for all"),
        ("--part 3/64: no", "part 3/64: no"),
    ):
        assert (said or line) in in_python(line, "predict")
