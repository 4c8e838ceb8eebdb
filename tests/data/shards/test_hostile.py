"""Shards, tables and manifests that no packer wrote: one line, soon, in little memory."""

import hashlib
import io
import json
import os
import struct
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.index import index
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.shards.tars import scan
from tests.kit.command import call
from tests.kit.shards import numbered, png, uneven


@pytest.fixture
def split(tmp_path: Path) -> Manifest:
    return uneven(tmp_path / "train", [4, 3])


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a size as it is given, its checksum right."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def negative(size: int) -> bytes:
    return b"\xff" + size.to_bytes(11, "big", signed=True)


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
def test_a_member_of_less_than_nothing(tmp_path: Path, size: int) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(header("a.png", negative(size)) + bytes(1024))
    with pytest.raises(tarfile.ReadError):
        scan(path)


@pytest.mark.parametrize("kind", [b"L", b"K", b"x", b"g"])
def test_headers_without_end(tmp_path: Path, kind: bytes) -> None:
    """Five thousand before one member; and one of two gigabytes, in a file with a hole."""
    path = tmp_path / "x.tar"
    body = b"n.png\0" if kind in b"LK" else b"14 path=n.png\n"
    one = header("x", b"%011o\0" % len(body), kind) + body.ljust(512, b"\0")
    content = png(numbered(1))
    member = header("a.png", b"%011o\0" % len(content)) + content
    path.write_bytes(one * 5000 + member.ljust(-(-len(member) // 512) * 512, b"\0") + bytes(1024))
    began = time.monotonic()
    assert len(scan(path)) == 1
    with path.open("wb") as file:
        file.write(header("x", b"%011o\0" % 2**31, kind))
        file.truncate(2**31 + 2048)
    with pytest.raises(tarfile.ReadError, match="goes on for 2147483648 bytes"):
        scan(path)
    assert time.monotonic() - began < 10


def test_a_hundred_thousand_records_in_a_header(tmp_path: Path) -> None:
    """A megabyte of them takes no time that grows with its square."""
    body, path = b"7 a=bc\n" * 140_000, tmp_path / "x.tar"
    block = header("x", b"%011o\0" % len(body), b"x") + body.ljust(
        -(-len(body) // 512) * 512, b"\0"
    )
    path.write_bytes(block + header("a.png", b"%011o\0" % 0) + bytes(1024))
    began = time.monotonic()
    assert [member.name for member in scan(path)] == ["a.png"]
    assert time.monotonic() - began < 5


def test_labels_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train").mkdir()
    content = png(numbered(1))
    for label, said in (
        (b"[" * 2**19, "is no"),
        (b'{"label": ' * 50_000, "no valid JSON"),
        (b'{"label": ' + b"9" * 5000 + b"}", "no valid JSON"),
        (b'{"label": 1' + b"0" * 30 + b"}", "hardly the number of a class"),
        (b"9" * 5000, "hardly the number of a class"),
        (b" " * (2**20 + 1), "has 1,048,577 bytes"),
    ):
        with tarfile.open(tmp_path / "train" / "a.tar", "w") as tar:
            for name, data in (("k.png", content), ("k.json", label)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        assert call(index, tmp_path / "train") == 2
        printed = capsys.readouterr().err
        assert said in printed, printed
        assert len(printed) < 1000


def npy(header_: str, content: bytes = b"", version: bytes = b"\1\0") -> bytes:
    text = header_.encode()
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text + content


ROWS = "{'descr': '<i8', 'fortran_order': False, 'shape': (7, 4)}\n"


@pytest.mark.parametrize(
    "content",
    [
        npy(ROWS.replace("(7, 4)", "(10**18, 4)")),
        npy(ROWS.replace("(7, 4)", "(1000000000000000000, 4)")),
        npy(ROWS, bytes(7 * 32 - 1)),
        npy(ROWS, bytes(7 * 32 + 1)),
        npy(ROWS.replace("<i8", "|O"), bytes(7 * 32)),
        npy(ROWS.replace("<i8", ">i8"), bytes(7 * 32)),
        npy(ROWS.replace("False", "True"), bytes(7 * 32)),
        npy(ROWS.replace("'<i8'", "'<i"), bytes(7 * 32)),
        npy("(" * 60_000),
        npy("__import__('os').system('touch canary')"),
        npy(ROWS, bytes(7 * 32), b"\3\0"),
        b"PK\3\4" + bytes(100),
        b"",
    ],
)
def test_tables(split: Manifest, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(split.root)
    monkeypatch.chdir(root)
    (root / "members.npy").write_bytes(content)
    made = json.loads((root / "manifest.json").read_text())
    made["members"]["sha256"] = hashlib.sha256(content).hexdigest()
    (root / "manifest.json").write_text(json.dumps(made))
    with pytest.raises(UserError, match=r"members\.npy .*: fetch it anew"):
        _ = Manifest.load(str(root)).members
    assert not (root / "canary").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ((2**40, 10, 512, 1), "places it at byte"),
        ((2**63 - 1, 2**63 - 1, 512, 1), "places it at byte"),
        ((-512, 10, 512, 1), "places it at byte"),
        ((512, -1, 512, 1), "places it at byte"),
        ((1536, 2**62, 512, 1), "places it at byte"),
        ((1536, 10, 2**62, 1), "places its label at byte"),
        ((1536, 10, 512, 2**62), "places its label at byte"),
        ((1536, 10, -1, -1), "has no label for it"),
    ],
)
def test_rows_of_a_table(split: Manifest, row: tuple[int, ...], says: str) -> None:
    root = Path(split.root)
    table = np.load(root / "members.npy")
    table[2] = row
    np.save(root / "members.npy", table)
    content = (root / "members.npy").read_bytes()
    made = json.loads((root / "manifest.json").read_text())
    made["members"]["sha256"] = hashlib.sha256(content).hexdigest()
    (root / "manifest.json").write_text(json.dumps(made))
    reader = Reader(Manifest.load(str(root)))
    with pytest.raises(BrokenData, match=rf"t-000000\.tar, sample 2: members\.npy {says}"):
        reader.record(2)
    assert reader.record(1).label == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"samples": 2**63}, "samples"),
        ({"samples": 7.0}, "samples"),
        ({"samples": "7"}, "samples"),
        ({"class_counts": [1e30, 2, 2]}, "class_counts"),
        ({"class_counts": [-1, 4, 4]}, "class_counts"),
        ({"class_counts": [30, 2, 2]}, "more than its samples"),
        ({"classes": ["ant", "ant", "bee"]}, "twice"),
        ({"classes": ["\ud800", "a", "b"]}, "surrogates"),
        ({"split": "../x"}, "none of"),
        ({"members": {"file": ".", "sha256": "0" * 64}}, "neither a plain"),
        ({"members": {"file": "\0", "sha256": "0" * 64}}, "neither a plain"),
        ({"kind": "video"}, "kind"),
        *(({"image": {"size": size}}, "image.size") for size in ("x", 0, -1, 1e9, 10**9)),
        *(
            ({"image": {"size": size}}, "image.size")
            for size in ([], [4, 0], ["4", 4], [4, 4, 4], "4x8")
        ),
        ({"version": 2}, "version"),
    ],
)
def test_manifests(split: Manifest, change: dict[str, Any], says: str) -> None:
    path = Path(split.root) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=rf"manifest\.json.*({says})"):
        _ = Manifest.load(split.root).members


def test_a_manifest_that_is_no_file(split: Manifest) -> None:
    path = Path(split.root) / "manifest.json"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"manifest\.json is no regular file"):
        Manifest.load(split.root)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="has 1,099,511,627,776 bytes"):
        Manifest.load(split.root)


def test_a_table_that_is_no_file(split: Manifest) -> None:
    path = Path(split.root) / "members.npy"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"members\.npy is no regular file"):
        _ = Manifest.load(split.root).members


def test_a_shard_that_is_no_file(split: Manifest) -> None:
    path = Path(split.root) / split.shards[0].name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(BrokenData, match="it is no regular file"):
        Reader(split).check_shards()
    with pytest.raises(BrokenData, match="it is no regular file"):
        Reader(split).record(0)
