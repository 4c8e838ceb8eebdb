"""torchvision's augmentation and mixtures of neighbours, keyed by position."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import beta, kstest
from torch.nn import functional as F
from torchvision.transforms import v2

from selfdistill.data import pack
from selfdistill.data.loading.loader import Loader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.models.images.networks import mix
from selfdistill.engine.training.objectives import ClassLoss, swapped
from selfdistill.engine.training.views import Augment, Flips, Mixes, Together
from tests.kit.launches import make_images

ALL = Together((Augment(0, "strong"), Flips(0), Mixes(0, 0.3, 1.0)))


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    root = tmp_path_factory.mktemp("augment")
    make_images(root / "images")
    pack.pack(str(root / "images"), str(root / "shards"))
    return Manifest.load_split(str(root / "shards"), "train")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_on_any_number_of_ranks(train: Manifest, workers: int) -> None:
    def steps(rank: int, world: int, start: int = 0) -> list[dict[str, torch.Tensor]]:
        loader = Loader(
            *(train,), batch=8, rank=rank, world=world, keyed=ALL, workers=workers, start_step=start
        )
        found = [batch for batch, _ in zip(loader, range(3 - start), strict=False)]
        loader.close()
        return found

    whole, parts, late = steps(0, 1), [steps(rank, 2) for rank in (0, 1)], steps(0, 1, start=2)
    for name in ("images", "flip", "share", "blend", "box", "labels"):
        for one, *others in zip(whole, *parts, strict=True):
            assert torch.equal(one[name], torch.cat([other[name] for other in others])), name
        assert torch.equal(whole[2][name], late[0][name])  # entered where it was left


@pytest.mark.parametrize("kind", ["light", "strong"])
def test_a_picture_is_torchvisions_of_its_position(kind: Any) -> None:
    made = Augment(3, kind)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 24, 36), dtype=torch.uint8, generator=generator)
    torch.manual_seed(5)
    before, state = images.clone(), torch.default_generator.get_state()
    found = made(np.arange(6), {"images": images})["images"]
    assert torch.equal(images, before)
    assert torch.equal(torch.default_generator.get_state(), state)  # dropout's draws are its own
    assert found.shape == images.shape
    assert found.dtype == np.uint8
    alone = made(np.array([4]), {"images": images[4:5]})["images"][0]
    assert np.array_equal(alone, found[4])
    assert not any(
        np.array_equal(one, image) for one, image in zip(found, images.numpy(), strict=True)
    )
    assert not np.array_equal(Augment(4, kind)(np.arange(6), {"images": images})["images"], found)
    # Which transforms there are, and in which order, is told by a loop over torchvision's own.
    crop = v2.RandomResizedCrop(
        (24, 36),
        (0.5, 1.0) if kind == "light" else (0.25, 1.0),
        (3 / 4 * 1.5, 4 / 3 * 1.5),
        v2.InterpolationMode.BICUBIC,
    )
    more = (
        [v2.ColorJitter(0.3, 0.3, 0.3)]
        if kind == "light"
        else [v2.TrivialAugmentWide(), v2.RandomErasing(p=0.25)]
    )
    from selfdistill.data import rng

    for position in range(6):
        torch.manual_seed(int(rng.bits(3, "augment", position).random_raw()) >> 1)
        picture = images[position]
        for step in (crop, *more):
            picture = step(picture)
        assert np.array_equal(picture.numpy(), found[position])


def test_shares_are_distributed_as_their_papers_say() -> None:
    positions, images = np.arange(4000), {"images": torch.zeros(1, 3, 32, 48, dtype=torch.uint8)}
    mixed = Mixes(0, 0.4, 0.0)(positions, images)
    assert kstest(mixed["share"], beta(0.4, 0.4).cdf).pvalue > 1e-3
    assert np.array_equal(mixed["share"], mixed["blend"])
    assert not mixed["box"].any()
    cut = Mixes(0, 0.0, 1.0)(positions, images)
    assert (cut["blend"] == 1).all()
    top, left, bottom, right = cut["box"].T
    assert ((top >= 0) & (left >= 0) & (bottom <= 32) & (right <= 48)).all()
    area = (bottom - top) * (right - left) / (32 * 48)
    assert np.allclose(cut["share"], 1 - area, atol=1e-6)
    # The box that is not cut at an edge has the share that was drawn: uniform for alpha 1.
    theirs = v2.CutMix(alpha=1.0, num_classes=2)
    torch.manual_seed(0)
    labels = torch.tensor([0, 1])
    drawn = [float(theirs(torch.zeros(2, 3, 32, 48), labels)[1][0, 0]) for _ in range(800)]
    assert kstest(cut["share"], drawn).pvalue > 1e-3
    both = Mixes(0, 0.4, 1.0)(positions, images)
    assert (both["blend"] == 1).mean() == pytest.approx(0.5, abs=0.03)


def test_neighbours_are_mixed_and_no_others() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 8, 8, generator=generator)
    blend, box = torch.tensor([0.25, 1.0, 1.0, 0.5]), torch.zeros(4, 4, dtype=torch.int64)
    box[1] = torch.tensor([2, 3, 6, 8])
    found = mix(images, blend, box)
    assert torch.allclose(found[0], 0.25 * images[0] + 0.75 * images[1])
    assert torch.equal(found[2], images[2])
    assert torch.allclose(found[3], 0.5 * (images[3] + images[2]))
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 3:8] = True
    assert torch.equal(found[1][:, inside], images[0][:, inside])
    assert torch.equal(found[1][:, ~inside], images[1][:, ~inside])
    assert mix(images, None, None) is images
    assert swapped(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_the_loss_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    labels = torch.tensor([0, 3, 1, 1, 2, 0])
    weights = torch.tensor([1.0, 2.5, 4.0, 1.5])
    share = torch.rand(6, generator=generator)
    assert torch.equal(ClassLoss()(logits, labels), F.cross_entropy(logits, labels))
    weighted = ClassLoss(weights, 0.2)
    expected = F.cross_entropy(logits, labels, weights, label_smoothing=0.2)
    assert weighted(logits, labels) == pytest.approx(float(expected), rel=1e-6)
    units = weighted.units(labels)
    assert units == pytest.approx(float(weights[labels].sum()))
    assert weighted(logits, labels, None, torch.tensor(1 / units)) == pytest.approx(
        float(expected), rel=1e-6
    )
    whole = F.one_hot(labels, 4).float()
    soft = share[:, None] * whole + (1 - share[:, None]) * swapped(whole)
    expected = F.cross_entropy(logits, soft, label_smoothing=0.1)
    assert ClassLoss(None, 0.1)(logits, labels, share) == pytest.approx(float(expected), rel=1e-6)
    several = whole.bool() | swapped(whole).bool()
    expected = F.binary_cross_entropy_with_logits(logits, several.float())
    assert ClassLoss()(logits, several) == pytest.approx(float(expected), rel=1e-6)
    targets = several.float()
    other = targets[[1, 0, 3, 2, 5, 4]]
    targets = share[:, None] * targets + (1 - share[:, None]) * other
    expected = F.binary_cross_entropy_with_logits(logits, targets)
    assert ClassLoss()(logits, several, share) == pytest.approx(float(expected), rel=1e-6)
    halved = weighted.half()
    assert halved.weights is not None
    assert halved.weights.dtype == torch.float32


def test_where_the_pictures_lie(tmp_path: Path) -> None:
    """One look at what is made: a red square stays red under light, and fills its picture."""
    square = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    square[:, 0] = 200
    found = Augment(0, "light")(np.arange(1), {"images": square})["images"][0]
    assert (found[0] > 100).all()
    assert (found[1:] < 60).all()
