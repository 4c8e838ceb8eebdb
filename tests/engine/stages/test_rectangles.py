"""Every stage on two ranks with images that are no squares; what it leaves, in its own library."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from selfdistill.data import pack
from selfdistill.data.formats.images import fit
from selfdistill.engine.models.images.vit_mae import ViTEncoder
from selfdistill.engine.models.images.weights import load_pretrained
from tests.engine.models.test_exported import check
from tests.engine.models.test_types import made
from tests.kit.launches import make_base, metrics, read_events, run_cases

pytestmark = pytest.mark.multi

SIZE = (16, 24)
#: Heights and widths before packing; one is of the packed ratio, one of the packed size.
SIZES = [(40, 40), (21, 16), (16, 33), (32, 48), (16, 24), (97, 31)]
CLASSES = ("blue", "green", "red")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT-MAE, which transformers has for such images, and a DINOv2, which is timm's alone."""
    root = tmp_path_factory.mktemp("rectangles")
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 12)):
        for label, name in enumerate(CLASSES):
            (root / "pictures" / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = SIZES[(i + label) % len(SIZES)]
                pixels = generator.integers(0, 200, (height, width, 3), dtype=np.uint8)
                pixels[: height // 2, :, label] += 55
                Image.fromarray(pixels).save(root / "pictures" / split / name / f"{i}.png")
    pack.pack(str(root / "pictures"), str(root / "shards"), size=SIZE)
    make_base(root / "vit")
    made(root / "dinov2", "dinov2")
    shared = {
        "stage": "all",
        "data": str(root / "shards"),
        "model.image_size": "16x24",
        "finetune.crop": [0.5, 1.0],
        "finetune.steps": 40,
        "finetune.lr": 5e-3,
        "finetune.seeds": 1,
        "picture_every": 5,
        "decoder.steps": 3,
        "decoder.batch": 8,
        "decoder.width": 32,
        "decoder.depth": 2,
    }
    cases = [
        shared | {"model": str(root / name), "output": str(root / f"run-{name}"), "zero": zero}
        for name, zero in (("vit", "zero1"), ("dinov2", "zero3"))
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFDISTILL_DECODERS", str(root / "shelf"))
        run_cases(root / "cases", cases)
    return root


def opened(root: Path) -> tuple[list[Image.Image], list[int]]:
    paths = sorted((root / "pictures" / "test").rglob("*.png"))
    labels = [CLASSES.index(path.parent.name) for path in paths]
    return [Image.open(path).convert("RGB") for path in paths], labels


def scores(run: Path) -> dict[str, float]:
    metrics = json.loads((run / "finetune" / "result.json").read_text())["metrics"]
    return {k: v for k, v in metrics.items() if k.startswith("test_")}


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@torch.no_grad()
def test_the_classifier_in_timm(root: Path, name: str) -> None:
    """From raw pictures: timm's own transform fits them to the pixel as packing does."""
    folder = root / f"run-{name}" / "finetune" / "export" / "timm"
    told = json.loads((folder / "config.json").read_text())
    norm = functools.partial(torch.nn.LayerNorm, eps=told["norm_eps"])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, norm_layer=norm).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, labels = opened(root)
    check(scores(root / f"run-{name}"), model(torch.stack([*map(transform, images)])), labels)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@torch.no_grad()
def test_the_classifier_in_transformers(root: Path, name: str) -> None:
    """From raw pictures: its processor cuts where packing does; DINOv2's class knows squares."""
    folder = root / f"run-{name}" / "finetune" / "export"
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    wrapped = type(model).__name__ == "TimmWrapperForImageClassification"
    assert wrapped == (name == "dinov2")
    process = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images, labels = opened(root)
    batch = process(images, return_tensors="pt")
    assert batch["pixel_values"].shape[2:] == SIZE
    check(scores(root / f"run-{name}"), model(**batch).logits, labels)
    fitted = process([fit(image, SIZE) for image in images], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], fitted["pixel_values"])


@torch.no_grad()
def test_the_first_stages(root: Path) -> None:
    """Their exports are read again, encoder and decoder, and show what the loss fell on."""
    for name, stage in (("vit", "pretrain"), ("vit", "distill-1"), ("dinov2", "distill-1")):
        folder = root / f"run-{name}" / stage
        found = load_pretrained(str(folder / "export"))
        assert found.shape.image_size == SIZE
        assert found.decoder is not None
        assert found.decoder["pos_embed"].shape[1] == 1 + 4 * 6
        assert all(np.isfinite(line["loss/mae"]) for line in metrics(folder))
        page = read_events(folder).images["reconstruction"][-1][1]
        assert page.shape[0] == 3 * (16 * 5 + 2) + 2  # 128 // 24 times
        if name == "vit":
            encoder = ViTEncoder(found.shape)
            encoder.load_state_dict(found.encoder)
            images = torch.randn(2, 3, *SIZE)
            theirs = AutoModel.from_pretrained(folder / "export").eval()(images)
            ours = encoder.eval()(images)
            assert torch.allclose(theirs.last_hidden_state, ours, atol=2e-5)
