"""Every kind of image becomes the RGB that it means; broken ones are named."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sklearn.datasets import load_sample_image

from selfdistill.data.errors import BrokenData
from selfdistill.data.formats import images
from selfdistill.data.formats import png as png_files
from tests.kit.shards import png

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RGB = np.stack([GREY, GREY.T, np.full_like(GREY, 9)], axis=-1)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format=kind, **options)
    return out.getvalue()


def pixels(content: bytes) -> np.ndarray:
    return images.decode(content, None)


def test_rgb_and_grey() -> None:
    assert np.array_equal(pixels(png(Image.fromarray(RGB))), RGB.transpose(2, 0, 1))
    grey = pixels(png(Image.fromarray(GREY)))
    assert grey.shape == (3, 8, 8)
    assert all(np.array_equal(channel, GREY) for channel in grey)
    bits = Image.fromarray(GREY > 100)
    assert np.array_equal(pixels(png(bits))[0], (GREY > 100) * 255)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind: str) -> None:
    wide = GREY.astype(np.uint16) * 257
    assert np.array_equal(pixels(saved(Image.fromarray(wide), kind))[0], GREY)
    assert pixels(saved(Image.fromarray(np.array([[200]], np.uint16)), kind)).max() == 1


def test_palette() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.putpixel((1, 0), 1)
    assert pixels(png(image))[:, 0, 1].tolist() == [10, 20, 30]
    assert pixels(saved(image, "GIF"))[:, 0, 1].tolist() == [10, 20, 30]


def test_transparency_is_laid_over_white() -> None:
    half = Image.new("RGBA", (1, 1), (0, 100, 200, 128))
    assert np.abs(pixels(png(half))[:, 0, 0].astype(int) - [127, 177, 227]).max() <= 1
    assert pixels(png(Image.new("LA", (1, 1), (0, 0)))).tolist() == [[[255]]] * 3
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    assert pixels(saved(image, "PNG", transparency=0)).tolist() == [[[255]]] * 3
    keyed = saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG", transparency=(1, 2, 3))
    assert pixels(keyed).tolist() == [[[255]]] * 3
    bits = Image.fromarray(np.array([[False, True]]))
    assert pixels(saved(bits, "PNG", transparency=0)).tolist() == [[[255, 255]]] * 3


def test_cmyk() -> None:
    for kind in ("JPEG", "TIFF"):
        found = pixels(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), kind))
        assert np.abs(found.mean((1, 2)) - [255, 0, 0]).max() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_of_the_camera(kind: str) -> None:
    wide = Image.new("RGB", (16, 8), (255, 0, 0))
    wide.paste((0, 0, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    found = pixels(saved(wide, kind, exif=exif)).astype(int)
    assert found.shape == (3, 16, 8)
    assert found[2, 2, 4] > 200 > 50 > found[2, 13, 4]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_orientation_as_imagemagick_writes_it(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()
    lines = "\n".join(content.hex()[i : i + 72] for i in range(0, 2 * len(content), 72))
    notes = PngInfo()
    notes.add_text("Raw profile type exif", f"\nexif\n{len(content):8d}\n{lines}\n", zip=True)
    assert pixels(saved(Image.new(mode, (16, 8)), "PNG", pnginfo=notes)).shape == (3, 16, 8)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (2, 2), (50 * i, 0, 0)) for i in range(3)]
    content = saved(frames[2], "GIF", save_all=True, append_images=frames[:2])
    assert pixels(content)[0].max() == 100


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (300, 2)])
def test_tiny_and_thin_images_fill_the_square(shape: tuple[int, int]) -> None:
    content = images.prepare(png(Image.new("RGB", shape, (1, 2, 3))), 8)
    found = pixels(content)
    assert found.shape == (3, 8, 8)
    assert np.array_equal(found[:, 3, 3], [1, 2, 3])


def test_fit_takes_the_centre_of_the_short_side() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 255, 0), (10, 0, 30, 20))
    found = np.asarray(images.fit(wide, 10))
    assert (found == [0, 255, 0]).all(-1)[:, 1:-1].all()
    same = Image.fromarray(RGB)
    assert images.fit(same, 8) is same


PHOTO = Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427, much fine detail
TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize("size", [40, 64, 106, 213, 400, 500, (40, 213), (213, 106)])
@pytest.mark.parametrize(
    "content",
    [
        saved(PHOTO, "JPEG", quality=90),
        saved(PHOTO, "JPEG", quality=90, progressive=True),
        saved(PHOTO, "JPEG", quality=90, exif=TURNED),
        saved(PHOTO.convert("L"), "JPEG", quality=90),
        saved(PHOTO.convert("CMYK"), "JPEG", quality=90),
        saved(PHOTO, "MPO", quality=90, save_all=True, append_images=[PHOTO]),
    ],
    ids=["plain", "progressive", "turned", "grey", "cmyk", "mpo"],
)
def test_a_jpeg_read_smaller_is_as_the_whole_one(content: bytes, size: images.Size) -> None:
    """As near as another filter brings it: bilinear is 38.5 to 39.5 dB from bicubic here."""
    found = images.decode(content, size).astype(float)
    assert found.shape == (3, *images.sides(size))
    whole = np.asarray(images.fit(images.read(content), size).convert("RGB")).astype(float)
    error = ((found - whole.transpose(2, 0, 1)) ** 2).mean()
    assert error <= 255**2 / 10**3.5  # 35 dB
    assert abs((found - whole.transpose(2, 0, 1)).mean()) < 0.5


def test_jpegs_are_read_smaller_where_that_is_enough() -> None:
    content = saved(PHOTO, "JPEG")

    def side(size: int | None) -> int:
        found = images._read(content, size)
        assert isinstance(found, Image.Image)
        return min(found.size)

    assert [side(size) for size in (None, 35, 71, 142, 143)] == [427, 54, 107, 214, 427]
    with pytest.raises(BrokenData, match="truncated"):
        images.decode(content[: len(content) // 2], 64)


def test_prepare_is_lossless_and_leaves_metadata_out() -> None:
    plain = images.prepare(png(Image.fromarray(RGB)), 8)
    marked = images.prepare(saved(Image.fromarray(RGB), "PNG", dpi=(72, 72), exif=Image.Exif()), 8)
    assert plain == marked
    assert np.array_equal(pixels(plain), RGB.transpose(2, 0, 1))
    grey = images.prepare(png(Image.fromarray(GREY)), 8)
    assert Image.open(io.BytesIO(grey)).mode == "L"
    assert images.prepare(png(Image.new("RGB", (3, 5))), None) == png(Image.new("RGB", (3, 5)))


WHOLE = png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)))


@pytest.mark.parametrize("at", [9, 20, 30, 60, 500, len(WHOLE) - 20, len(WHOLE) - 3])
def test_a_flipped_byte_of_a_png_is_caught(at: int) -> None:
    broken = bytearray(WHOLE)
    broken[at] ^= 4
    with pytest.raises(BrokenData, match=r"shard a, sample b: the image cannot be read: .*skip"):
        images.decode(bytes(broken), None, "shard a, sample b")


@pytest.mark.parametrize(
    "content",
    [
        WHOLE[: len(WHOLE) // 2],
        WHOLE[:-1],
        saved(Image.fromarray(RGB).resize((64, 64)), "JPEG")[:-200],
        saved(Image.fromarray(RGB), "WEBP", lossless=True)[:40],
        b"",
        b"hello",
        b"\x89PNG\r\n\x1a\n",
        saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"),
        saved(Image.fromarray(GREY.astype(np.int32) * 10**6), "TIFF"),
        saved(Image.fromarray(np.full((2, 2), -1, np.int32)), "TIFF"),
    ],
)
def test_unreadable_images_are_named(content: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BrokenData, match="sample b: the image cannot be read: ") as caught:
            images.decode(content, None, "sample b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("at", range(0, len(WHOLE), 7))
def test_the_short_way_refuses_and_reads_what_pillow_does(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether Pillow's reader of chunks is left out makes no difference, whole or broken."""

    def outcome(content: bytes) -> object:
        try:
            return images.decode(content, None).tolist()
        except BrokenData as error:
            return str(error)

    grey = png(Image.fromarray(GREY[:5]))
    broken = bytearray(WHOLE)
    broken[at] ^= 1 << at % 8
    resealed = bytes(broken[:-16]) + zlib.crc32(broken[37:-16]).to_bytes(4, "big") + WHOLE[-12:]
    contents = (WHOLE, grey, bytes(broken), resealed, WHOLE[:at])
    assert png_files.plain(WHOLE) is not None
    assert png_files.plain(grey) is not None
    found = [outcome(content) for content in contents]
    monkeypatch.setattr(png_files, "_PLAIN_MODES", {})
    assert png_files.plain(WHOLE) is None
    assert found == [outcome(content) for content in contents]


