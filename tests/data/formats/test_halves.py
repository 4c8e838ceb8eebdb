"""16-bit files of which Pillow gives 8 bits or nonsense: shown right, or refused in a line."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from selfdistill.data.formats import depth, images
from selfdistill.data.pack import pack
from tests.data.formats.test_channels import one_page
from tests.data.formats.test_depth import bits
from tests.kit.command import call

SPAN = (0.0, 4095.0)


def alpha_png(values: np.ndarray, key: bytes = b"") -> bytes:
    """16-bit grey or RGB with alpha, or RGB with a key, by hand after the PNG specification."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return size + kind + data + check

    height, width, count = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks[1:1] = [(b"tRNS", key)] if key else []
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def tiff(values: np.ndarray, photometric: int, *, planar: bool = False) -> bytes:
    """Grey or RGB after TIFF 6.0, its channels side by side or one after the other."""
    height, width, count = values.shape
    planes = [np.ascontiguousarray(values[..., i]) for i in range(count)] if planar else [values]
    data = b"".join(plane.astype(f"<u{values.itemsize}").tobytes() for plane in planes)
    at, size = 8 + len(data), len(data) // len(planes)
    lists = [[8 * values.itemsize] * count, [8 + size * i for i in range(len(planes))]]
    lists.append([size] * len(planes))
    placed, tail = [], b""
    for one, form in zip(lists, "HII", strict=True):
        packed = struct.pack(f"<{len(one)}{form}", *one)
        short = len(packed) <= 4
        placed.append(int.from_bytes(packed, "little") if short else at + len(tail))
        tail += b"" if short else packed
    entries = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, count, placed[0]), (259, 3, 1, 1)),
        *((262, 3, 1, photometric), (273, 4, len(planes), placed[1]), (277, 3, 1, count)),
        *((278, 3, 1, height), (279, 4, len(planes), placed[2]), (284, 3, 1, 2 if planar else 1)),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    directory = struct.pack("<H", len(entries)) + table + bytes(4)
    return b"II*\0" + struct.pack("<I", at + len(tail)) + data + tail + directory


def with_alpha(colours: int) -> np.ndarray:
    """Twelve bits a colour; transparent at the left, opaque at the right."""
    values = bits(12, (6, 6, colours + 1))
    values[..., -1] = np.where(np.arange(6) < 2, 0, 65535)
    return values


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_colours_with_transparency_have_the_range_of_the_set(kind: str, tmp_path: Path) -> None:
    values = with_alpha(3)
    content = alpha_png(values) if kind == "png" else one_page(values, [2])
    found = images.values(content)
    assert found == depth.Seen(float(values[..., :3].min()), float(values[..., :3].max()))
    right = np.rint(values[..., :3] * (255 / 4095)).astype(np.uint8)
    right[:, :2] = 255  # over white
    assert np.array_equal(np.asarray(images.read(content, span=SPAN)), right)
    upper = np.where(values[..., 3:] > 0, values[..., :3] >> 8, 255)
    assert np.array_equal(np.asarray(images.read(content)), upper)
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"1.{kind}").write_bytes(content)
    assert call(pack, tmp_path / "in", tmp_path / "out", "--splits", 1) == 0


def test_channels_that_are_no_colours_cost_no_bits() -> None:
    values = bits(12, (6, 6, 4))
    shown = images.read(one_page(values, [0]), span=SPAN, chosen=(3, 2, 1))
    right = np.rint(values[..., 2::-1] * (255 / 4095)).astype(np.uint8)
    assert np.array_equal(np.asarray(shown), right)


def test_grey_with_transparency_is_seen_and_refused_at_a_range() -> None:
    values = with_alpha(1)
    content = alpha_png(values)
    low, high = (int(f(values[..., 0] >> 8)) for f in (np.min, np.max))
    assert images.values(content) == depth.Seen(256 * low, 256 * high + 255)
    with pytest.raises(ValueError, match=r"upper halves alone .* \(--range 0,65535\)$"):
        images.read(content, span=SPAN)
    assert images.read(content, span=depth.FULL).mode == "RGB"


@pytest.mark.parametrize("span", [None, depth.FULL, SPAN])
def test_a_colour_that_stands_for_transparency_is_refused(span: depth.Range | None) -> None:
    """Pillow compares the upper halves of the pixels with the whole of the key."""
    values = bits(12, (6, 6, 3))
    with pytest.raises(ValueError, match=r"colours stands for transparency.*convert it to RGBA"):
        images.read(alpha_png(values, values[0, 0].astype(">u2").tobytes()), span=span)


def test_planes_of_more_than_8_bits_are_refused() -> None:
    values = bits(16, (4, 5, 3))
    assert images.values(tiff(values, 2)) is not None
    with pytest.raises(ValueError, match=r"planar TIFF.*: convert it to grey or RGB with"):
        images.read(tiff(values, 2, planar=True))
    eight = (values >> 8).astype(np.uint8)
    for planar in (True, False):
        assert np.array_equal(np.asarray(images.read(tiff(eight, 2, planar=planar))), eight)


def test_more_than_8_bits_in_which_0_is_white_are_refused() -> None:
    values = bits(16, (4, 5, 1))
    with pytest.raises(ValueError, match="0 is white, which is not read here: convert it"):
        images.read(tiff(values, 0))
    assert images.read(tiff(values, 1)).mode == "L"
    eight = (values >> 8).astype(np.uint8)
    assert np.array_equal(np.asarray(images.read(tiff(eight, 0))), 255 - eight[..., 0])
