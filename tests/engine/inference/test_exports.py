"""Exports of classifiers: the model at work says what the one that was trained did."""

from pathlib import Path

import numpy as np
import pytest
import torch

from selfdistill.data.formats.images import Size, sides
from selfdistill.engine.checkpoints.export import export_classifier
from selfdistill.engine.inference.model import load
from selfdistill.engine.models.images.networks import ImageClassifier, Normalize
from selfdistill.engine.models.images.vit_mae import ViTClassifier
from selfdistill.engine.models.images.weights import load_pretrained
from tests.engine.models.test_types import MAKE, MEAN, STD, made, ours
from tests.kit import models as kit


@pytest.mark.parametrize("size", [32, (32, 48)])
@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("name", MAKE)
@torch.no_grad()
def test_logits_of_images(tmp_path: Path, name: str, pool: str, size: Size) -> None:
    """Of every type, shape and way to pool; and it is a whole encoder to train from."""
    made(tmp_path / "in", name)
    base = load_pretrained(str(tmp_path / "in"), size)
    network = ViTClassifier(ours(base), 3, pool=pool).eval()
    kit.randomise(network.head)
    head, classes = network.head.state_dict(), ["a", "b", "c"]
    out = tmp_path / "out"
    export_classifier(out, base.shape, base.encoder, head, classes, pool, MEAN, STD)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, *sides(size)), np.uint8)
    batch = {"images": torch.from_numpy(pixels)}
    wanted = ImageClassifier(network, Normalize(MEAN, STD)).classify(**batch)
    found = load(out)
    assert (found.classes, found.pool) == (classes, pool)
    answer = found.forward(batch)
    torch.testing.assert_close(answer["logits"], wanted, rtol=1e-4, atol=1e-5)
    again = load_pretrained(str(out))
    assert again.shape == base.shape
    summary = ours(base)(Normalize(MEAN, STD)(batch["images"]))[:, 0]
    torch.testing.assert_close(found.encode(batch, "cls"), summary, rtol=1e-4, atol=1e-4)
