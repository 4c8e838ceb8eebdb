"""Images of any height and width: fitted as timm does it, packed, read; sizes that are none."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

from selfdistill.data import pack
from selfdistill.data.cli import run
from selfdistill.data.errors import UserError
from selfdistill.data.formats import images
from selfdistill.data.loading.loader import Loader
from selfdistill.data.shards.manifest import Manifest
from tests.kit.launches import make_images

WANTED = [(32, 48), (48, 32), (7, 60), (61, 20)]
FOUND = [(100, 100), (64, 96), (97, 31), (31, 97), (200, 41), (33, 47), (20, 20), (48, 32)]


@pytest.mark.parametrize("size", WANTED)
@pytest.mark.parametrize("found", FOUND)
def test_fit_is_timms_evaluation(size: tuple[int, int], found: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*found, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    timms = create_transform((3, *size), interpolation="bicubic", crop_pct=1.0, normalize=False)
    fitted = np.asarray(images.fit(image, size)).transpose(2, 0, 1)
    assert fitted.shape == (3, *size)
    assert np.array_equal(fitted, timms(image).numpy())
    for content in (png(image), images.prepare(png(image), size)):
        assert np.array_equal(images.decode(content, size), fitted)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def test_sizes() -> None:
    for given, size, typed in (
        (224, 224, "224"),
        ("224", 224, "224"),
        ("224x448", (224, 448), "224x448"),
        ([32, 48], (32, 48), "32x48"),
        ((32, 32), 32, "32"),
        ("32x32", 32, "32"),
    ):
        assert images.size_of(given) == size
        assert images.typed(images.size_of(given)) == typed
        assert images.size_of(images.typed(size)) == size
    assert images.sides(3) == (3, 3)
    assert images.sides((3, 4)) == (3, 4)


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("224x", "height x width, such as 224x448, not '224x'"),
        ("x224", "height x width"),
        ("1x2x3", "height x width"),
        ("224,448", "height x width"),
        ("2.5", "height x width"),
        ("-4x8", "height x width"),
        ("0x3", "give sides of 1 to 32768 pixels, not '0x3'"),
        ("0", "give sides of 1 to 32768 pixels"),
        ("8x99999", "give sides of 1 to 32768 pixels"),
    ],
)
def test_what_is_no_size_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, says: str
) -> None:
    with pytest.raises(SystemExit) as left:
        run(pack.pack, [str(tmp_path), str(tmp_path / "out"), f"--size={size}"])
    error = capsys.readouterr().err
    assert left.value.code == 2
    assert error.startswith("error: option --size: ")
    assert says in error
    assert error.count("\n") == 1


def test_packed_and_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_images(tmp_path / "images", size=40)
    for size in ("8x12", "8x8", "8"):
        run(pack.pack, [str(source), str(tmp_path / size), f"--size={size}"])
    with pytest.raises(SystemExit):
        run(pack.pack, ["--help"])
    assert "int|HEIGHTxWIDTH" in capsys.readouterr().out
    manifest = Manifest.load_split(str(tmp_path / "8x12"), "train")
    told = json.loads((tmp_path / "8x12" / "train" / "manifest.json").read_text())["image"]
    assert told["size"] == [8, 12]
    assert told["fit"] == "both sides covered, bicubic, centre crop"
    assert manifest.size == (8, 12)
    batch = next(iter(Loader(manifest, batch=4)))
    assert batch["images"].shape == (4, 3, 8, 12)
    path = sorted((source / "train").rglob("*.png"))
    wanted = {np.asarray(images.fit(Image.open(p), (8, 12))).tobytes() for p in path}
    assert {one.permute(1, 2, 0).numpy().tobytes() for one in batch["images"]} <= wanted
    square, same = (
        json.loads((tmp_path / size / "train" / "manifest.json").read_text())["image"]
        for size in ("8", "8x8")
    )
    assert square == same == {"size": 8, "stored": "png", "fit": "short side bicubic, centre crop"}


def test_a_size_of_nothing_is_refused_by_the_function_too(tmp_path: Path) -> None:
    source = make_images(tmp_path / "images", train=1, other=1)
    with pytest.raises(UserError, match="size is 0x3 pixels: give 1 or more"):
        pack.pack(str(source), str(tmp_path / "out"), size=(0, 3))
