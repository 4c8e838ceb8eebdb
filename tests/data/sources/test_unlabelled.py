"""--unlabelled PATH: a split of train's inputs and more, whose tars of train are written once."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from selfdistill.data.index import index
from selfdistill.data.loading.loader import Sequential
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.kit.command import call
from tests.kit.shards import class_folders, number_of, numbered, png


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """5 train and 2 test images, numbered 0 to 6, and beside them 4 more, from 100."""
    class_folders(tmp_path / "images" / "train", {"ant": 3, "bee": 2})
    class_folders(tmp_path / "images" / "test", {"ant": 1, "bee": 1}, start=5)
    class_folders(tmp_path / "more" / "any", {"x": 4}, start=100)
    return tmp_path / "images"


def numbers(root: Path, split: str) -> dict[int, int]:
    """Number in the picture -> label."""
    found: dict[int, int] = {}
    for batch in Sequential(Manifest.load_split(str(root), split), batch=4):
        for picture, label in zip(
            batch["images"][batch["valid"]], batch["labels"][batch["valid"]], strict=True
        ):
            found[number_of(picture.numpy())] = int(label)
    return found


def test_the_split_holds_train_and_more(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "zoo"
    words = (source, out, "--unlabelled", tmp_path / "more", "--samples_per_shard", 2)
    assert call(pack, *words) == 0
    assert "zoo/unlabelled: 9 samples, 0 classes, 5 shards" in capsys.readouterr().out
    assert numbers(out, "train") == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1}
    assert numbers(out, "unlabelled") == dict.fromkeys([0, 1, 2, 3, 4, 100, 101, 102, 103], -1)
    train, joint = (Manifest.load_split(str(out), s) for s in ("train", "unlabelled"))
    assert joint.shards[:3] == train.shards
    assert (joint.kind, joint.image, joint.classes) == (train.kind, train.image, [])
    assert (joint.members[:, 2:] == -1).all()
    for shard in train.shards:  # one file under two names
        assert (out / "train" / shard.name).samefile(out / "unlabelled" / shard.name)
    assert call(verify, out, "--decode") == 0
    assert "train, test, unlabelled: 16 samples" in capsys.readouterr().out


def test_where_the_file_system_has_no_links(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(pack, source, tmp_path / "a", "--unlabelled", tmp_path / "more", "--name", "z") == 0

    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert call(pack, source, tmp_path / "b", "--unlabelled", tmp_path / "more", "--name", "z") == 0
    for path in sorted((tmp_path / "a").rglob("*.*")):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes()
        assert other.stat().st_nlink == 1


def test_the_labelled_set_decides_the_size(source: Path, tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / "more" / f"large{i}.png").write_bytes(png(numbered(200 + i, 9)))
    assert call(pack, source, tmp_path / "zoo", "--unlabelled", tmp_path / "more") == 0
    assert Manifest.load_split(str(tmp_path / "zoo"), "train").image["size"] == 4
    assert {200, 201} <= numbers(tmp_path / "zoo", "unlabelled").keys()


@pytest.mark.parametrize("words", [["--unlabelled"], ["--unlabelled", "true"]])
def test_without_a_path_everything_loses_its_labels(
    words: list[str], source: Path, tmp_path: Path
) -> None:
    assert call(pack, source, tmp_path / "zoo", *words) == 0
    assert set(numbers(tmp_path / "zoo", "train").values()) == {-1}
    assert not (tmp_path / "zoo" / "unlabelled").exists()


def test_without_labels_all_is_to_train_on(tmp_path: Path) -> None:
    """Stages 1 and 2 read train alone: a share set aside would be lost to them."""
    (tmp_path / "photos").mkdir()
    for i in range(10):
        (tmp_path / "photos" / f"{i}.png").write_bytes(png(numbered(i, 4)))
    out = tmp_path / "photos-packed"
    assert call(pack, tmp_path / "photos", out, "--unlabelled") == 0
    assert len(numbers(out, "train")) == 10
    assert [p.name for p in out.iterdir()] == ["train"]
    assert (
        call(pack, tmp_path / "photos", out, "--unlabelled", "--splits", "0.5,0.5", "--overwrite")
        == 0
    )
    assert sorted(p.name for p in out.iterdir()) == ["train", "val"]


def test_replacing_the_data_set(source: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "zoo", ("--unlabelled", tmp_path / "more")
    assert call(pack, source, out, *more) == 0
    assert call(pack, source, out, *more) == 2
    assert call(pack, source, out, *more, "--overwrite") == 0
    assert len(numbers(out, "unlabelled")) == 9
    # One split alone: the joint split goes with train.
    train = (source / "train", out, "--split", "train", "--overwrite")
    assert call(pack, *train) == 2
    assert call(pack, *train, *more) == 0
    assert len(numbers(out, "unlabelled")) == 9
    assert len(numbers(out, "test")) == 2
    # A set without it leaves none behind.
    assert call(pack, source, out, "--overwrite") == 0
    assert sorted(p.name for p in out.iterdir()) == ["test", "train"]


def test_a_class_may_be_called_unlabelled(source: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (source / split / "bee").rename(source / split / "unlabelled")
    assert call(pack, source, tmp_path / "zoo") == 0
    assert Manifest.load_split(str(tmp_path / "zoo"), "train").classes == ["ant", "unlabelled"]


def test_indexing_it_anew(source: Path, tmp_path: Path) -> None:
    """Tars of train have label members, which this split takes no notice of."""
    out = tmp_path / "zoo"
    assert call(pack, source, out, "--unlabelled", tmp_path / "more") == 0
    before = np.load(out / "unlabelled" / "members.npy")
    (tmp_path / "names").write_text("ant\nbee\n")
    assert call(index, out, "--overwrite", "--classes", tmp_path / "names") == 0
    assert (np.load(out / "unlabelled" / "members.npy") == before).all()
    assert Manifest.load_split(str(out), "unlabelled").classes == []
    assert Manifest.load_split(str(out), "train").classes == ["ant", "bee"]
    assert call(verify, out) == 0


def test_images_are_noted_as_before(source: Path, tmp_path: Path) -> None:
    assert call(pack, source, tmp_path / "zoo") == 0
    content = json.loads((tmp_path / "zoo" / "test" / "manifest.json").read_text())
    assert content.pop("shards")[0]["samples"] == 2
    assert content.pop("members")["file"] == "members.npy"
    assert list(content.items()) == [
        ("format", "selfdistill-shards"),
        ("version", 1),
        ("kind", "image"),
        ("split", "test"),
        ("classes", ["ant", "bee"]),
        ("class_counts", [1, 1]),
        ("samples", 2),
        ("image", {"size": 4, "stored": "png", "fit": "short side bicubic, centre crop"}),
        ("columns", ["input", "label"]),
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--unlabelled", "{tmp}/none"), "none does not exist: give a folder of images"),
        (("--unlabelled", "{tmp}/file"), "file is no folder"),
        (("--unlabelled", "{tmp}/bare"), "bare has no images"),
        (("--unlabelled", "{tmp}/more", "--split", "test"), "--split test packs another one"),
        (("--split", "unlabelled"), "there is no split 'unlabelled': give one of train, val, test"),
    ],
)
def test_mistakes(
    options: tuple[str, ...],
    said: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "file").write_text("")
    words = [word.format(tmp=tmp_path) for word in options]
    assert call(pack, source, tmp_path / "out", *words) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source / "train")
    assert call(pack, source, tmp_path / "out", "--unlabelled", tmp_path / "more") == 2
    assert "goes with a train split, the source has only test" in capsys.readouterr().err
