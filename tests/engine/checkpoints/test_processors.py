"""Exported processors make of a photo what packing made of it, in transformers and in timm."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from selfdistill.data import pack
from selfdistill.data.errors import UserError
from selfdistill.data.formats import fitting, images
from selfdistill.data.loading.codec import Images
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.export import export_classifier, export_mae
from selfdistill.engine.inference.model import load
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN, IMAGENET_STD
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE
from selfdistill.engine.models.images.weights import load_pretrained

SIZES = [(21, 16), (16, 33), (40, 50), (16, 16), (97, 31), (17, 16), (24, 16), (48, 32)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As cameras and people make them: any ratio, grey, turned by a note."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        image = Image.fromarray(pixels)
        image = image.convert("L") if number == 4 else image
        exif = Image.Exif()
        if number % 3 == 1:
            exif[0x0112] = 6  # to be turned by 90 degrees
        image.save(folder / f"{number}.{'png' if number % 2 else 'jpg'}", exif=exif)
    return folder


def exported(folder: Path, size: images.Size, fit: fitting.Fit, pool: str) -> Shape:
    shape = Shape(size, 8, 16, 1, 2, 32, 16, 1, 2, 32, norm_eps=1e-6)
    model = ViTClassifier(ViTEncoder(shape), 2, pool=pool)
    encoder, head = model.encoder.state_dict(), model.head.state_dict()
    own = {"image": {"fit": fitting.told(size, fit, stored=False)}}
    where = (IMAGENET_MEAN, IMAGENET_STD, own)
    export_classifier(folder / "classifier", shape, encoder, head, ["a", "b"], pool, *where)
    whole = ViTMAE(shape)
    parts = whole.encoder.state_dict(), whole.decoder.state_dict()
    export_mae(folder / "encoder", shape, *parts, *where)
    return shape


@pytest.mark.parametrize("size", [16, (16, 24)])
@pytest.mark.parametrize("fit", fitting.FITS)
def test_they_equal_packing(
    tmp_path: Path, photos: Path, size: images.Size, fit: fitting.Fit
) -> None:
    """To the pixel, of a classifier for each class of transformers, and of an encoder."""
    pack.pack(
        str(photos), str(tmp_path / "shards"), size=size, fit=fit, unlabelled=True, split="train"
    )
    manifest = Manifest.load_split(str(tmp_path / "shards"), "train")
    reader, codec = Reader(manifest), Images(size)
    packed = [codec.decode(reader.record(i).input, "x") for i in range(manifest.samples)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    named = {path.stem: path for path in photos.iterdir()}
    wanted = {}
    for path in photos.iterdir():
        again = images.decode(path.read_bytes(), size, how=fit)
        wanted[path.stem] = (torch.from_numpy(again.copy()) / 255 - mean) / std
        assert any(np.array_equal(again, one) for one in packed), path.name
    for pool in ("cls", "mean"):
        exported(tmp_path / pool, size, fit, pool)
        for folder in (tmp_path / pool / "classifier", tmp_path / pool / "encoder"):
            process = AutoImageProcessor.from_pretrained(folder, backend="pil")
            model = timm.create_model(f"local-dir:{folder / 'timm'}", pretrained=False)
            transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
            for name, path in named.items():
                found = process(load_image(str(path)), return_tensors="pt")["pixel_values"][0]
                torch.testing.assert_close(found, wanted[name], atol=1e-6, rtol=0)
                if fit == "crop" and isinstance(size, int):
                    continue  # timm's centre is half a pixel beside where sides' difference is odd
                found = transform(load_image(str(path)))
                torch.testing.assert_close(found, wanted[name], atol=1e-6, rtol=0)
        weights = load_pretrained(str(tmp_path / pool / "classifier"))  # as another run's base
        assert (weights.mean, weights.std) == (IMAGENET_MEAN, IMAGENET_STD)


def test_what_no_processor_knows_our_own_reading_does(tmp_path: Path) -> None:
    """Transparency and 16 bits, read by what the export says."""
    generator = np.random.default_rng(1)
    clear = Image.fromarray(generator.integers(0, 256, (20, 30, 4), dtype=np.uint8), "RGBA")
    deep = Image.fromarray(generator.integers(0, 5000, (30, 20), dtype=np.uint16))
    (tmp_path / "in").mkdir()
    for name, image in (("clear", clear), ("deep", deep)):
        image.save(tmp_path / "in" / f"{name}.png")
    pack.pack(
        str(tmp_path / "in"), str(tmp_path / "out"), size=16, fit="pad", range="0,5000",
        unlabelled=True, split="train",
    )  # fmt: skip
    manifest = Manifest.load_split(str(tmp_path / "out"), "train")
    assert (fitting.of(manifest.image), manifest.span) == ("pad", (0.0, 5000.0))
    shape = Shape(16, 8, 16, 1, 2, 32, 16, 1, 2, 32)
    model = ViTMAE(shape)
    export_mae(
        tmp_path / "export", shape, model.encoder.state_dict(), model.decoder.state_dict(),
        IMAGENET_MEAN, IMAGENET_STD, {"image": manifest.image},
    )  # fmt: skip
    codec = load(str(tmp_path / "export")).codec
    reader, packed = Reader(manifest), Images(16)
    stored = [packed.decode(reader.record(i).input, "x") for i in range(2)]
    for path in (tmp_path / "in").iterdir():
        found = codec.decode(path.read_bytes(), path.name)
        assert any(np.array_equal(found, one) for one in stored), path.name


def test_the_fit_is_said_and_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in "ab":
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 10), (9 * i, 0, 0)).save(tmp_path / "in" / name / f"{i}.png")
    source, out = str(tmp_path / "in"), str(tmp_path / "out")
    pack.pack(source, out, size=8, fit="squash", split="train")
    assert "fit squash: of another ratio, squashed to it (--fit crop|pad)" in capfd.readouterr().err
    file = json.loads((tmp_path / "out" / "train" / "manifest.json").read_text())
    assert file["image"]["fit"] == "squash"
    with pytest.raises(UserError, match=r"--fit pad: .*train was packed with --fit squash"):
        pack.pack(source, out, size=8, fit="pad", split="val")
    pack.pack(source, str(tmp_path / "kept"), keep_original=True, fit="pad", split="train")
    kept = Manifest.load_split(str(tmp_path / "kept"), "train")
    assert fitting.of(kept.image) == "pad"  # for each reading
    pixels = Images(8, None, "pad").decode(Reader(kept).record(0).input, "x")
    assert pixels[:, 0, 0].tolist() == list(fitting.BORDER)
    (tmp_path / "t.jsonl").write_text('{"text": "a", "label": "x"}\n' * 3)
    with pytest.raises(UserError, match="--fit is for images, the source holds texts"):
        pack.pack(str(tmp_path / "t.jsonl"), str(tmp_path / "t"), fit="pad")


def test_a_line_of_one_pixel() -> None:
    thin = io.BytesIO()
    Image.new("RGB", (500, 1), (1, 2, 3)).save(thin, "PNG")
    for fit in fitting.FITS:
        assert images.decode(thin.getvalue(), 16, how=fit).shape == (3, 16, 16)
