"""Inputs as people have them: each place gives what Python's own readers give, or says why not."""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from selfdistill.data import pack
from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import Text
from selfdistill.data.inputs.base import Input, Inputs
from selfdistill.data.inputs.find import Kind, find
from selfdistill.data.inputs.tables import Wanted

ODD = ['a "quoted" word', "two\nlines, one comma", "größe 日本", "", "  spaces  ", "x" * 5000]


def png(colour: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (colour, 0, 0)).save(out, "PNG")
    return out.getvalue()


def everything(inputs: Inputs) -> list[Input]:
    """All inputs, first backwards, then forwards: places are independent."""
    backwards = [inputs.read(i) for i in reversed(range(inputs.samples))]
    forwards = [inputs.read(i) for i in range(inputs.samples)]
    assert backwards[::-1] == forwards
    return forwards


@pytest.mark.parametrize("form", [",", ";", "tab", "bom", "windows"])
def test_tables_read_by_place_as_the_csv_module_reads_them(form: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    delimiter = {"tab": "\t", ";": ";"}.get(form, ",")
    end = "\r\n" if form == "windows" else "\n"
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
    writer.writerows([["id", "body", "n"], *([f"k{i}", text, i] for i, text in enumerate(ODD))])
    path.write_bytes(("\ufeff" if form == "bom" else "").encode() + out.getvalue().encode())
    found = everything(find(str(path), "text", wanted=Wanted(text="body")))
    with path.open(newline="", encoding="utf-8-sig") as file:
        expected = list(csv.DictReader(file, delimiter=delimiter))
    assert [one.name for one in found] == [row["id"] for row in expected]
    assert [one.content for one in found] == [Text(row["body"], None) for row in expected]


def test_a_broken_line_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": "a", "text_pair": "b"}), "no json", "[1]", '{"text": 3}', "{}"]
    path.write_bytes("\n".join([*lines, "", ""]).encode() + b'{"text": "\xff"}\n{"text": "end"}')
    found = everything(find(str(path), "text"))
    assert found[0].content == Text("a", "b")
    assert found[-1].content == Text("end", None)
    reasons = ["no valid JSON", "no JSON object", "'text' is int, no text", "'text' is missing"]
    for one, reason in zip(found[1:6], [*reasons, "not UTF-8 (byte 10"], strict=True):
        assert reason in one.error
    (tmp_path / "t.tsv").write_text('text\tn\nhe said "no\t1\ntoo\tmany\tfields\n')
    first, second = everything(find(str(tmp_path / "t.tsv"), "text"))
    assert first.content == Text('he said "no', None)
    assert "not as many fields as the header" in second.error


def test_paths_from_tables_and_lines(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/ü.png").write_bytes(png())
    names = ["a b/ü.png", "a b\\ü.png", "gone.png", "a b", ""]
    (tmp_path / "l.txt").write_text("\n".join(names))
    with (tmp_path / "l.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "n"], *([name, 1] for name in names)])
    table = everything(find(str(tmp_path / "l.csv"), "image", wanted=Wanted(path="file")))
    lines = everything(find(str(tmp_path / "l.txt"), "image"))
    assert [one.name for one in table] == names
    assert table[:4] == lines
    assert [one.content == png() for one in table] == [True, True, False, False, False]
    assert [one.error for one in table[:3]] == ["", "", "it is not there"]
    assert "no regular file" in table[3].error
    assert table[4].error


def test_tars_parquet_and_patterns(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for name in ("x/1.png", "x/1.cls", "__MACOSX/y.png", "x/2.heic"):
            info = tarfile.TarInfo(name)
            info.size = len(png())
            tar.addfile(info, io.BytesIO(png()))
    tarred = find(str(tmp_path / "p.tar"), "image")
    assert [one.name for one in everything(tarred)] == [
        f"{tmp_path}/p.tar/x/1.png",
        f"{tmp_path}/p.tar/x/2.heic",
    ]
    assert "1 .cls" in tarred.notes[0]
    assert everything(tarred)[0].content == png()
    pictures = [{"bytes": png(i), "path": f"{i}.png"} for i in range(5)] + [None]
    pq.write_table(pa.table({"image": pictures}), tmp_path / "t.parquet", row_group_size=2)
    found = everything(find(str(tmp_path / "t.parquet"), "image"))
    assert [(one.name, one.content) for one in found[:5]] == [
        (f"{i}.png", png(i)) for i in range(5)
    ]
    assert found[5].error == "it has no bytes"
    beside = pa.table({"path": ["x.png"], "image": [png(7)], "label": [1]})
    pq.write_table(beside, tmp_path / "b.parquet")
    assert everything(find(str(tmp_path / "b.parquet"), "image")) == [Input("0", png(7))]
    for name in ("b.png", "a.png", "c.txt"):
        (tmp_path / name).write_bytes(png())
    given = find(str(tmp_path / "*.png"), "image")
    assert [Path(one.name).name for one in everything(given)] == ["a.png", "b.png"]
    assert find(str(tmp_path / "*.png"), "image").digest() == given.digest()
    assert find(str(tmp_path / "a.png"), "image").digest() != given.digest()


def test_a_hash_tells_apart_inputs_of_equal_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of an interrupted launch are gone on with where it is the same."""
    names, hashes = ("list.csv", "list.txt", "t.parquet", "p.tar", "t.jsonl"), []
    for folder, text in (("a", "one"), ("b", "two")):
        root = tmp_path / folder
        root.mkdir()
        (root / "list.csv").write_text("path\nx.png\n")
        (root / "list.txt").write_text("x.png\n")
        (root / "t.jsonl").write_text(json.dumps({"text": text}))
        pq.write_table(pa.table({"path": ["x.png"]}), root / "t.parquet")
        with tarfile.open(root / "p.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("x.png"), io.BytesIO())
        monkeypatch.chdir(root)
        kinds: list[Kind] = ["image", "image", "image", "image", "text"]
        hashes.append([find(n, k).digest() for n, k in zip(names, kinds, strict=True)])
        assert hashes[-1][:1] == [find(str(root / "list.csv"), "image").digest()]
    assert not set(hashes[0]) & set(hashes[1])
    # What Python writes into a folder of its own goes on: the texts are the same.
    (tmp_path / "b" / "t.jsonl").write_text(json.dumps({"text": "one"}))
    assert find("t.jsonl", "text").digest() == hashes[0][4]


def test_a_pattern_of_one_table_and_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "q1.csv").write_text("text,id\na,x\nb,y\n")
    wanted = [Input("x", Text("a", None)), Input("y", Text("b", None))]
    for source in (f"{tmp_path}/q*.csv", "~/q*.csv", "~/q1.csv"):
        assert everything(find(source, "text")) == wanted
    pack.pack(str(tmp_path / "q1.csv"), str(tmp_path / "set"), unlabelled=True)
    assert find("~/set", "text").samples == find("~/set/train", "text").samples == 2


PAIR = {"wanted": Wanted(text="texts", pair="text2")}
BAD: list[tuple[str, Kind, dict[str, Any], str]] = [
    ("p.zip", "image", {}, "is an archive: extract it"),
    ("p.tgz", "image", {}, "is compressed"),
    ("cut.tar", "image", {}, "no whole tar"),
    ("t.csv", "text", {}, r"no column 'text' \(it has texts, n\). Did you mean texts"),
    ("empty.csv", "text", {}, "has no texts"),
    ("empty.jsonl", "image", {}, "names no pictures"),
    ("a.png", "text", {}, "is no file of texts"),
    ("a.png", "image", {"split": "test"}, "--split test: .* is no packed set"),
    ("a.pgn", "image", {}, r"there is no .*a\.pgn\. Did you mean a\.png"),
    ("two", "text", {}, r"several tables \(a\.csv, b\.csv\)"),
    ("both", "image", {}, r"1 files of pictures, such as a\.png, and old\.tar, which holds some"),
    ("both", "text", {}, r"1 files of texts, such as a\.txt, and t\.csv, which holds some"),
    ("twice.csv", "image", {}, "has the column 'path' twice"),
    ("bad.csv", "text", {}, "bad.csv: .*: correct the file"),
    ("latin.csv", "text", {}, "not text in UTF-8"),
    ("t.parquet", "text", {}, "cannot be read"),
    ("t.csv", "text", PAIR, r"no column 'text2' \(it has texts, n\)\..* with --pair_column"),
    ("p.parquet", "text", PAIR, r"no column 'text2' .* with --pair_column"),
    ("two/*.csv", "text", {}, r"names 2 files with tables \(a\.csv, b\.csv\): give one"),
    ("two/*.csv", "image", {}, r"names 2 files with tables \(a\.csv, b\.csv\): give one"),
]


@pytest.mark.parametrize(("name", "kind", "options", "message"), BAD)
def test_mistakes_are_one_line(
    name: str, kind: Kind, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "p.zip").write_bytes(b"PK\3\4")
    (tmp_path / "p.tgz").write_bytes(b"\x1f\x8b")
    (tmp_path / "cut.tar").write_bytes(bytes(100))
    (tmp_path / "t.csv").write_text("texts,n\na,1\n")
    (tmp_path / "empty.csv").write_text("text\n")
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "bad.csv").write_text('text,n\n"a"b,1\n')
    (tmp_path / "latin.csv").write_bytes(b"text\n\xe4\n")
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    pq.write_table(pa.table({"texts": ["a"]}), tmp_path / "p.parquet")
    (tmp_path / "two").mkdir()
    for one in ("a.csv", "b.csv"):
        (tmp_path / "two" / one).write_text("text\na\n")
    (tmp_path / "twice.csv").write_text("path,label,path\na.png,x,b.png\n")
    (tmp_path / "both").mkdir()
    for one in ("a.png", "a.txt", "old.tar", "t.csv"):
        (tmp_path / "both" / one).write_bytes(png())
    with pytest.raises(UserError, match=message) as caught:
        find(str(tmp_path / name), kind, **options)
    assert "\n" not in str(caught.value)
