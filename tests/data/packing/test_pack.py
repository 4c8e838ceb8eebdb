"""Packing: folders and CSV files become shards that tar, webdataset and our reader agree on."""

import os
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from selfdistill.data.cli import run
from selfdistill.data.errors import UserError
from selfdistill.data.index import index
from selfdistill.data.loading.codec import Images
from selfdistill.data.loading.loader import Sequential
from selfdistill.data.pack import pack, write_split
from selfdistill.data.packing.encoding import ImageModality
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.division import divide
from selfdistill.data.sources.samples import Sample
from tests.kit.command import call
from tests.kit.shards import class_folders, number_of, numbered, png

COUNTS = {"ant": 5, "bee": 3, "cow": 7}


def contents(shards: Path, split: str) -> dict[int, int]:
    """Number in the picture -> label."""
    manifest = Manifest.load_split(str(shards), split)
    found = {}
    for batch in Sequential(manifest, batch=4):
        for image, label, valid in zip(
            batch["images"], batch["labels"], batch["valid"], strict=True
        ):
            if valid:
                found[number_of(image.numpy())] = int(label)
    assert len(found) == manifest.samples
    return found


def test_split_folders(splits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "shards" / "zoo"
    run(pack, [str(splits), str(out), "--samples_per_shard", "4"])
    assert contents(out, "train") == dict(enumerate([0] * 5 + [1] * 3 + [2] * 7))
    assert contents(out, "val") == {15: 0, 16: 0, 17: 2}
    assert contents(out, "test") == {18: 0, 19: 1, 20: 1, 21: 2}
    train = Manifest.load_split(str(out), "train")
    assert train.classes == ["ant", "bee", "cow"]
    assert train.class_counts == [5, 3, 7]
    assert Manifest.load_split(str(out), "val").class_counts == [2, 0, 1]
    assert [s.samples for s in train.shards] == [4, 4, 4, 3]
    assert [s.name for s in train.shards][:2] == ["zoo-train-000000.tar", "zoo-train-000001.tar"]
    assert train.image["size"] == 4
    assert "15 samples, 3 classes, 4 shards" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["test", "train", "val"]
    assert [p.name for p in out.parent.iterdir()] == ["zoo"]


def test_tar_and_webdataset_read_the_shards(splits: Path, tmp_path: Path) -> None:
    out = tmp_path / "zoo"
    pack(str(splits), str(out), samples_per_shard=6)
    shards = sorted(map(str, (out / "train").glob("*.tar")))
    names = []
    for shard in shards:
        listed = subprocess.run(["tar", "tf", shard], capture_output=True, text=True, check=True)
        names += listed.stdout.split()
    assert len(names) == 30
    assert all(n.endswith((".png", ".cls")) for n in names)
    reader = webdataset.WebDataset(shards, shardshuffle=False).decode("rgb8").to_tuple("png", "cls")
    found = {number_of(image.transpose(2, 0, 1)): label for image, label in reader}
    assert found == contents(out, "train")
    with tarfile.open(shards[0]) as tar:
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar}
    assert owners == {(0, 0, 0, "root", "root")}


