"""Archives as a source: read as their folders are, refused where they lead outside or are cut."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest

from selfdistill.data.pack import pack
from tests.data.sources.test_layouts import EXPECTED, MAKE, packed
from tests.kit.command import call
from tests.kit.launches import ROOT
from tests.kit.shards import numbered, png


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".zip"])
@pytest.mark.parametrize("name", ["xray", "dtd", "flowers"])
def test_the_archive_itself(name: str, suffix: str, tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    MAKE[name](root)
    archive = tmp_path / f"official{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as target:
            for path in sorted(root.rglob("*")):
                target.write(path, path.relative_to(root))
    else:
        subprocess.run(["tar", "-caf", archive, "-C", root, "."], check=True)
    shutil.rmtree(root)
    assert packed(archive, tmp_path / "out") == EXPECTED[name]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {archive.name, "out"}  # nothing of the extraction is left


def test_an_archive_of_class_folders(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as target:
        for number in range(1, 5):
            content = io.BytesIO()
            numbered(number, 8).save(content, format="PNG")
            name = ("ant", "bee")[number % 2]
            target.writestr(f"birds/{name}/{number}.png", content.getvalue())
    found = packed(tmp_path / "birds.zip", tmp_path / "out", "--splits", 1)
    assert found == {"train": {1: "bee", 2: "ant", 3: "bee", 4: "ant"}}


def test_names_of_a_zip_that_a_mac_made(tmp_path: Path) -> None:
    """In UTF-8, of which its flag says nothing; those of old Windows stay as they are."""
    for name, written in (("Entzündung", "utf-8"), ("Müll", "cp437")):
        path = tmp_path / f"{written}.zip"
        with zipfile.ZipFile(path, "w") as target:
            for number in range(1, 5):
                inner = (name, "x" * len(name.encode(written)))[number % 2]
                place = f"{inner}/{number}.png".encode(written).decode("latin-1")
                target.writestr(place.encode("ascii", "replace").decode(), png(numbered(number, 8)))
        content = path.read_bytes()
        asked = "".join(c if c.isascii() else "?" * len(c.encode(written)) for c in name)
        path.write_bytes(content.replace(asked.encode(), name.encode(written)))
        found = packed(path, tmp_path / f"out-{written}", "--splits", 1)
        assert name in found["train"].values()


def test_an_archive_of_one_split_by_another_name(tmp_path: Path) -> None:
    """As the folder that it extracts to: it is not divided."""
    with zipfile.ZipFile(tmp_path / "birds.zip", "w") as target:
        for number in range(20):
            name = ("ant", "bee")[number % 2]
            target.writestr(f"Training/{name}/{number}.png", png(numbered(number, 8)))
    found = packed(tmp_path / "birds.zip", tmp_path / "out")
    assert found == {"train": {n: ("ant", "bee")[n % 2] for n in range(20)}}


def test_an_archive_that_leads_outside_or_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "evil.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../evil.txt"), io.BytesIO())
    assert call(pack, tmp_path / "evil.tar", tmp_path / "out") == 2
    assert "leads outside" in capsys.readouterr().err
    cut = tmp_path / "cut.tar.gz"
    with tarfile.open(cut, "w:gz") as tar:
        info = tarfile.TarInfo("a")
        info.size = 10**5
        tar.addfile(info, io.BytesIO(np.random.default_rng(0).bytes(10**5)))
    cut.write_bytes(cut.read_bytes()[:5000])
    assert call(pack, cut, tmp_path / "out") == 2
    assert "cut short" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"evil.tar", "cut.tar.gz"}


def test_links_and_other_ways_of_archives_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Links, of which chains lead outside; entries that are encrypted or of an unknown method."""
    victim = tmp_path / "victim"
    victim.mkdir()
    with tarfile.open(tmp_path / "links.tar", "w") as tar:
        for name, target in (("a", "."), ("a/b", ".."), ("a/b/c", str(victim))):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        tar.addfile(tarfile.TarInfo("a/b/c/written"), io.BytesIO())
    hard = tarfile.TarInfo("x.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "y.png"
    with tarfile.open(tmp_path / "hard.tar", "w") as tar:
        tar.addfile(hard)
    link = zipfile.ZipInfo("x")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as target:
        target.writestr(link, str(victim))
    for name, flag in (("locked.zip", (6, 1)), ("method.zip", (8, 99))):
        with zipfile.ZipFile(tmp_path / name, "w") as target:
            target.writestr("a/x.png", b"content")
        content = bytearray((tmp_path / name).read_bytes())
        directory = content.index(b"PK\x01\x02")
        for header in (0, directory + 2):  # the central directory has two more bytes before it
            content[header + flag[0]] = flag[1]
        (tmp_path / name).write_bytes(content)
    for name, said in (
        ("links.tar", "holds a link, 'a', which could lead outside"),
        ("hard.tar", "holds a link, 'x.png'"),
        ("link.zip", "holds a link, 'x'"),
        ("locked.zip", "cannot be read"),
        ("method.zip", "cannot be read"),
    ):
        assert call(pack, tmp_path / name, tmp_path / "out") == 2, name
        printed = capsys.readouterr().err
        assert said in printed, (name, printed)
        assert printed.count("\n") == 1
    assert not list(victim.iterdir())


def zstd(path: Path, content: bytes) -> Path:
    """Compressed by Arrow's own Zstandard."""
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as s:
        s.write(content)
    return path


def test_zstandard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "source"
    root.mkdir()
    MAKE["xray"](root)
    subprocess.run(["tar", "-cf", tmp_path / "whole.tar", "-C", root, "."], check=True)
    content = (tmp_path / "whole.tar").read_bytes()
    for name in ("a.tar.zst", "b.tzst"):
        assert packed(zstd(tmp_path / name, content), tmp_path / name[0]) == EXPECTED["xray"]
    parts = (content[:5000], content[5000:])  # frames, as pzstd writes them
    frames = [zstd(tmp_path / "x", part).read_bytes() for part in parts]
    (tmp_path / "c.tar.zst").write_bytes(b"".join(frames))
    assert packed(tmp_path / "c.tar.zst", tmp_path / "c") == EXPECTED["xray"]
    whole = (tmp_path / "a.tar.zst").read_bytes()
    capsys.readouterr()
    for broken in (whole[: len(whole) // 2], whole[:4] + whole[5:], b"no zstd", b""):
        (tmp_path / "d.tar.zst").write_bytes(broken)
        assert call(pack, tmp_path / "d.tar.zst", tmp_path / "d") == 2
        error = capsys.readouterr().err
        assert "is broken" in error
        assert error.count("\n") == 1
    assert not list(tmp_path.glob(".extracted*"))


def test_zstandard_where_it_is_not_installed(tmp_path: Path) -> None:
    zstd(tmp_path / "a.tar.zst", b"")
    code = (
        "import sys; sys.modules['zstandard'] = None; sys.argv = ['pack', 'a.tar.zst', 'out'];"
        " from selfdistill.data.cli import run; from selfdistill.data.pack import pack; run(pack)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("or decompress it yourself (zstd -d)")
    assert "pip install selfdistill[zstd]" in done.stderr


def test_a_compressed_tar_of_labels_is_for_data_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name in ("1.png", "1.cls"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert call(pack, tmp_path / "a.tgz", tmp_path / "out") == 2
    assert "python -m data.index" in capsys.readouterr().err
