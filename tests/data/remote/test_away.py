"""Sets in fsspec's store in memory, which needs no package: see test_object_stores for S3."""

from pathlib import Path
from typing import Any

import fsspec
import pytest

from selfdistill.data.index import index
from selfdistill.data.pack import pack
from selfdistill.data.remote.bucket import Bucket, Stored
from selfdistill.data.subset import subset
from tests.kit.command import call
from tests.kit.shards import class_folders


@pytest.fixture
def files() -> Any:
    store = fsspec.filesystem("memory", use_listings_cache=False)
    store.rm("/", recursive=True)
    return store


def test_packing_and_indexing(
    files: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(tmp_path / "images", {"ant": 23, "bee": 9, "cow": 14})
    there, here = "memory://bucket/zoo", tmp_path / "zoo"
    options = ("--samples_per_shard", 5, "--unlabelled", tmp_path / "images")
    for out in (there, here):
        assert call(pack, tmp_path / "images", out, *options) == 0

    def compare() -> None:
        found = {
            name.removeprefix("/bucket/zoo/"): files.cat_file(name)
            for name in files.find("/bucket/zoo")
            if not name.endswith("parts.json")
        }
        assert found == {
            str(path.relative_to(here)): path.read_bytes()
            for path in here.rglob("*")
            if path.is_file()
        }

    compare()
    assert f"{there}/train: 36 samples" in capsys.readouterr().out
    for place in (here, there):
        assert call(index, place, "--overwrite") == 0
    compare()
    assert f"{there}/train: train, 36 samples" in capsys.readouterr().out
    for words in ((there, tmp_path / "few"), (here, "memory://bucket/few")):
        assert call(subset, *words, "--samples", 3) == 2
        assert "made of, and in, folders and files of this machine" in capsys.readouterr().err


def test_names_that_lead_out_are_refused(
    files: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    files.store["/bucket/set/train/../../x.tar"] = files.store["/bucket/set/a.tar"] = _file(files)
    assert call(index, "memory://bucket/set") == 2
    assert "which can be no file's name here: rename it" in capsys.readouterr().err
    del files.store["/bucket/set/train/../../x.tar"]
    assert Bucket("memory://bucket/set").names() == {"a.tar": Stored(5, "")}


def _file(files: Any) -> Any:
    files.pipe_file("/bucket/x", b"bytes")
    return files.store.pop("/bucket/x")