def test_equal_input_makes_equal_files(splits: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        pack(str(splits), str(tmp_path / name), name="zoo")
    for path in sorted((tmp_path / "a").rglob("*.*")):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.read_bytes() == other.read_bytes(), path
    # A shard holds all classes, though the folders come one after the other.
    labels = [s["cls"] for s in _samples(tmp_path / "a" / "train" / "zoo-train-000000.tar")]
    assert labels != sorted(labels)


def _samples(shard: Path) -> list[dict[str, bytes]]:
    return list(webdataset.WebDataset(str(shard), shardshuffle=False))


def test_class_folders_are_divided_class_by_class(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", {"a": 40, "b": 10, "c": 1})
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        pack(str(tmp_path / "images"), str(tmp_path / name), seed=seed)
    found = {s: contents(tmp_path / "one", s) for s in ("train", "val", "test")}
    assert sorted(n for part in found.values() for n in part) == list(range(51))
    counts = {s: Counter(part.values()) for s, part in found.items()}
    assert counts["train"] == {0: 32, 1: 8, 2: 1}
    assert counts["val"] == counts["test"] == {0: 4, 1: 1}
    assert contents(tmp_path / "same", "val") == found["val"]
    assert contents(tmp_path / "other", "val") != found["val"]
    pack(str(tmp_path / "images"), str(tmp_path / "two"), splits="0.5,0,0.5")
    assert not (tmp_path / "two" / "val").exists()
    assert len(contents(tmp_path / "two", "test")) == 25
    pack(str(tmp_path / "images"), str(tmp_path / "whole"), splits="1")
    assert len(contents(tmp_path / "whole", "train")) == 51


def test_dividing_loses_nothing() -> None:
    samples = [Sample(str(i), b"", i % 7) for i in range(100)]
    parts = divide(samples, (0.7, 0.2, 0.1), 3)
    keys = sorted(int(s.key) for part in parts.values() for s in part)
    assert keys == list(range(100))
    assert abs(len(parts["train"]) - 70) <= 3


def test_csv(tmp_path: Path) -> None:
    class_folders(tmp_path / "all", {"x": 6})
    rows = ["path,label,split"]
    rows += [
        f"all/x/p{i}.png,{(10, 9, 10)[i % 3]},{'train' if i < 4 else 'valid'}" for i in range(6)
    ]
    (tmp_path / "list.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    pack(str(tmp_path / "list.csv"), str(tmp_path / "out"))
    manifest = Manifest.load_split(str(tmp_path / "out"), "train")
    assert manifest.classes == ["9", "10"]  # as numbers
    assert contents(tmp_path / "out", "train") == {0: 1, 1: 0, 2: 1, 3: 1}
    assert contents(tmp_path / "out", "val") == {4: 0, 5: 1}


def test_a_split_that_got_nothing_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(tmp_path / "images", {"ant": 5, "bee": 5})
    pack(str(tmp_path / "images"), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "val").exists()
    said = "note: val gets no sample (0.1 of each class is less than one): add samples, or give"
    assert f"{said} other --splits, or folders" in capsys.readouterr().err
    pack(str(tmp_path / "images"), str(tmp_path / "two"), splits="0.5,0,0.5")
    assert "gets no sample" not in capsys.readouterr().err
    class_folders(tmp_path / "divided" / "train", {"ant": 5, "bee": 5})
    pack(str(tmp_path / "divided"), str(tmp_path / "three"), val_fraction=0.05)
    assert "val gets no sample (0.05 of each class" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [False, True])
def test_an_index_made_anew_keeps_what_packing_noted(
    keep: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, size, fit and range are not in the tars; what is asked for is taken."""
    for number in range(8):
        place = tmp_path / "in" / ("ant", "bee")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(Image.new("I;16", (4, 4), 100 * number)))
    out = tmp_path / "out"
    words = ["--splits", "0.5,0.5", "--fit", "pad", "--keep_original", keep]
    assert call(pack, tmp_path / "in", out, *words) == 0
    before = {split: (out / split / "manifest.json").read_bytes() for split in ("train", "val")}
    assert call(index, out, "--overwrite") == 0
    assert "note: names of classes, size, fit and range are those" in capsys.readouterr().out
    assert {split: (out / split / "manifest.json").read_bytes() for split in before} == before
    assert call(index, out / "val", "--overwrite", "--unlabelled") == 0
    assert Manifest.load_split(str(out), "val").classes == []
    (tmp_path / "names.txt").write_text("cat\ndog\neel\n")
    words = ["--classes", tmp_path / "names.txt", "--range", "0,4095"]
    assert call(index, out, "--overwrite", *words) == 0
    file = Manifest.load_split(str(out), "train")
    assert (file.classes, file.span) == (["cat", "dog", "eel"], (0, 4095))
    assert file.image["fit"] == "pad"
    (out / "train" / "manifest.json").write_text("{")
    assert call(index, out / "train", "--overwrite") == 0
    assert Manifest.load_split(str(out), "train").classes == ["0", "1"]


def test_unlabelled(splits: Path, tmp_path: Path) -> None:
    pack(str(splits / "train"), str(tmp_path / "a"), unlabelled=True, splits="1,0,0")
    manifest = Manifest.load_split(str(tmp_path / "a"), "train")
    assert (manifest.samples, manifest.labelled, manifest.classes) == (15, 0, [])
    assert set(contents(tmp_path / "a", "train").values()) == {-1}
    with tarfile.open(tmp_path / "a" / "train" / "a-train-000000.tar") as tar:
        assert all(n.endswith(".png") for n in tar.getnames())


def test_a_split_can_be_added(splits: Path, tmp_path: Path) -> None:
    out = tmp_path / "zoo"
    pack(str(splits / "train"), str(out), split="train")
    pack(str(splits / "val"), str(out), split="val", name="late")
    # Class numbers go by name: cow stays 2 although val has no bee.
    assert contents(out, "val") == {15: 0, 16: 0, 17: 2}
    assert len(contents(out, "train")) == 15
    assert (out / "val" / "late-val-000000.tar").exists()
    class_folders(tmp_path / "more", {"ant": 1, "dog": 1})
    with pytest.raises(UserError, match="'dog' is not among the 3 classes"):
        pack(str(tmp_path / "more"), str(out), split="test")
    assert not (out / "test").exists()


def test_sizes(tmp_path: Path) -> None:
    root = tmp_path / "images" / "a"
    root.mkdir(parents=True)
    for i in range(3):
        (root / f"{i}.jpg").write_bytes(png(Image.new("RGB", (30 + i, 20), (i, 0, 77))))
    pack(str(root.parent), str(tmp_path / "big"), splits="1")
    assert Manifest.load_split(str(tmp_path / "big"), "train").image["size"] == 224
    pack(str(root.parent), str(tmp_path / "small"), splits="1", size=8)
    batch = next(iter(Sequential(Manifest.load(str(tmp_path / "small" / "train")), batch=3)))
    assert batch["images"].shape == (3, 3, 8, 8)


def test_originals_can_be_kept(tmp_path: Path) -> None:
    root = tmp_path / "images" / "a"
    root.mkdir(parents=True)
    files = {}
    for i, suffix in enumerate((".JPEG", ".webp", ".png")):
        numbered(i, 16 + i).save(root / f"p.{i}{suffix}")
        files[suffix.lower()] = (root / f"p.{i}{suffix}").read_bytes()
    pack(str(root.parent), str(tmp_path / "out"), splits="1", keep_original=True)
    stored = _samples(tmp_path / "out" / "train" / "out-train-000000.tar")
    assert {
        f".{k}": v for s in stored for k, v in s.items() if k in ("jpeg", "webp", "png")
    } == files
    manifest = Manifest.load_split(str(tmp_path / "out"), "train")
    assert manifest.image["size"] is None
    assert next(iter(Sequential(manifest, batch=3, codec=Images(8))))["images"].shape == (
        3,
        3,
        8,
        8,
    )
    with pytest.raises(UserError, match="give the size"):
        list(Sequential(manifest, batch=3))


def test_odd_images_are_packed(tmp_path: Path) -> None:
    root = tmp_path / "images" / "a"
    root.mkdir(parents=True)
    Image.fromarray(np.full((9, 9), 257 * 50, np.uint16)).save(root / "wide.png")
    Image.new("CMYK", (9, 9), (0, 255, 255, 0)).save(root / "print.tif")
    Image.new("P", (9, 9)).save(root / "palette.gif")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(root / "clear.png")
    Image.new("L", (1, 1), 7).save(root / "dot.png")
    pack(str(root.parent), str(tmp_path / "out"), splits="1", size=8)
    batch = next(iter(Sequential(Manifest.load(str(tmp_path / "out" / "train")), batch=5)))
    colours = {tuple(image[:, 4, 4].tolist()) for image in batch["images"]}
    assert colours == {(50, 50, 50), (255, 0, 0), (0, 0, 0), (255, 255, 255), (7, 7, 7)}


def test_names_of_files_become_safe_keys(tmp_path: Path) -> None:
    names = ["a.b.c.png", "é ü.png", "x" * 200 + ".png", "100%d.png", "-.png"]
    for i, name in enumerate(names):
        (tmp_path / "images" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / "a" / name).write_bytes(png(numbered(i)))
    pack(str(tmp_path / "images"), str(tmp_path / "50% d"), splits="1")
    assert sorted(contents(tmp_path / "50% d", "train")) == [0, 1, 2, 3, 4]


def test_samples_from_bytes_and_callables(tmp_path: Path) -> None:
    def stream() -> object:
        for i in range(10):
            source = png(numbered(i)) if i % 2 else lambda i=i: png(numbered(i))
            yield Sample(f"k/{i}", source, i % 3)

    done = write_split(
        stream(), ["a", "b", "c"], tmp_path / "s", kind=ImageModality(4), samples_per_shard=3
    )
    assert (done.samples, done.shards, done.classes) == (10, 4, 3)
    assert contents(tmp_path / "s", "train") == {i: i % 3 for i in range(10)}
    with pytest.raises(UserError, match="label 3 is outside the 3 classes"):
        write_split([Sample("k", png(numbered(0)), 3)], ["a", "b", "c"], tmp_path / "t")
    assert not list((tmp_path / "t").iterdir())


def test_nothing_is_overwritten_unasked(splits: Path, tmp_path: Path) -> None:
    out = tmp_path / "zoo"
    pack(str(splits), str(out))
    before = contents(out, "train")
    with pytest.raises(UserError, match=r"zoo/train exists: .*--overwrite"):
        pack(str(splits), str(out))
    class_folders(tmp_path / "other", {"dog": 3}, start=100)
    pack(str(tmp_path / "other"), str(out), splits="1", overwrite=True)
    assert contents(out, "train") == {100: 0, 101: 0, 102: 0} != before
    assert not (out / "val").exists()  # of the old set
    # A folder that holds something else is not touched, whatever is asked.
    (tmp_path / "home" / "train").mkdir(parents=True)
    (tmp_path / "home" / "train" / "thesis.txt").write_text("work of years")
    with pytest.raises(UserError, match="something other than shards"):
        pack(str(splits), str(tmp_path / "home"), overwrite=True)
    assert (tmp_path / "home" / "train" / "thesis.txt").exists()


def test_a_failed_run_leaves_nothing(splits: Path, tmp_path: Path) -> None:
    (splits / "test" / "cow" / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"bad.png: the image cannot be read: .*--skip_broken"):
        pack(str(splits), str(tmp_path / "out" / "zoo"))
    assert not list((tmp_path / "out").iterdir())
    pack(str(splits), str(tmp_path / "out" / "zoo"), skip_broken=True)
    assert len(contents(tmp_path / "out" / "zoo", "test")) == 4


def test_what_a_killed_process_of_the_same_number_left_is_no_obstacle(
    splits: Path, tmp_path: Path
) -> None:
    """In a container the number is 1 each time."""
    left = tmp_path / f".out.{os.getpid()}.partial" / "train"
    left.mkdir(parents=True)
    (left / "out-train-000000.tar").touch()
    pack(str(splits), str(tmp_path / "out"), size=8)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []
    assert Manifest.load_split(str(tmp_path / "out"), "train").samples
