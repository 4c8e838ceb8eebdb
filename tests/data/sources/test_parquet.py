"""Parquet files as `datasets` and pandas write them: images and texts, splits, names of classes."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from tests.data.sources.test_layouts import packed
from tests.data.sources.test_text_sources import read, single
from tests.kit.command import call
from tests.kit.launches import ROOT
from tests.kit.shards import numbered, png

NAMES = ["cat", "äffin", "dog, wild"]


def table(numbers: range, **more: Any) -> dict[str, Any]:
    return {"image": [numbered(n, 8) for n in numbers], "label": [n % 3 for n in numbers], **more}


def written(path: Path, values: dict[str, Any]) -> Path:
    """By `datasets` itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Any] = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=NAMES),
        "patient": datasets.Value("string"),
    }
    features = datasets.Features({name: kinds[name] for name in values})
    datasets.Dataset.from_dict(values, features=features).to_parquet(path, batch_size=2)
    return path


def plain(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_splits_as_a_hub_keeps_them(tmp_path: Path) -> None:
    for part in range(2):
        numbers = range(3 * part, 3 * part + 3)
        written(tmp_path / "set" / "data" / f"train-0000{part}-of-00002.parquet", table(numbers))
    written(tmp_path / "set" / "data" / "validation-00000-of-00001.parquet", table(range(6, 9)))
    (tmp_path / "set" / "README.md").write_text("about")
    found = packed(tmp_path / "set", tmp_path / "out")
    assert found == {
        "train": {n: NAMES[n % 3] for n in range(6)},
        "val": {n: NAMES[n % 3] for n in range(6, 9)},
    }
    assert {p.name for p in tmp_path.iterdir()} == {"set", "out"}


def test_images_that_datasets_saved(tmp_path: Path) -> None:
    """One data set, and a dictionary of splits; files of images are taken into the table."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    (tmp_path / "a.png").write_bytes(png(numbered(0, 8)))
    rows = table(range(7)) | {"image": [str(tmp_path / "a.png"), *table(range(1, 7))["image"]]}
    one = datasets.Dataset.from_dict(rows, features=features)
    one.save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "a.png").unlink()
    wanted = {n: NAMES[n % 3] for n in range(7)}
    assert packed(tmp_path / "one", tmp_path / "o1", "--splits", 1) == {"train": wanted}
    two = datasets.Dataset.from_dict(table(range(7, 10)), features=features)
    datasets.DatasetDict({"train": one.select(range(1, 7)), "test": two}).save_to_disk(
        tmp_path / "both"
    )
    assert packed(tmp_path / "both", tmp_path / "o2") == {
        "train": {n: wanted[n] for n in range(1, 7)},
        "test": {n: NAMES[n % 3] for n in range(7, 10)},
    }


def test_what_map_left_beside_is_none_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    datasets.Dataset.from_dict(table(range(6)), features=features).save_to_disk(tmp_path / "set")
    loaded = datasets.load_from_disk(tmp_path / "set")
    loaded.map(lambda row: row, load_from_cache_file=False)
    assert len(list((tmp_path / "set").glob("cache-*.arrow"))) == 1
    wanted = {"train": {n: NAMES[n % 3] for n in range(6)}}
    assert packed(tmp_path / "set", tmp_path / "out", "--splits", 1) == wanted
    assert Manifest.load_split(str(tmp_path / "out"), "train").samples == 6
    next((tmp_path / "set").glob("data-*.arrow")).unlink()
    assert call(pack, tmp_path / "set", tmp_path / "two") == 2
    assert "data-00000-of-00001.arrow is missing, which" in capsys.readouterr().err


def test_images_with_captions(tmp_path: Path) -> None:
    """They are images, but where the texts are asked for by name."""
    captions = [f"picture {n}" for n in range(4)]
    pictures = [png(numbered(n, 8)) for n in range(4)]
    kinds = ["a", "b"] * 2
    path = plain(tmp_path / "x.parquet", image=pictures, text=captions, note=captions, kind=kinds)
    words = ("--label_column", "kind", "--splits", 1)
    wanted = {"train": dict(enumerate(kinds))}
    assert packed(path, tmp_path / "o1", *words) == wanted
    assert packed(path, tmp_path / "o2", *words, "--path_column", "image") == wanted
    assert call(pack, path, tmp_path / "o3", *words, "--text_column", "note") == 0
    assert read(tmp_path / "o3")["train"] == single(**dict(zip(captions, kinds, strict=True)))


def test_an_empty_file_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part, pictures in enumerate([[], [png(numbered(n, 8)) for n in range(4)]]):
        kinds = pyarrow.array(["a", "b"] * (len(pictures) // 2), pyarrow.string())
        images = pyarrow.array(pictures, pyarrow.binary())
        plain(tmp_path / "set" / f"train-{part}-of-2.parquet", image=images, label=kinds)
    wanted = {"train": {0: "a", 1: "b", 2: "a", 3: "b"}}
    assert packed(tmp_path / "set", tmp_path / "out") == wanted
    assert call(pack, tmp_path / "set" / "train-0-of-2.parquet", tmp_path / "two") == 2
    assert "train-0-of-2.parquet has no rows: add some" in capsys.readouterr().err


def test_one_file_of_patients(tmp_path: Path) -> None:
    """The other columns are there as in a CSV."""
    patients = [f"p{n // 4}" for n in range(40)]
    path = written(tmp_path / "all.parquet", table(range(40), patient=patients))
    found = packed(path, tmp_path / "out", "--group_column", "patient")
    assert {n: label for part in found.values() for n, label in part.items()} == {
        n: NAMES[n % 3] for n in range(40)
    }
    where = {n: split for split, part in found.items() for n in part}
    assert all(len({where[n] for n in range(4 * p, 4 * p + 4)}) == 1 for p in range(10))


def test_bytes_in_a_column_of_another_name(tmp_path: Path) -> None:
    pictures = [png(numbered(n, 8)) for n in range(4)]
    path = plain(tmp_path / "x.parquet", scan=pictures, mask=pictures, kind=[1.0, 2.0] * 2)
    assert call(pack, path, tmp_path / "out", "--label_column", "kind") == 2
    words = ("--path_column", "scan", "--label_column", "kind", "--splits", 1)
    assert packed(path, tmp_path / "out", *words) == {"train": {0: "1", 1: "2", 2: "1", 3: "2"}}


def test_texts(tmp_path: Path) -> None:
    plain(tmp_path / "set" / "train.parquet", text=["one", "two"], label=["a", "b"])
    plain(tmp_path / "set" / "dev.parquet", text=["three\n"], label=["b"])
    plain(tmp_path / "set" / "test.parquet", text=["four"], label=["a"])
    assert call(pack, tmp_path / "set", tmp_path / "out") == 0
    val = [
        (text._replace(text=text.text.strip()), label)
        for text, label in read(tmp_path / "out")["val"]
    ]
    assert val == single(three="b")
    assert read(tmp_path / "out")["train"] == single(one="a", two="b")
    assert call(pack, tmp_path / "set", tmp_path / "bare", "--unlabelled") == 0


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"image": [None, None], "label": [0, 1]}, "neither images nor a column 'text'"),
    ({"image": [{"bytes": None, "path": "a.png"}], "label": [0]}, "row 0 has no bytes"),
    ({"a": [b"1"], "b": [b"1"], "label": [0]}, "several columns of images (a, b)"),
    ({"image": [b"1"], "class": [0]}, "has no column 'label' (it has path, class)"),
    ({"image": [b"junk"] * 9, "label": [0, 1, 2] * 3}, "no image of a known kind"),
    ({"image": [b"junk"] * 2, "label": [0, None]}, "has no label"),
    ({"image": [b"junk"] * 3, "label": [1.0, math.nan, 0.0]}, "has no label"),
    ({"image": [b"junk"] * 2, "label": [0, -1]}, "its label -1 stands for none"),
]


@pytest.mark.parametrize(("columns", "said"), MISTAKES)
def test_what_cannot_be_packed(
    columns: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plain(tmp_path / "x.parquet", **columns)
    assert call(pack, path, tmp_path / "out") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert {p.name for p in tmp_path.iterdir()} == {"x.parquet"}


def test_files_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(tmp_path / "a" / "train.parquet", text=["x"], label=["a"])
    plain(tmp_path / "a" / "other.parquet", text=["x"], label=["a"])
    assert call(pack, tmp_path / "a", tmp_path / "out") == 2
    assert "other.parquet is named after no split" in capsys.readouterr().err
    plain(tmp_path / "b" / "train.parquet", text=["x"], label=["a"])
    plain(tmp_path / "b" / "test.parquet", text=["x"], klass=["a"])
    assert call(pack, tmp_path / "b", tmp_path / "out") == 2
    assert "has other columns than" in capsys.readouterr().err
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 99], "label": ["a"]}), out)
    for content in (out.getvalue()[:-9], b"", b"PAR1junkPAR1", b"junk" * 99):
        (tmp_path / "c.parquet").write_bytes(content)
        assert call(pack, tmp_path / "c.parquet", tmp_path / "out") == 2
        error = capsys.readouterr().err
        assert "c.parquet cannot be read" in error
        assert error.count("\n") == 1


def test_a_class_that_has_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path / "x.parquet", table(range(3)))
    known = pyarrow.parquet.read_table(path)
    column = pyarrow.array([0, 1, 3])
    pyarrow.parquet.write_table(known.set_column(1, known.schema.field("label"), column), path)
    assert call(pack, path, tmp_path / "out") == 2
    assert "row 2: class 3 is outside the 3 that it names" in capsys.readouterr().err


def test_where_pyarrow_is_not_installed(tmp_path: Path) -> None:
    plain(tmp_path / "x.parquet", text=["x"], label=["a"])
    code = (
        "import sys; sys.modules['pyarrow'] = None; sys.argv = ['pack', 'x.parquet', 'out'];"
        " from selfdistill.data.cli import run; from selfdistill.data.pack import pack; run(pack)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install selfdistill[parquet]" in done.stderr.splitlines()[-1]
