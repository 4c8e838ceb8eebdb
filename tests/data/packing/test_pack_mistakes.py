"""What data.pack refuses, in one line each."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset

from selfdistill.data.cli import run
from selfdistill.data.errors import UserError
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.kit.shards import class_folders, numbered, png


def csv_with(text: str) -> Callable[[Path], str]:
    def make(tmp: Path) -> str:
        class_folders(tmp / "x", {"a": 2})
        (tmp / "list.csv").write_bytes(text.encode("latin-1"))
        return str(tmp / "list.csv")

    return make


def folders(**counts: int) -> Callable[[Path], str]:
    def make(tmp: Path) -> str:
        class_folders(tmp / "images", counts)
        return str(tmp / "images")

    return make


def tree(*files: str) -> Callable[[Path], str]:
    def make(tmp: Path) -> str:
        for i, name in enumerate(files):
            path = tmp / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(numbered(i)) if path.suffix == ".png" else b"text")
        return str(tmp / "images")

    return make


@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        (lambda tmp: str(tmp / "imagse"), [], "there is no"),
        (tree("train/a/1.png", "train/b/x.txt", "val/a/2.png"), [], "class 'b' has no images"),
        (tree("train/a/1.png", "val/b/2.png"), [], "class that the training images do not have"),
        (tree("1.png"), [], "images but no class folders.*--unlabelled"),
        (tree("x.txt"), [], "neither class folders nor images"),
        (tree("a/x.txt"), ["--unlabelled"], "has no images"),
        (tree("val/a/1.png", "valid/a/2.png"), [], "both the split 'val'"),
        (tree("a/1.txt"), ["--split", "tset"], "there is no split 'tset'"),
        (folders(a=2), ["--splits", "0.5,0.6"], "add up to 1"),
        (folders(a=2), ["--splits", "half"], "add up to 1"),
        (folders(a=2), ["--splits", "0.8,0.2,nan"], "add up to 1"),
        (lambda tmp: "", [], "SOURCE is empty, as of a variable that is not set: give a path"),
        (folders(a=2), ["--unlabelled", ""], "--unlabelled is empty"),
        (folders(a=2), ["--splits", "1", "--split", "val"], "give one of them"),
        (tree("train/a/1.png"), ["--splits", "1"], "has splits of its own"),
        (folders(a=2), ["--size", "0"], "give sides of 1 to 32768 pixels, not .0."),
        (folders(a=2), ["--size", "8", "--keep_original"], "give one"),
        (folders(a=2), ["--samples_per_shard", "0"], "samples_per_shard is 0"),
        (folders(a=2), ["--layout", "cubs"], "unknown layout 'cubs'"),
        (lambda tmp: str(Path(tree("a.doc")(tmp)) / "a.doc"), [], "neither a folder"),
        (csv_with(""), [], "has no column 'path'"),
        (csv_with("file,label\nx/a/p0.png,a"), [], "has no column 'path'"),
        (csv_with("review;stars\nx;1"), [], "no column 'path' .it has review, stars"),
        (csv_with("path\tlabel\nx\t1"), [], "line 2: there is no image"),
        (csv_with("path\nx/a/p0.png"), [], "has no column 'label'"),
        (csv_with("path,label\n"), [], "has no rows"),
        (csv_with("path,label\nx/a/p9.png,a"), [], "line 2: there is no image"),
        (csv_with("path,label\nx/a/p0.png,a\nx/a/p1.png,"), [], "line 3: .* has no label"),
        (csv_with("path,label\nx/a/p0.png,a\nx/a/p0.png,b"), [], "stands in line 2 too"),
        (
            csv_with("path,label\nx/a/p0.png,1\nx/a/p1.png,-1"),
            [],
            "3: its label -1 stands for none",
        ),
        (csv_with("path,label\nx/a/p0.png"), [], "not as many fields"),
        (csv_with("path,label\nx/a/p0.png,a,b"), [], "not as many fields"),
        (csv_with("path,label\n,a"), [], "line 2 has no path"),
        (csv_with("path,label,split\nx/a/p0.png,a,trian"), [], "split 'trian' is none of"),
        (csv_with("path,label\nx/a/p0.png,\xe9"), [], "not text in UTF-8"),
        (
            csv_with("path,label,split\nx/a/p0.png,a,train\nx/a/p1.png,b,val"),
            [],
            "class 'b' has no row in split train",
        ),
    ],
)
def test_mistakes(
    source: Callable[[Path], str],
    flags: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    with pytest.raises(SystemExit) as caught:
        run(pack, [source(tmp_path), str(tmp_path / "out" / "zoo"), *flags])
    assert caught.value.code == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(said, errors[0]), errors[0]
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("make", "holds"),
    [
        (tree("a/1.png", "b/2.png"), "holds images"),
        (tree("train/a/1.png", "val/a/2.png"), "holds images"),
        (tree("1.JPG"), "holds images"),
        (tree("train.jsonl", "test.csv"), "holds texts"),
        (lambda tmp: str(Path(tree("all.csv")(tmp)) / "all.csv"), "is a file"),
    ],
)
def test_what_was_not_packed_yet_is_not_packed_into_itself(
    make: Callable[[Path], str], holds: str, tmp_path: Path
) -> None:
    place = make(tmp_path)
    told = f"^{place} {holds}, not shards: python -m data.pack {place} shards/NAME, then --data"
    for use in (lambda: Manifest.load_split(place, "train"), lambda: verify(place)):
        with pytest.raises(UserError, match=told):
            use()


def test_places_that_cannot_be_written(
    splits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        pack(str(splits), str(tmp_path / "file"))
    with pytest.raises(UserError, match="is the source itself"):
        pack(str(splits), str(splits))
    with pytest.raises(UserError, match="lies in the source"):
        pack(str(splits), str(splits / "shards"))
    with pytest.raises(SystemExit) as caught:
        run(pack, [str(splits), "/proc/nowhere/zoo"])
    assert caught.value.code == 2
    assert "error: cannot make the folder /proc/nowhere" in capsys.readouterr().err


def test_full_disk(
    splits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object, **__: object) -> io.BytesIO:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(webdataset.TarWriter, "write", full)
    with pytest.raises(SystemExit) as caught:
        run(pack, [str(splits), str(tmp_path / "out" / "zoo")])
    assert caught.value.code == 2
    assert "No space left on device: free some space" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_an_empty_place_is_not_the_current_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", {"a": 2})
    with pytest.raises(UserError, match="OUT is empty, as of a variable that is not set"):
        pack(str(tmp_path / "images"), "")
