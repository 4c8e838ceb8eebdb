"""What a new user's set holds that cannot be meant, or is passed over: refused, or said in a line.

The list is that of issue 29, numbers 3 and 7: one set each, as somebody made it.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from tests.kit.command import call
from tests.kit.shards import numbered, png


def folders(*names: str) -> Callable[[Path], Path]:
    def make(tmp: Path) -> Path:
        for number, name in enumerate(names):
            path = tmp / "images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(numbered(number)))
        return tmp / "images"

    return make


def table(
    labels: Sequence[str], *, between: str = ",", more: str = "", head: str = "path"
) -> Callable[[Path], Path]:
    def make(tmp: Path) -> Path:
        folders(*(f"all/{i}.png" for i in range(len(labels))))(tmp)
        text = io.StringIO()
        writer = csv.writer(text, delimiter=between)
        writer.writerow([f" {head}", "label ", *([more] if more else [])])
        for i, label in enumerate(labels):
            path = f" images\\all\\{i}.png " if i % 2 else f" images/all/{i}.png "
            writer.writerow([path, label, *(["40, or so"] if more else [])])
        (tmp / "list.csv").write_text(text.getvalue())
        return tmp / "list.csv"

    return make


def texts(*lines: str, name: str = "list.jsonl") -> Callable[[Path], Path]:
    def make(tmp: Path) -> Path:
        (tmp / name).write_text("\n".join(lines) + "\n")
        return tmp / name

    return make


TWO = ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]
PARTS = [f"{part}/{name}" for part in ("Training", "Testing") for name in TWO]
ONE: list[str] = ["--splits", "1"]


@pytest.mark.parametrize(
    ("source", "options", "code", "said"),
    [
        # 3: Training and Testing beside another folder of images are not taken for classes.
        (folders(*PARTS, "extra/x.png"), [], 2, "holds splits .Testing, Training. and extra with"),
        (table(["cat"] * 20), ONE, 2, "all samples are of one class, 'cat'"),
        (folders("cat/1.png", "cat/2.png"), ONE, 0, "note: all samples are of one class, 'cat'"),
        (table([str(i) for i in range(20)]), ONE, 2, "20 samples have 20 different labels"),
        (table([f"{i / 7:.2f}" for i in range(1, 20)]), ONE, 2, "are measured values"),
        (table(["cat", "dog", "cat;dog"]), ONE, 2, "where samples may have several, say so "),
        (table(["a;b", "b;c", "c;a"]), ONE, 0, "note: 3 classes such as 'a;b' look like several"),
        (table(["Paris, F", "Paris, T"]), ONE, 0, ""),
        (table(["cat", "dog"], more="age"), ONE, 0, "list.csv these columns are ignored: age"),
        (
            texts('{"text": "t", "label": "a", "note": 1}', '{"text": "u", "label": "b", "x": 2}'),
            ONE,
            0,
            "of list.jsonl these columns are ignored: note, x",
        ),
        (
            folders(*TWO, "a/5.HEIC", "a/noext", "a/6.heic"),
            ONE,
            0,
            "left out: 3 files of no known kind of images .2 .heic, 1 no suffix.",
        ),
        (
            folders(*TWO, "notes.txt", "a/notes.txt"),
            ONE,
            0,
            "left out: 2 files of no known kind of images .2 .txt., such as .*a/notes.txt",
        ),
        (
            folders(*(f"{s}/{n}" for s in ("train", "val") for n in TWO), "test/a/9.png"),
            [],
            0,
            "note: class 'b' .4 samples in all. has no sample in test",
        ),
        (table(["Cat", "dog", "cat"]), ONE, 0, "classes 'Cat' and 'cat' differ in case"),
        # 7: tables and archives as other programs write them.
        (table(["cat", "dog"], between=";", more="note, free"), ONE, 0, "ignored: note, free"),
        (table(["cat", "dog"], between="\t"), ONE, 0, ""),
        (table(["cat", "dog"], head="file"), [*ONE, "--path_column", "file"], 0, ""),
        (table(["cat", "dog"], head="file"), ONE, 2, "name yours with --path_column"),
        (folders(*TWO, "__MACOSX/a/._1.png", "a/._2.png"), ONE, 0, ""),
    ],
)
def test_it_is_told(
    source: Callable[[Path], Path],
    options: list[str],
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    place = source(tmp_path)
    assert call(pack, place, tmp_path / "out", *options) == code
    told = capsys.readouterr().err
    lines = [x for x in told.splitlines() if x.startswith(("error: ", "note: "))]
    if said:
        assert [line for line in lines if re.search(said, line)], told
    else:
        assert not lines, told
    if code:
        assert len([x for x in lines if x.startswith("error: ")]) == 1
        assert not (tmp_path / "out").exists()


def test_a_broken_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folders(*TWO)(tmp_path)
    (root / "a" / "torn.png").write_bytes(png(numbered(9))[:40])
    assert call(pack, root, tmp_path / "out", *ONE) == 2
    assert "torn.png: the image cannot be read" in capsys.readouterr().err
    assert call(pack, root, tmp_path / "out", *ONE, "--skip_broken") == 0
    assert "note: left out: " in (said := capsys.readouterr().out)
    assert "torn.png" in said
    assert Manifest.load_split(str(tmp_path / "out"), "train").samples == 4


def test_what_excel_leaves_in_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A first line that names the separator, empty rows below, a space at an end."""
    rows = [f"visit {i};{'ab'[i % 2]}" for i in range(20)]
    for split, end in (("train", ""), ("test", " ")):
        lines = ["sep=;", "text;label", *(row.replace(";", f"{end};") for row in rows), ";", ";"]
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{split}.csv").write_text("\r\n".join(lines) + "\r\n")
    assert call(pack, tmp_path / "in", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "train: 20 samples, 2 classes" in out
    assert "20 inputs" in out or "20 samples of test" in out or "also in" in out, out
    (tmp_path / "in" / "train.csv").write_text("sep=;\ntext;label\na;x\nb\n")
    assert call(pack, tmp_path / "in", tmp_path / "again") == 2
    assert "train.csv line 4 has not as many fields" in capsys.readouterr().err


def test_folders_of_texts_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("notes/1.txt", "classes/a/1.txt", "classes/b/1.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a text")
    for words in (("notes", "--unlabelled"), ("classes",)):
        assert call(pack, tmp_path / words[0], tmp_path / "out", *words[1:]) == 2
        assert "texts, one a file, are packed as JSON Lines" in capsys.readouterr().err
