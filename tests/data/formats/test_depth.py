"""Pictures of more than 8 bits: the range of the set, found, given, and kept for later splits."""

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.preprocessing import minmax_scale

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.formats import depth, images
from selfdistill.data.index import index
from selfdistill.data.loading.codec import Pictures
from selfdistill.data.loading.loader import Sequential
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.kit.command import call

RANDOM = np.random.default_rng(0)


def bits(count: int, shape: tuple[int, ...] = (6, 6)) -> np.ndarray:
    return RANDOM.integers(0, 2**count, shape, dtype=np.uint16)


def colour_png(values: np.ndarray) -> bytes:
    """16-bit RGB, which Pillow cannot write: by hand after the PNG specification."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def colour_tiff(values: np.ndarray, compressed: bool = False) -> bytes:
    """16-bit RGB, after TIFF 6.0; compressed by Deflate, which libtiff reads for Pillow."""
    height, width, _ = values.shape
    data = values.astype("<u2").tobytes()
    data = zlib.compress(data) if compressed else data
    data += b"\0" * (len(data) % 2)
    at = 8 + len(data)
    entries = [
        *(
            (256, 3, 1, width),
            (257, 3, 1, height),
            (258, 3, 3, at),
            (259, 3, 1, 8 if compressed else 1),
        ),
        (262, 3, 1, 2),
        *((273, 4, 1, 8), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    directory = struct.pack("<H", len(entries)) + table + bytes(4)
    head = b"II*\0" + struct.pack("<I", at + 6)
    return head + data + struct.pack("<3H", 16, 16, 16) + directory


def saved(values: np.ndarray, kind: str) -> bytes:
    if values.ndim == 3:
        return colour_png(values) if kind == "PNG" else colour_tiff(values, kind == "TIF")
    out = io.BytesIO()
    Image.fromarray(values).save(out, kind)
    return out.getvalue()


def folders(root: Path, *pictures: np.ndarray, kind: str = "PNG") -> Path:
    for number, values in enumerate(pictures):
        place = root / "ab"[number % 2] / f"{number}.{kind.lower()}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(saved(values, kind))
    return root


def stored(out: Path, split: str = "train") -> list[np.ndarray]:
    """What training sees, [H, W] or [H, W, 3]; sorted, for shards are shuffled."""
    file = Manifest.load_split(str(out), split)
    found = [image.numpy() for b in Sequential(file, batch=1) for image in b["images"]]
    return sorted((f.transpose(1, 2, 0) for f in found), key=lambda a: a.tobytes())


def wanted(pictures: list[np.ndarray]) -> list[np.ndarray]:
    """By scikit-learn: the set's smallest value 0, its largest 255."""
    together = np.concatenate([p.astype(float).ravel() for p in pictures])
    levels = np.rint(minmax_scale(together, (0, 255))).astype(np.uint8)
    parts = np.split(levels, np.cumsum([p.size for p in pictures])[:-1])
    shown = [part.reshape(p.shape) for part, p in zip(parts, pictures, strict=True)]
    shown = [np.repeat(s[..., None], 3, -1) if s.ndim == 2 else s for s in shown]
    return sorted(shown, key=lambda a: a.tobytes())