@pytest.mark.parametrize("rows", range(0, 17, 2))
def test_nothing_is_left_of_the_image_before(rows: int) -> None:
    """A file that promises more rows than it holds is refused; Pillow leaves them black."""
    noise = np.random.default_rng(0).integers(1, 256, (2, 16, 16, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise[0]), "PNG")
    lines = zlib.compress(b"".join(b"\0" + line.tobytes() for line in noise[1][:rows]))
    part = len(lines).to_bytes(4, "big") + b"IDAT" + lines
    part += zlib.crc32(b"IDAT" + lines).to_bytes(4, "big")
    short = whole[:33] + part + whole[-12:]
    assert np.array_equal(pixels(whole), noise[0].transpose(2, 0, 1))
    if rows < 16:
        with pytest.raises(BrokenData, match=f"it has {49 * rows} bytes of pixels"):
            pixels(short)
    else:
        assert np.array_equal(pixels(short), noise[1].transpose(2, 0, 1))


def test_an_interlaced_image_is_whole_or_refused() -> None:
    """Adam7's passes are counted, too: of a picture with palette, 5 x 3 pixels, made by hand."""
    size = struct.pack(">IIBBBBB", 5, 3, 8, 3, 0, 0, 1)
    passes = b"\0\1\0\2\0\3\0\4\5\6\0\1\2\0\3\4\0\1\2\3\4\5"
    for data, whole in ((passes, True), (passes[:-6], False)):
        chunks = ((b"IHDR", size), (b"PLTE", bytes(range(30))), (b"IDAT", zlib.compress(data)))
        made = png_files.SIGNATURE + b"".join(
            len(part).to_bytes(4, "big") + kind + part + zlib.crc32(kind + part).to_bytes(4, "big")
            for kind, part in (*chunks, (b"IEND", b""))
        )
        if whole:
            assert images.decode(made, None).shape == (3, 3, 5)
        else:
            with pytest.raises(BrokenData, match="bytes of pixels"):
                images.decode(made, None)


