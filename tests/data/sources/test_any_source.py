"""Folders and tables as people have them, packed: every picture with its class, or told of.

The oracle is what was put there.
"""

import contextlib
import csv
import io
import os
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from selfdistill.data.errors import UserError
from selfdistill.data.formats import images
from selfdistill.data.loading.reader import Reader
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources import scored
from selfdistill.data.splits import SPLITS
from tests.kit.command import call
from tests.kit.shards import class_folders, number_of, numbered, png


def packed(out: Path) -> list[tuple[int, str]]:
    """Number and class of every sample of all splits, in order of the numbers."""
    found = []
    for split in SPLITS:
        if (out / split).is_dir():
            file = Manifest.load(str(out / split))
            for record in Reader(file).read(np.arange(file.samples)):
                found.append(
                    (number_of(images.decode(record.input, None)), file.classes[record.label])
                )
    return sorted(found)


_names = st.text("abcXY01 ._-é", min_size=1, max_size=8).filter(
    lambda s: s.strip(" .") == s and not s.startswith(".") and not s.lower().startswith("__")
)
_strays = st.sampled_from(
    [
        *("._x.png", ".DS_Store", "Thumbs.db", "notes.txt", "x.heic", "noext", ".hidden/x.png"),
        *("__pycache__/x.pyc", "@eaDir/x.png", "__MACOSX/x.png"),
    ]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    classes=st.lists(_names, min_size=2, max_size=4, unique_by=str.casefold),
    counts=st.lists(st.integers(1, 4), min_size=4, max_size=4),
    inner=st.sampled_from(["", "deep/er"]),
    strays=st.lists(st.tuples(st.integers(0, 4), _strays), max_size=5, unique=True),
    empty=st.booleans(),
    linked=st.booleans(),
)
def test_any_folder_of_classes(
    classes: list[str],
    counts: list[int],
    inner: str,
    strays: list[tuple[int, str]],
    empty: bool,
    linked: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("folders")
    wanted, others = [], set()
    for label, name in enumerate(classes):
        for i in range(counts[label]):
            path = root / "images" / name / inner / f"p{i}.{'png' if i % 2 else 'PNG'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            content = png(numbered(len(wanted)))
            if linked:  # as a hub's cache has them
                (root / "blobs").mkdir(exist_ok=True)
                (root / "blobs" / str(len(wanted))).write_bytes(content)
                path.symlink_to(root / "blobs" / str(len(wanted)))
            else:
                path.write_bytes(content)
            wanted.append((len(wanted), name))
    for place, stray in strays:
        folder = root / "images" / classes[place] if place < len(classes) else root / "images"
        (folder / stray).parent.mkdir(parents=True, exist_ok=True)
        (folder / stray).write_bytes(b"not a picture")
        if stray in ("notes.txt", "x.heic", "noext"):
            others.add(folder / stray)
    if empty:
        (root / "images" / "zz-empty").mkdir()
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        assert call(pack, root / "images", root / "out", "--splits", "1") == 0
    said = told.getvalue()
    assert packed(root / "out") == wanted
    assert (f"note: left out: {len(others)} file" in said) == bool(others)
    assert ("zz-empty is empty and no class" in said) == empty


_cells = st.text("ab;,\t\"' .é\\", min_size=1, max_size=6).map(str.strip).filter(bool)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    labels=st.lists(_cells, min_size=3, max_size=8),
    delimiter=st.sampled_from([",", ";", "\t"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    windows=st.booleans(),
    spaces=st.booleans(),
    bom=st.booleans(),
    names=st.sampled_from([("path", "label"), ("file", "klass")]),
)
def test_any_table_of_images(
    labels: list[str],
    delimiter: str,
    quoting: int,
    windows: bool,
    spaces: bool,
    bom: bool,
    names: tuple[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("table")
    class_folders(root / "all", {"x": len(labels)})
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
    writer.writerow([*names, "age"])
    for number, label in enumerate(labels):
        path = f"all/x/p{number}.png"
        path = path.replace("/", "\\") if windows else path
        writer.writerow([f" {path} " if spaces else path, label, "40"])
    encoding = "utf-8-sig" if bom else "utf-8"
    (root / "list.csv").write_bytes(text.getvalue().encode(encoding))
    options = ["--path_column", names[0], "--label_column", names[1], "--splits", "1"]
    code = call(pack, root / "list.csv", root / "out", *options)
    several = any(
        len(parts := [p.strip() for p in label.replace(";", ",").split(",") if p.strip()]) > 1
        and set(parts) <= set(labels)
        for label in labels
    )
    if several:
        assert code == 2
    else:
        assert code == 0
        assert packed(root / "out") == list(enumerate(labels))


def tree(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(numbered(number)))
    return root


def table(root: Path, labels: Sequence[str]) -> Path:
    class_folders(root / "all", {"x": len(labels)})
    rows = [f'all/x/p{i}.png,"{label}"' for i, label in enumerate(labels)]
    (root / "list.csv").write_text("\n".join(["path,label", *rows]))
    return root / "list.csv"


@pytest.mark.parametrize(
    ("labels", "code", "said"),
    [
        (["cat"] * 20, 2, "all samples are of one class, 'cat'"),
        (["cat"] * 3, 0, "all samples are of one class, 'cat'"),
        ([f"{i / 7:.3f}" for i in range(1, 20)], 2, "are measured values"),
        ([f"id{i}" for i in range(20)], 2, "20 samples have 20 different labels"),
        (["cat", "dog", "cat|dog"], 2, "the label 'cat|dog' is of several classes (cat, dog)"),
        (["cat", "dog", "dog; cat"], 2, "of several classes (dog, cat)"),
        (["cat", "dog", "Cat"], 0, "classes 'Cat' and 'cat' differ in case, spaces or zeros"),
        (["1", "2", "01"], 0, "differ in case, spaces or zeros"),
        (["1.0", "2.0", "10.0"], 0, ""),
        (["9223372036854775808", "2"], 0, ""),  # names of classes, whatever they are
        (["0" * 5000 + "1", "2"], 0, ""),
    ],
)
def test_labels_that_can_hardly_be_meant(
    labels: list[str], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(pack, table(tmp_path, labels), tmp_path / "out", "--splits", "1") == code
    assert said in capsys.readouterr().err
    if code == 0:
        assert packed(tmp_path / "out") == list(enumerate(labels))
        if labels[0] == "1.0":
            file = Manifest.load_split(str(tmp_path / "out"), "train")
            assert file.classes == ["1.0", "2.0", "10.0"]


@pytest.mark.parametrize(
    "labels",
    [["cat"] * 20, [f"{i / 7:.3f}" for i in range(1, 21)], ["cat", "dog", "cat|dog"]],
    ids=["one", "many", "joined"],
)
def test_labels_of_a_model_are_meant(labels: list[str], tmp_path: Path) -> None:
    listing = table(tmp_path, labels)
    with pytest.raises(UserError):
        pack(str(listing), str(tmp_path / "out"), split="test")
    with scored.by(labels):
        pack(str(listing), str(tmp_path / "out"), split="test")
    assert packed(tmp_path / "out") == list(enumerate(labels))
    with scored.by(["cat", "dog"]):
        if "dog" in labels:  # what the model does not know may be several
            with pytest.raises(UserError, match="is of several classes"):
                pack(str(listing), str(tmp_path / "again"), split="test")


def test_names_of_splits_are_no_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["a/1.png", "b/2.png"]
    parts = ("Training", "Testing", "Eval")
    root = tree(tmp_path / "one", *(f"{part}/{name}" for part in parts for name in names))
    assert call(pack, root, tmp_path / "out") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test", "train", "val"]
    # Beside other folders of images they might be anything; without images the others do not count.
    tree(root, "extra/a/3.png")
    assert call(pack, root, tmp_path / "two") == 2
    assert "extra with images, too" in capsys.readouterr().err
    (root / "extra/a/3.png").rename(root / "extra/a/readme.txt")
    assert call(pack, root, tmp_path / "two") == 0
    # Nor are train and val less than train and test.
    tree(tmp_path / "more", "train/a/1.png", "train/b/2.png", "val/a/3.png", "extra/5.png")
    assert call(pack, tmp_path / "more", tmp_path / "three") == 2
    assert "extra with images, too" in capsys.readouterr().err
    # A class may be called test.
    tree(tmp_path / "classes", "pass/1.png", "test/2.png")
    assert call(pack, tmp_path / "classes", tmp_path / "three", "--splits", "1") == 0
    assert [name for _, name in packed(tmp_path / "three")] == ["pass", "test"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("train/a/1.png train/b/2.png unlabelled/3.png", "unlabelled with images, too"),
        ("train/a/1.png train/b/2.png test/3.png", "test holds a split of class folders and 1 im"),
        ("train/a/1.png train/b/2.png test/a/3.png 4.png", "holds splits and 1 images beside them"),
        ("train/Ant/1.png train/b/2.png test/ant/3.png", "Did you mean Ant?"),
    ],
)
def test_no_image_beside_splits_is_passed_over(
    more: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "images", *more.split())
    assert call(pack, root, tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_as_other_systems_spell_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apart, joined = (unicodedata.normalize(form, "Ärzte") for form in ("NFD", "NFC"))
    tree(tmp_path, f"{apart}.png", "b.png", "c/D.PNG")
    table = tmp_path / "list.csv"
    table.write_text(f"path,label\n{joined}.png,{joined}\nb.png,{apart}\nc\\D.PNG,x\n")
    assert call(pack, table, tmp_path / "out", "--splits", "1") == 0
    assert "or in forms of letters" in capsys.readouterr().err
    assert len(packed(tmp_path / "out")) == 3
    for name, meant in (("B.png", "b.png"), ("b", "b.png"), ("c/d.png", "D.PNG")):
        table.write_text(f"path,label\n{name},x\n")
        assert call(pack, table, tmp_path / "again") == 2
        assert capsys.readouterr().err.endswith(f"correct the file. There is {meant}\n")


def test_lists_beside_images_are_no_texts(tmp_path: Path) -> None:
    root = tree(tmp_path / "images", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    for split in ("train", "test"):
        (root / f"{split}.txt").write_text("a/1\nb/2\n")
    assert call(pack, root, tmp_path / "out", "--splits", "1") == 0
    assert [name for _, name in packed(tmp_path / "out")] == ["a"] * 4 + ["b"] * 4


def test_a_table_of_images_with_captions(tmp_path: Path) -> None:
    class_folders(tmp_path / "all", {"x": 4})
    rows = [f"all/x/p{i}.png,picture {i},{'ab'[i % 2]}" for i in range(4)]
    (tmp_path / "list.csv").write_text("\n".join(["path,text,kind", *rows]))
    words = ("--label_column", "kind", "--splits", "1")
    assert call(pack, tmp_path / "list.csv", tmp_path / "out", *words) == 0
    assert packed(tmp_path / "out") == [(i, "ab"[i % 2]) for i in range(4)]


def test_images_beside_class_folders_and_links_in_a_circle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "images", "a/1.png", "b/2.png", "3.png")
    assert call(pack, root, tmp_path / "out") == 2
    assert "1 images beside them, such as 3.png" in capsys.readouterr().err
    (root / "3.png").unlink()
    (root / "b" / "again").symlink_to("..")
    assert call(pack, root, tmp_path / "out") == 2
    assert "again is a link to a folder that it lies in" in capsys.readouterr().err


def test_what_was_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tree(tmp_path / "images", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))
    for i in range(3):
        (root / "a" / f"bad{i}.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    assert call(pack, root, tmp_path / "out", "--splits", "1", "--skip_broken") == 0
    out = capsys.readouterr().out
    assert "3 unreadable images left out" in out
    for i in range(3):
        assert f"bad{i}.png: it ends too early" in out


def test_equal_inputs_are_told_by_pack_and_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In two classes; in train and test; once in val and in what goes with train."""
    from selfdistill.data.verify import verify

    root = tmp_path / "images"
    for name, number in (
        *(("train/a/1.png", 1), ("train/a/2.png", 2), ("train/a/copy.png", 2)),
        *(("train/b/1.png", 1), ("train/b/3.png", 3)),
        *(("test/a/2.png", 2), ("test/b/4.png", 4), ("val/a/5.png", 5), ("val/b/6.png", 6)),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(numbered(number)))
    tree(tmp_path / "more", *(f"{i}.png" for i in range(6)))
    assert call(pack, root, tmp_path / "out", "--unlabelled", tmp_path / "more") == 0
    said = capsys.readouterr().out
    assert call(verify, tmp_path / "out") == 0
    checked = capsys.readouterr().out
    for out in (said, checked):
        # Number 1 three times: twice in train, and in what is without labels (and, by verify, once
        # more, for unlabelled/ holds train's inputs too).
        assert "note: 1 input (" in out
        assert "in more than one class, such as" in out
        assert "in test and in train, such as" in out
        assert "in val and in unlabelled, such as" in out
        assert "in val and in train" not in out
    assert f"such as {root / 'test/a/2.png'} (test, a) and {root / 'train/a'}" in said
    (root / "train/b/1.png").write_bytes(png(numbered(7)))
    (root / "test/a/2.png").write_bytes(png(numbered(8)))
    assert call(pack, root, tmp_path / "clean") == 0
    assert call(verify, tmp_path / "clean") == 0
    assert "note" not in capsys.readouterr().out


def test_unreadable_metadata_is_told_once_by_all_who_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from selfdistill.data.index import index
    from selfdistill.data.loading.codec import Images
    from selfdistill.data.loading.loader import Loader
    from selfdistill.data.verify import verify

    exif = b"eXIf\0\x08\0\x02\x01\x12\0\x03"
    broken = (len(exif) - 4).to_bytes(4, "big") + exif + zlib.crc32(exif).to_bytes(4, "big")
    for number in range(6):
        content = png(numbered(number))
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content[:33] + (broken if number < 4 else b"") + content[33:])
    out = tmp_path / "out"
    options = ["--splits", "1", "--keep_original"]
    assert call(pack, tmp_path / "images", out, *options) == 0
    assert "note: 4 images have a profile, text or EXIF" in capsys.readouterr().out
    assert call(verify, out, "--decode") == 0
    assert "note: 4 images have a profile, text or EXIF" in capsys.readouterr().out
    assert call(index, out / "train", "--overwrite") == 0
    said: list[str] = []
    file = Manifest.load_split(str(out), "train")
    for workers in (0, 2):
        loader = Loader(file, codec=Images(), batch=2, workers=workers, report=said.append)
        for _, batch in zip(range(6), loader, strict=False):
            assert set(batch["images"][:, 2].flatten().tolist()) == {77}
        loader.close()
    assert len(said) == 2
    assert all("its profile, text or EXIF cannot be read" in line for line in said)


def test_files_of_texts_that_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("train.jsonl", "test.jsonl", "train-00001.jsonl", "._test.jsonl"):
        rows = [f'{{"text": "{name} {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(4)]
        (tmp_path / name).write_text("".join(rows))
    assert call(pack, tmp_path, tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "left out: 1 file not named after a split, such as train-00001.jsonl" in said


def test_names_that_are_not_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = os.fsencode(tree(tmp_path / "images", "a/1.png", "b/2.png"))
    os.rename(root + b"/a/1.png", root + b"/a/caf\xe9.png")  # a file's name may be anything
    assert call(pack, tmp_path / "images", tmp_path / "out", "--splits", "1") == 0
    os.rename(root + b"/a", root + b"/caf\xe9")
    assert call(pack, tmp_path / "images", tmp_path / "two") == 2
    assert "the name of class 'caf\\udce9' is not UTF-8" in capsys.readouterr().err
