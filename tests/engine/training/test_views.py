"""Random crops against torchvision's and Pillow's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop

from selfdistill.data import pack
from selfdistill.data.formats.images import Size, sides
from selfdistill.data.loading.codec import Images
from selfdistill.data.loading.loader import Loader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.config.options import load
from selfdistill.engine.training.views import Crops, Flips, Together
from tests.kit.launches import make_images


@pytest.mark.parametrize("size", [64, (64, 160), (90, 40)])
@pytest.mark.parametrize(("smallest", "largest"), [(0.08, 1.0), (0.9, 1.0), (0.5, 0.5)])
def test_boxes_are_distributed_as_torchvisions(smallest: float, largest: float, size: Size) -> None:
    """Of rectangles as torchvision's about the image's own ratio."""
    torch.manual_seed(0)
    high, wide = sides(size)
    image, number = torch.zeros(3, high, wide), 4000
    scale, ratio = [smallest, largest], [3 / 4 * wide / high, 4 / 3 * wide / high]
    theirs = np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(number)])
    ours = Crops(0, smallest, largest).boxes(np.arange(number), size)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (high, wide)).all()
    found = [np.c_[b, b[:, 2] * b[:, 3], b[:, 0] + b[:, 2]] for b in (ours, theirs)]
    for one, other in zip(*(f.T for f in found), strict=True):
        assert ks_2samp(one, other).pvalue > 1e-3


def test_a_box_that_never_fits_is_the_whole_image() -> None:
    side = 1  # a sixteenth of a pixel
    assert Crops(0, 0.06, 0.0625).boxes(np.arange(5), side).tolist() == [[0, 0, 1, 1]] * 5


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_crops_are_torchvisions_and_pillows(size: tuple[int, int]) -> None:
    crops, positions = Crops(3, 0.08, 1.0), np.arange(100, 108)
    generator = torch.Generator().manual_seed(0)
    shape = (8, 3, size[0] // 4, size[1] // 4)
    coarse = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    images = torch.nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")
    before = images.clone()
    found = crops(positions, {"images": images})["images"]
    assert torch.equal(images, before)
    assert found.dtype == np.uint8
    for image, box, one in zip(images, crops.boxes(positions, size).tolist(), found, strict=True):
        top, left, height, width = box
        theirs = resized_crop(image, *box, list(size), InterpolationMode.BICUBIC, antialias=True)
        assert np.array_equal(one, theirs.numpy())
        area = (left, top, left + width, top + height)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).crop(area)
        resized = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.int64)
        most = 1 if size[0] == size[1] else 2  # levels of 255: of two passes each is rounded
        assert np.abs(one.transpose(1, 2, 0) - resized).max() <= most


def test_a_crop_is_that_of_its_position() -> None:
    crops, images = Crops(0, 0.2, 0.8), torch.arange(3 * 256).view(1, 3, 16, 16) % 256
    images = images.to(torch.uint8).expand(6, -1, -1, -1)
    every = crops(np.arange(6), {"images": images})["images"]
    assert np.array_equal(crops(np.arange(4, 6), {"images": images[:2]})["images"], every[4:])
    assert len({one.tobytes() for one in every}) == 6
    other = Crops(1, 0.2, 0.8)(np.arange(6), {"images": images})["images"]
    assert not np.array_equal(every, other)


def test_what_a_crop_may_be() -> None:
    assert load({"finetune.crop": (0.08, 1)}).finetune.crop == (0.08, 1.0)
    for wrong in ((0, 1), (0.5, 0.1), (0.5, 1.5)):
        with pytest.raises(Exception, match="the smallest and the largest share"):
            load({"finetune.crop": wrong})


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_carry_crops(workers: int, tmp_path: Path) -> None:
    """Also where a worker has laid the images in memory that it shares."""
    make_images(tmp_path / "images", size=32)
    pack.pack(str(tmp_path / "images"), str(tmp_path / "shards"))
    manifest = Manifest.load_split(str(tmp_path / "shards"), "train")
    crops, options = Crops(5, 0.1, 0.9), {"batch": 4, "seed": 0, "codec": Images(32)}
    whole = Loader(manifest, **options, workers=0)
    cropped = Loader(manifest, **options, workers=workers, keyed=Together((crops, Flips(0))))
    try:
        for before, after, _ in zip(whole, cropped, range(6), strict=False):
            assert torch.equal(before["ids"], after["ids"])
            expected = crops(before["positions"].numpy(), {"images": before["images"]})["images"]
            assert np.array_equal(after["images"].numpy(), expected)
            assert not torch.equal(after["images"], before["images"])
    finally:
        whole.close()
        cropped.close()