def test_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BrokenData, match="too many pixels"):
        images.decode(WHOLE, None)


@pytest.mark.parametrize("length", [3_000_000, 10_000_001])
def test_a_long_thin_picture_is_no_bomb(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is cut it would have 150 GB, or more pixels than Pillow can count."""
    thin = png(Image.new("L", (length, 1)))
    for size in (224, (224, 448)):
        with pytest.raises(ValueError, match=r"too long and thin: scaled to cover .*--fit pad"):
            images.prepare(thin, size)
        with pytest.raises(BrokenData, match="too long and thin"):
            images.decode(thin, size)
    assert images.decode(thin, 8, how="pad").shape == (3, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**15)
    with pytest.raises(ValueError, match=r"^.+$"):
        images.prepare(thin, 2**15)


def chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))
BIG = zlib.compress(b"a" * 2_000_000)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"iCCP", b"icc\0\0" + BIG),
        chunk(b"zTXt", b"C\0\0" + BIG),
        chunk(b"iTXt", b"C\0\1\0\0\0" + BIG),
        b"".join(chunk(b"tEXt", b"k%d\0" % i + b"x" * 900_000) for i in range(80)),
        chunk(b"iCCP", b"icc\0\0not compressed"),
        chunk(b"iCCP", b""),
        chunk(b"pHYs", b"x"),
        chunk(b"gAMA", b""),
        chunk(b"tEXt", b"k\0v")[:-1] + b"\0",  # a wrong checksum, of a text
        chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
        chunk(b"eXIf", b""),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"),
    ],
    ids=lambda content: f"{content[4:8].decode()}-{len(content)}",
)
def test_what_stands_beside_a_png_costs_no_picture(extra: bytes) -> None:
    whole = png(NOISE)
    told: list[int] = []
    image = images.read(whole[:33] + extra + whole[33:], lambda: told.append(1))
    assert np.array_equal(np.asarray(image), np.asarray(NOISE))
    assert len(told) <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "MPO"])
def test_damaged_metadata_cost_no_picture(kind: str) -> None:
    """Bytes of EXIF, profile, XMP and comment are changed at random; the pixels stay."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769).update({0x9003: "2026:01:01 00:00:00", 0x927C: b"maker" * 20})
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    profile = np.random.default_rng(1).bytes(900)
    options: dict[str, object] = {"exif": exif, "icc_profile": profile, "xmp": b"<x/>" * 90}
    if kind == "JPEG":
        options |= {"comment": b"words" * 9}
    if kind == "MPO":
        options = {"exif": exif, "save_all": True, "append_images": [NOISE]}
    if kind == "PNG":
        options.pop("xmp")
    whole = saved(NOISE, kind, **options)
    lying = np.asarray(Image.open(io.BytesIO(saved(NOISE, kind, **{**options, "exif": b""}))))
    if kind == "TIFF":
        lying = np.asarray(NOISE)
    upright = np.rot90(lying, -1)
    assert np.array_equal(np.asarray(images.read(whole)), upright)
    needles = (
        profile,
        b"<x/>" * 90,
        b"words" * 9,
        b"Maker",
        b"2026:01:01",
        b"MPF\0",
        b"II*\0",
        b"MM\0*",
    )
    places = [(at, len(n)) for n in needles if (at := whole.find(n, 12)) > 0]
    rng = np.random.default_rng(2)
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 9)):
            at, size = places[rng.integers(len(places))]
            damaged[at + rng.integers(max(size, 40))] = rng.choice([0, 255, rng.integers(256)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = np.asarray(images.read(bytes(damaged)))
        turned = [np.rot90(lying, k) for k in range(4)]
        turned += [np.fliplr(one) for one in turned]
        assert any(np.array_equal(found, one) for one in turned)


def test_the_pixels_of_a_damaged_png_are_still_refused() -> None:
    whole = bytearray(png(NOISE))
    whole[whole.index(b"IDAT") + 40] ^= 1
    with pytest.raises(ValueError, match="checksum of its chunk IDAT"):
        images.read(bytes(whole))


def test_no_format_is_read_that_runs_a_program(tmp_path: Path, monkeypatch: Any) -> None:
    """Pillow gives an EPS to Ghostscript, whatever the file is called."""
    canary = tmp_path / "canary"
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {canary}\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"
    with pytest.raises(ValueError, match="it is no image of a known kind"):
        images.read(eps)
    assert not canary.exists()