def same(found: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return len(found) == len(right) and all(map(np.array_equal, found, right))


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("PNG", lambda: bits(12)),
        ("TIFF", lambda: bits(12)),
        ("PNG", lambda: bits(12, (6, 6, 3))),
        ("TIFF", lambda: bits(12, (6, 6, 3))),
        ("TIF", lambda: bits(12, (6, 6, 3))),
        ("TIFF", lambda: RANDOM.normal(0, 3, (6, 6)).astype(np.float32)),
        ("TIFF", lambda: RANDOM.integers(-1000, 10**6, (6, 6), dtype=np.int32)),
    ],
    ids=["png", "tiff", "rgb-png", "rgb-tiff", "rgb-deflate", "float", "int32"],
)
def test_a_low_part_of_the_range_is_spread(
    keep: bool, kind: str, make: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = [make() for _ in range(4)]
    source = folders(tmp_path / "in", *pictures, kind=kind)
    assert call(pack, source, tmp_path / "out", "--splits", 1, "--keep_original", keep) == 0
    assert "of the 4 pictures of more than 8 bits" in capsys.readouterr().err
    assert same(stored(tmp_path / "out"), wanted(pictures))
    file = Manifest.load_split(str(tmp_path / "out"), "train")
    low, high = min(p.min() for p in pictures), max(p.max() for p in pictures)
    assert file.image["range"] == [low, high]
    assert call(verify, tmp_path / "out", "--decode") == 0


def test_true_sixteen_bits_stay_as_they_were(tmp_path: Path) -> None:
    pictures = [bits(16) for _ in range(4)]
    source = folders(tmp_path / "in", *pictures)
    assert call(pack, source, tmp_path / "out", "--splits", 1) == 0
    old = [np.repeat(((p.astype(int) + 128) // 257)[..., None], 3, -1) for p in pictures]
    assert same(stored(tmp_path / "out"), sorted(old, key=lambda a: a.astype(np.uint8).tobytes()))
    assert call(pack, source, tmp_path / "auto", "--splits", 1, "--range", "auto") == 0
    assert same(stored(tmp_path / "auto"), wanted(pictures))


def test_a_set_of_eight_bits_has_no_range(tmp_path: Path) -> None:
    source = folders(tmp_path / "in", *(bits(8).astype(np.uint8) for _ in range(4)))
    assert call(pack, source, tmp_path / "out", "--splits", 1, "--name", "x") == 0
    assert "range" not in Manifest.load_split(str(tmp_path / "out"), "train").image
    blank = folders(tmp_path / "in", *(np.zeros((6, 6), np.uint16),) * 2)
    assert call(pack, blank, tmp_path / "blank", "--splits", 1) == 0
    assert (stored(tmp_path / "blank")[0] == 0).all()


def test_a_given_range_clips(tmp_path: Path) -> None:
    values = np.array([[-5.0, 0.0, 1.0, 2.0, 9.0]], np.float32)
    source = folders(tmp_path / "in", values, values, kind="TIFF")
    out = tmp_path / "out"
    assert call(pack, source, out, "--splits", 1, "--range", "0,2", "--keep_original") == 0
    assert stored(out)[0][0, :, 0].tolist() == [0, 0, 128, 255, 255]


def test_later_splits_have_the_range_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, later = [bits(12) for _ in range(4)], [bits(9) for _ in range(4)]
    out = tmp_path / "out"
    assert call(pack, folders(tmp_path / "in", *first), out, "--split", "train") == 0
    more = folders(tmp_path / "more", *later)
    assert call(pack, more, out, "--split", "test", "--range", "0,9") == 2
    assert "has the range" in capsys.readouterr().err
    assert call(pack, more, out, "--split", "test") == 0
    assert "that of the other splits" in capsys.readouterr().err
    train, test = (Manifest.load_split(str(out), s).span for s in ("train", "test"))
    assert train == test
    assert max(picture.max() for picture in stored(out, "test")) <= 33


def test_replaced_splits_have_no_say(tmp_path: Path) -> None:
    """A set of train and test becomes one of train alone, with values of its own."""
    out, words = tmp_path / "out", ("--splits", "0.5,0.5")
    first, other = [bits(12) for _ in range(8)], [bits(9) for _ in range(8)]
    assert call(pack, folders(tmp_path / "in", *first), out, *words) == 0
    more = folders(tmp_path / "more", *other)
    assert call(pack, more, out, "--splits", 1, "--overwrite") == 0
    assert [path.name for path in out.iterdir()] == ["train"]
    span = Manifest.load_split(str(out), "train").span
    assert span == (min(p.min() for p in other), max(p.max() for p in other))


def test_tars_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [bits(12) for _ in range(3)]
    for split, part in (("train", pictures[:2]), ("test", pictures[2:])):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "a.tar", "w") as tar:
            for number, values in enumerate(part):
                for name, data in (
                    (f"{number}.png", saved(values, "PNG")),
                    (f"{number}.cls", b"0"),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    assert call(index, tmp_path) == 0
    assert "of the 3 pictures of more than 8 bits" in capsys.readouterr().out
    right = wanted(pictures)
    found = sorted(stored(tmp_path) + stored(tmp_path, "test"), key=lambda a: a.tobytes())
    assert same(found, right)
    assert call(index, tmp_path / "test", "--overwrite") == 0
    assert Manifest.load_split(str(tmp_path), "test").span == (
        Manifest.load_split(str(tmp_path), "train").span
    )
    assert call(index, tmp_path, "--overwrite", "--range", "0,4095") == 0
    assert Manifest.load_split(str(tmp_path), "test").span == (0, 4095)


@pytest.mark.parametrize("text", ["1", "5,5", "9,1", "a,b", "0,nan", "0,inf", "-1e300,1e300", ""])
def test_ranges_that_are_none(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(pack, tmp_path, tmp_path / "out", f"--range={text}") == 2
    assert "range" in capsys.readouterr().err


def test_what_no_range_helps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hole = np.array([[1.0, np.nan]], np.float32)
    source = folders(tmp_path / "in", hole, hole, kind="TIFF")
    assert call(pack, source, tmp_path / "out") == 2
    assert "range" in capsys.readouterr().err
    assert call(pack, source, tmp_path / "out", "--range", "0,1") == 2
    assert "no numbers" in capsys.readouterr().err
    blank = folders(tmp_path / "blank", *(np.full((2, 2), 7, np.uint16),) * 2)
    assert call(pack, blank, tmp_path / "out", "--range", "auto") == 2
    assert "blank" in capsys.readouterr().err


@pytest.mark.parametrize("span", [[1], [2, 1], ["a", "b"], 3, [0, 1e300]])
def test_a_manifest_with_a_bad_range_is_refused(span: object, tmp_path: Path) -> None:
    source = folders(tmp_path / "in", bits(12), bits(12))
    assert call(pack, source, tmp_path / "out", "--splits", 1) == 0
    path = tmp_path / "out" / "train" / "manifest.json"
    content = json.loads(path.read_text())
    content["image"]["range"] = span
    with pytest.raises(UserError, match="range"):
        Manifest(json.dumps(content).encode(), str(path.parent))


def test_without_a_range_nothing_is_guessed() -> None:
    assert images.values(saved(bits(8).astype(np.uint8), "PNG")) is None
    assert images.values(b"\x89PNG\r\n\x1a\n broken") is None
    assert depth.choose(None, None) == (None, "")


def test_a_mixture_of_windows_and_none_is_told() -> None:
    """One file without a window would else take all others theirs."""
    with_one, without = depth.Seen(0, 1100, windows=1), depth.Seen(0, 60000)
    with pytest.raises(UserError, match="1 of 2 pictures of more than 8 bits name a window"):
        depth.choose(None, depth.joined([with_one, without]))
    assert depth.choose(None, depth.joined([with_one, with_one]))[0] is None
    assert depth.choose("auto", depth.joined([with_one, without]))[0] == (0, 60000)


def test_one_picture_alone_is_not_read_nearly_black() -> None:
    """Of a model that was trained on pictures of 8 bits: of one picture nobody knows the range."""

    def written(values: np.ndarray) -> bytes:
        out = io.BytesIO()
        Image.fromarray(values).save(out, "PNG")
        return out.getvalue()

    dim, full = bits(12), bits(16)
    full[0, 0] = 2**16 - 1
    with pytest.raises(BrokenData, match=r"values of \d+ to \d+ of 16 bits.*--range LOW,HIGH"):
        Pictures(6).decode(written(dim), "x.png")
    assert Pictures(6, (0.0, 4095.0)).decode(written(dim), "x.png").max() > 200
    assert Pictures(6).decode(written(full), "x.png").max() == 255
    assert Pictures(6).decode(written(dim.astype(np.uint8)), "x.png").shape == (3, 6, 6)
