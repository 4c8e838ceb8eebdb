"""TIFFs of several pages, or more channels than colours: chosen, or refused; never the first."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfdistill.data.formats import channels, images
from selfdistill.data.pack import pack
from tests.data.formats.test_depth import bits, same, stored
from tests.kit.command import call

GREY = np.random.default_rng(0).integers(0, 256, (4, 5, 6), dtype=np.uint8)


def pages(*values: np.ndarray, kinds: tuple[int, ...] = ()) -> bytes:
    """A TIFF of pages, each with its NewSubfileType (254)."""
    out = io.BytesIO()
    parts = [Image.fromarray(one) for one in values]
    for part, kind in zip(parts, kinds or (0,) * len(parts), strict=True):
        part.encoderinfo = {"tiffinfo": {254: kind}} if kind else {}
    parts[0].save(out, "TIFF", save_all=True, append_images=parts[1:])
    return out.getvalue()


def one_page(values: np.ndarray, extra: list[int], photometric: int = 2) -> bytes:
    """Channels side by side, after TIFF 6.0, with the kinds of those beyond the colours (338)."""
    height, width, count = values.shape
    data = values.tobytes()
    at = 8 + len(data)
    sizes = struct.pack(f"<{count}H", *[8 * values.itemsize] * count)
    kinds = struct.pack(f"<{len(extra)}H", *extra)
    entries = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, count, at), (259, 3, 1, 1)),
        *((262, 3, 1, photometric), (273, 4, 1, 8), (277, 3, 1, count), (278, 3, 1, height)),
        (279, 4, 1, len(data)),
    ]
    if len(extra) > 2:
        entries.append((338, 3, len(extra), at + len(sizes)))
    elif extra:
        entries.append((338, 3, len(extra), int.from_bytes(kinds, "little")))
    if count <= 2:  # they stand in the entry itself
        entries[2] = (258, 3, count, int.from_bytes(sizes, "little"))
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    directory = struct.pack("<H", len(entries)) + table + bytes(4)
    place = at + len(sizes) + len(kinds)
    return b"II*\0" + struct.pack("<I", place) + data + sizes + kinds + directory


def shown(content: bytes, *chosen: int) -> np.ndarray:
    return np.asarray(images.read(content, chosen=chosen or None))


def test_pages() -> None:
    content = pages(*GREY)
    with pytest.raises(ValueError, match=r"several pages: say which .*--channels 1, or 1,2,3"):
        images.read(content)
    assert np.array_equal(shown(content, 1), GREY[0])
    assert np.array_equal(shown(content, 4), GREY[3])
    assert np.array_equal(shown(content, 3, 1, 4), np.stack([GREY[2], GREY[0], GREY[3]], -1))
    with pytest.raises(ValueError, match="no page 5"):
        shown(content, 1, 2, 5)
    colours = pages(np.stack([GREY[0]] * 3, -1), GREY[1], GREY[2])
    assert np.array_equal(shown(colours, 1)[..., 0], GREY[0])
    for content in (colours, pages(GREY[0], GREY[1][:3], GREY[2])):
        with pytest.raises(ValueError, match=r"take one of them \(--channels 1\)"):
            shown(content, 1, 2, 3)


def test_reduced_pages_and_masks_are_no_pictures() -> None:
    """Thumbnails and pyramids, where they are marked."""
    content = pages(GREY[0], GREY[1][:2], GREY[2], kinds=(0, 1, 4))
    assert np.array_equal(shown(content), GREY[0])
    with pytest.raises(ValueError, match="several pages"):
        shown(pages(GREY[0], GREY[1][:2]))


def test_reduced_pages_and_masks_are_not_counted() -> None:
    """A thumbnail in front, or between, takes no picture's number, nor its place."""
    deep = bits(12, (6, 6)) + 4096
    content = pages(GREY[0][:2], GREY[1], GREY[2], deep, kinds=(1, 0, 4, 0))
    with pytest.raises(ValueError, match="several pages"):
        shown(content)
    assert np.array_equal(shown(content, 1), GREY[1])
    assert shown(content, 2).shape == deep.shape
    found = images.values(content, (2,))
    assert found is not None
    assert (found.low, found.high) == (deep.min(), deep.max())
    with pytest.raises(ValueError, match="no page 3"):
        shown(content, 3)
    assert np.array_equal(shown(pages(GREY[0][:2], GREY[1], kinds=(1, 0))), GREY[1])
    assert np.array_equal(shown(pages(GREY[0], kinds=(1,))), GREY[0])
    assert np.array_equal(shown(pages(GREY[0], GREY[1][:2], kinds=(1, 1))), GREY[0])


def test_the_way_round_broken_metadata_is_no_way_to_the_first_page() -> None:
    content = pages(*GREY)
    assert images.metadata.without(content) is not None
    with pytest.raises(ValueError, match="several pages"):
        images.read(content)


def test_channels_of_a_page() -> None:
    values = np.moveaxis(GREY, 0, -1)
    infrared = one_page(np.ascontiguousarray(values), [0])
    with pytest.raises(ValueError, match=r"it has 3 channels and 1 more: say which"):
        images.read(infrared)
    assert np.array_equal(shown(infrared, 1, 2, 3), values[..., :3])
    assert np.array_equal(shown(infrared, 3, 2, 1), values[..., 2::-1])
    assert np.array_equal(shown(infrared, 2), values[..., 1])
    with pytest.raises(ValueError, match="the first 3 are read here, not 4"):
        shown(infrared, 4)
    clear = one_page(np.ascontiguousarray(values), [2])  # transparency is none
    assert images.read(clear).mode == "RGB"
    many = one_page(np.repeat(values, 2, -1), [0] * 5)
    with pytest.raises(ValueError, match="channels, bits or compression that are not read here"):
        shown(many, 1)


def test_other_files_have_no_such_choice() -> None:
    for kind in ("PNG", "TIFF", "JPEG"):
        out = io.BytesIO()
        Image.fromarray(GREY[0]).save(out, kind)
        assert np.array_equal(shown(out.getvalue(), 1, 2, 3), shown(out.getvalue()))


def test_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve bits a page: all chosen pages of the set have one range."""
    sets = [bits(12, (3, 6, 6)) for _ in range(4)]
    for number, values in enumerate(sets):
        place = tmp_path / "in" / "ab"[number % 2] / f"{number}.tif"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pages(*values))
    out = tmp_path / "out"
    assert call(pack, tmp_path / "in", out, "--splits", 1) == 2
    assert "several pages: say which" in capsys.readouterr().err
    assert call(pack, tmp_path / "in", out, "--splits", 1, "--channels", "3,1,2") == 0
    low, high = (float(f(sets)) for f in (np.min, np.max))
    right = [np.rint((s[[2, 0, 1]] - low) * (255 / (high - low))).astype(np.uint8) for s in sets]
    right = sorted((np.moveaxis(r, 0, -1) for r in right), key=lambda a: a.tobytes())
    assert same(stored(out), right)
    assert call(pack, tmp_path / "in", tmp_path / "o", "--channels", 1, "--keep_original") == 2
    assert "--channels changes them" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "1,2", "1,2,3,4", "a", "-1", "", "1,2,99999999"])
def test_choices_that_are_none(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(pack, tmp_path, tmp_path / "out", f"--channels={text}") == 2
    assert "give a page's or channel's number" in capsys.readouterr().err
    assert channels.parse("(3, 2, 1)") == (3, 2, 1)
