"""Files of strangers that are packed: bombs, pipes, loops, and what no decoder was made for."""

import io
import itertools
import os
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfdistill.data.formats import depth, images
from selfdistill.data.index import index
from selfdistill.data.pack import pack
from selfdistill.data.sources import tables
from selfdistill.data.verify import verify
from tests.data.shards.test_cli import call
from tests.kit.shards import numbered, png

WHOLE = png(numbered(3, 8))


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    """What `--max_pixels` sets holds for the process."""
    yield
    images.allow(images.MOST_PIXELS)


def failing(capsys: pytest.CaptureFixture[str], function: object, *words: object) -> str:
    """The one line that a command ends with."""
    began = time.monotonic()
    assert call(function, *words) == 2
    assert time.monotonic() - began < 10
    printed = capsys.readouterr().err.strip().split("\n")
    assert printed[-1].startswith("error: ")
    return printed[-1]


def folder_of(root: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (root / name[0]).mkdir(parents=True, exist_ok=True)
        (root / name[0] / f"{name}.png").write_bytes(content)
    return root


def chunked(width: int, height: int, bits: int, colour: int, pixels: bytes) -> bytes:
    """A PNG by hand."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def test_a_small_file_of_many_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """330 KB that come to 340 MB, and to gigabytes on the way to 8 bits."""
    side, rows = 13_000, zlib.compressobj(9)
    row = bytes(1 + 2 * side)
    bomb = chunked(
        side, side, 16, 0, b"".join(rows.compress(row) for _ in range(side)) + rows.flush()
    )
    assert len(bomb) < 400_000
    root = folder_of(tmp_path / "in", a1=bomb, b1=WHOLE)
    tracemalloc.start()
    line = failing(capsys, pack, root, tmp_path / "out", "--splits", "1")
    assert tracemalloc.get_traced_memory()[1] < 2**26
    tracemalloc.stop()
    assert "too many pixels (more than 89,478,485)" in line


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"])
def test_the_limit_holds_for_every_format(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.BytesIO()
    numbered(3, 32).convert("P" if kind == "GIF" else "RGB").save(out, kind)
    root = folder_of(tmp_path / "in", a1=out.getvalue(), b1=WHOLE)
    words = (root, tmp_path / "out", "--splits", "1")
    assert "(more than 1,023)" in failing(capsys, pack, *words, "--max_pixels", 1023)
    assert call(pack, *words, "--max_pixels", 1024, "--keep_original") == 0
    assert call(verify, tmp_path / "out", "--decode") == 0
    assert call(verify, tmp_path / "out", "--decode", "--max_pixels", 1023) == 2
    assert "max_pixels is 0" in failing(capsys, pack, root, tmp_path / "o", "--max_pixels", 0)


def test_deep_grey_and_transparent_images_are_computed_in_bands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they were in one piece."""
    generator = np.random.default_rng(0)
    deep = Image.fromarray(generator.integers(0, 2**16, (50, 30), dtype=np.uint16))
    clear = Image.fromarray(generator.integers(0, 256, (50, 30, 4), dtype=np.uint8), "RGBA")
    whole = [np.asarray(images.to_rgb(image)) for image in (deep, clear)]
    wanted = (np.asarray(deep).astype(np.int64) + 128) // 257
    assert np.array_equal(whole[0], wanted)
    white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
    laid = Image.alpha_composite(white, clear).convert("RGB")
    assert np.array_equal(whole[1], np.asarray(laid))
    monkeypatch.setattr(depth, "ROWS", 100)
    for image, before in zip((deep, clear), whole, strict=True):
        assert np.array_equal(np.asarray(images.to_rgb(image)), before)


def test_a_picture_that_would_start_a_program(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An EPS, which Pillow hands to Ghostscript: to this one, if at all."""
    canary, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {canary}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    out = io.BytesIO()
    numbered(3, 8).save(out, "EPS")
    root = folder_of(tmp_path / "in", a1=out.getvalue(), b1=WHOLE)
    line = failing(capsys, pack, root, tmp_path / "out", "--splits", "1", "--size", 8)
    assert "no image of a known kind" in line
    assert not canary.exists()


def test_pipes_devices_and_endless_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder_of(tmp_path / "in", a1=WHOLE, b1=WHOLE)
    os.mkfifo(root / "a" / "2.png")
    words = (tmp_path / "out", "--splits", "1", "--size", 8)
    assert "2.png" in (line := failing(capsys, pack, root, *words))
    assert "is no regular file" in line
    (root / "a" / "2.png").unlink()
    (root / "a" / "2.png").symlink_to("/dev/zero")
    assert "is no regular file" in failing(capsys, pack, root, *words)
    (root / "a" / "2.png").unlink()
    with (root / "a" / "2.png").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no room
    assert "2.png has 1,099,511,627,776 bytes" in failing(capsys, pack, root, *words).replace(
        "it has", "2.png has"
    )
    os.mkfifo(root / "pipe")
    for place in ("/dev/zero", root / "pipe"):
        assert "neither a folder nor a regular file" in failing(capsys, pack, place, *words)


def test_links_between_folders_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two folders each in the other, and of many ways to one place: 2^30 of them."""
    root = folder_of(tmp_path / "loop", a1=WHOLE, b1=WHOLE)
    (root / "a" / "x").symlink_to(root / "b")
    (root / "b" / "y").symlink_to(root / "a")
    words = (tmp_path / "out", "--splits", "1")
    assert "link" in failing(capsys, pack, root, *words)
    root = folder_of(tmp_path / "ladder", a1=WHOLE, b1=WHOLE)
    places = [root / "a" / "0", *(tmp_path / f"step{n}" for n in range(1, 31))]
    for here, there in zip(places, [*places[1:], tmp_path], strict=True):
        here.mkdir()
        for name in ("left", "right"):
            (here / name).symlink_to(there)
    assert "are links to one folder" in failing(capsys, pack, root, *words)


def test_a_hidden_folder_of_links_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class without pictures is looked through for anything else, and its links are not."""
    root = folder_of(tmp_path / "in", a1=WHOLE, b1=WHOLE)
    steps = [root / "c" / ".hidden" / str(number) for number in range(32)]
    for here in steps:
        here.mkdir(parents=True)
    for here, there in itertools.pairwise(steps):
        for name in ("left", "right"):
            (here / name).symlink_to(there)
    began = time.monotonic()
    call(pack, root, tmp_path / "out", "--splits", "1", "--size", 8)
    assert time.monotonic() - began < 10


def test_tiles_and_headers_that_are_larger_than_their_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tags = ((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1), (322, 32768))
    entries = [*tags, (323, 65520), (324, 200), (325, 12)]
    tiff = b"II*\0" + struct.pack("<IH", 8, len(entries))
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    tiff = (tiff + struct.pack("<I", 0)).ljust(200, b"\0") + zlib.compress(bytes(9))[:12]
    ppm = b"P5\n#" + b"a" * 10**7 + b"\n16 16 255\n" + bytes(256)
    for content, says in ((tiff, "too many pixels"), (ppm, "comment of more than 4,096 bytes")):
        root = folder_of(tmp_path / says[:5], a1=content, b1=WHOLE)
        assert says in failing(capsys, pack, root, tmp_path / "out", "--splits", "1", "--size", 8)
    short = b"P5\n# a comment\n# another\n16 16 255\n" + bytes(256)
    assert images.decode(short, None).shape == (3, 16, 16)


def test_pictures_outside_the_folder_of_their_list(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are packed, for many lists lie beside their pictures, and it is said."""
    (tmp_path / "lists").mkdir()
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(numbered(number, 8)))
    path = tmp_path / "lists" / "x.csv"
    path.write_text(f"path,label\n{tmp_path}/0.png,a\n../1.png,b\n")
    assert call(pack, path, tmp_path / "out", "--splits", "1") == 0
    assert "2 images lie outside the folder of x.csv" in capsys.readouterr().err


def test_lines_have_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "LONGEST", 1000)
    for name in ("x.txt", "x.jsonl", "x.tsv"):
        (tmp_path / name).write_bytes(b"text\tlabel\n" * (name == "x.tsv") + b"a" * 2000)
        line = failing(capsys, pack, tmp_path / name, tmp_path / "out")
        assert "more than 1,000" in line, name


def test_names_that_no_file_can_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "x" * 400
    for function, words in (
        (pack, (long, tmp_path / "out")),
        (pack, (folder_of(tmp_path / "in", a1=WHOLE, b1=WHOLE), tmp_path / long)),
        (verify, (long,)),
        (index, (long,)),
    ):
        assert "File name too long" in failing(capsys, function, *words)
    (tmp_path / "x.csv").write_text(f"path,label\n{long}.png,a\n")
    assert long in failing(capsys, pack, tmp_path / "x.csv", tmp_path / "out")
    (tmp_path / "x.csv").write_bytes(b"path,label\na\0.png,a\n")
    assert "x.csv" in failing(capsys, pack, tmp_path / "x.csv", tmp_path / "out")


def test_words_that_fire_reads_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no -" in failing(capsys, pack, "-", "out")
