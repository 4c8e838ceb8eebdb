"""What `benchmarks.loader` compares: one set of images, and every way to have it in batches.

All take the same encoded bytes, in the same number of processes, and give uint8 [b, 3, H, W] and
labels int64 [b].
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import PILToTensor

from selfdistill.data import pack
from selfdistill.data.formats.images import decode
from selfdistill.data.loading.loader import Loader
from selfdistill.data.loading.reader import Reader
from selfdistill.data.packing.encoding import ImageModality
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.samples import Sample

Stored = Literal["png", "jpeg", "webp"]
Batches = Generator[tuple[torch.Tensor, torch.Tensor], None, None]

BATCH = 64
CLASSES = 10
#: Batches that a worker of every contestant makes ahead; torch's own is 2.
AHEAD = 4
EPOCHS = 10**6  # as good as endless

LIMIT = "decode limit (in memory, Pillow only)"
OWN = "decode limit (in memory, decoded as ours)"
LIMITS = (LIMIT, OWN)
CARRIED = "decode limit through torch's DataLoader"
OURS = "ours (data.loader.Loader)"
WEBDATASET = "webdataset"
FOLDER = "torchvision ImageFolder"


@dataclass
class Pictures:
    """One set of images in every form.

    Attributes:
        manifest: Of the packed shards.
        shards: The tars' paths.
        folder: Holds class folders, in them the stored files as they are in the shards.
        encoded: Bytes of each image, by id.
        labels: Of each image, by id.
        extension: Of the stored files.
    """

    manifest: Manifest
    shards: list[str]
    folder: Path
    encoded: list[bytes]
    labels: list[int]
    extension: str


def picture(number: int, size: int) -> Image.Image:
    """A picture as smooth as a photograph, with a camera's noise; each number has its own."""
    random = np.random.default_rng([7, number])
    field = random.standard_normal((size, size, 3), dtype=np.float32) * 3
    for cells, weight in ((2, 0.6), (5, 0.3), (12, 0.1)):
        coarse = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        field += weight * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    return Image.fromarray(field.clip(0, 255).astype(np.uint8))


def file_of(number: int, size: int, stored: Stored) -> bytes:
    """A picture as a user's file."""
    out = io.BytesIO()
    if stored == "png":
        picture(number, size).save(out, "ppm")  # data.pack makes a PNG of it
    else:
        picture(number, size).save(out, stored, quality=90)
    return out.getvalue()


def make(
    folder: Path, images: int, size: int, stored: Stored, workers: int, progress: Progress
) -> Pictures:
    """Draws images, packs them, and lays the packed bytes out in class folders.

    Args:
        folder: For all files.
        images: How many.
        size: Their side in pixels.
        stored: What they are stored as: "png" is what data.pack makes of any file by default, the
            others are kept as they are (--keep_original).
        workers: Each must have a shard, or webdataset cannot share them out.
        progress: Where to show how far it is.

    Returns:
        The set.
    """
    pack.write_split(
        [
            Sample(f"{n:07d}", functools.partial(file_of, n, size, stored), n % CLASSES)
            for n in range(images)
        ],
        [f"class{label}" for label in range(CLASSES)],
        folder / "shards",
        kind=ImageModality(size) if stored == "png" else ImageModality(None, keep_original=True),
        samples_per_shard=min(1000, images // (2 * max(1, workers))),
        progress=progress,
    )
    manifest = Manifest.load(str(folder / "shards" / "train"))
    reader = Reader(manifest)
    records = reader.read(np.arange(images))
    reader.close()
    extension = "jpg" if stored == "jpeg" else stored
    for number, record in enumerate(records):
        place = folder / "folders" / manifest.classes[record.label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:07d}.{extension}").write_bytes(record.input)
    return Pictures(
        manifest,
        [manifest.shard_place(shard) for shard in range(len(manifest.shards))],
        folder / "folders",
        [record.input for record in records],
        [record.label for record in records],
        extension,
    )


def decoded(contents: Sequence[bytes]) -> NDArray[np.uint8]:
    """Images uint8 [b, 3, H, W] by Pillow alone: no checks, no lookup."""
    arrays = [np.asarray(Image.open(io.BytesIO(content))) for content in contents]
    out = np.empty((len(arrays), 3, *arrays[0].shape[:2]), np.uint8)
    for row, array in zip(out, arrays, strict=True):
        row[:] = array.transpose(2, 0, 1)
    return out


class InMemory(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Whole batches of the encoded bytes in memory, by an array of ids."""

    def __init__(self, pictures: Pictures) -> None:
        self.encoded, self.labels = pictures.encoded, torch.tensor(pictures.labels)

    def __getitem__(self, ids: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        images = decoded([self.encoded[i] for i in ids.tolist()])
        return torch.from_numpy(images), self.labels[torch.from_numpy(ids)]


class Shuffled:
    """Arrays of ids, every epoch another permutation cut into batches."""

    def __init__(self, images: int, epochs: int) -> None:
        self.images, self.epochs = images, epochs

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for epoch in range(self.epochs):
            ids = np.random.default_rng(epoch).permutation(self.images)
            yield from (ids[at : at + BATCH] for at in range(0, self.images, BATCH))


def _ended(batches: Iterable[Any]) -> Batches:
    """The batches; the workers have ended when the generator is closed."""
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        del iterator  # torch ends the workers when nobody holds the iterator


def _torch(workers: int, dataset: Any, **options: Any) -> Batches:
    return _ended(
        DataLoader(
            dataset, num_workers=workers, prefetch_factor=AHEAD if workers else None, **options
        )
    )


def limit(pictures: Pictures, workers: int, epochs: int) -> Batches:
    """The decode limit in this process, whatever the number of workers; see `loader.limit_rate`."""
    dataset = InMemory(pictures)
    yield from (dataset[ids] for ids in Shuffled(len(pictures.encoded), epochs))


def own_limit(pictures: Pictures, workers: int, epochs: int) -> Batches:
    """As `limit`, decoded and checked as `data.formats.images` does it."""
    labels = torch.tensor(pictures.labels)
    for ids in Shuffled(len(pictures.encoded), epochs):
        arrays = [decode(pictures.encoded[i], None) for i in ids.tolist()]
        out = np.empty((len(arrays), *arrays[0].shape), np.uint8)
        for row, array in zip(out, arrays, strict=True):
            row[:] = array
        yield torch.from_numpy(out), labels[torch.from_numpy(ids)]


def carried(pictures: Pictures, workers: int, epochs: int) -> Batches:
    """The decode limit, its batches handed over as torch hands them over."""
    ids = Shuffled(len(pictures.encoded), epochs)
    return _torch(workers, InMemory(pictures), sampler=ids, batch_size=None)


def ours(pictures: Pictures, workers: int, epochs: int) -> Batches:
    """The project's loader, cut where the epochs end."""
    left = len(pictures.encoded) * epochs
    loader = Loader(pictures.manifest, batch=BATCH, workers=workers, require_labels=True)
    batches = iter(loader)
    try:
        while left > 0:
            batch = next(batches)
            yield batch["images"][:left], batch["labels"][:left]
            left -= BATCH
    finally:
        loader.close()


def through_webdataset(pictures: Pictures, workers: int, epochs: int) -> Batches:
    """Webdataset's pipeline as its documentation has it, on the same shards."""
    extension = pictures.extension
    dataset = (
        webdataset.WebDataset(pictures.shards, shardshuffle=100, seed=0)
        .shuffle(1000)
        .decode(webdataset.imagehandler("torchrgb8", [extension]))
        .to_tuple(extension, "cls")
        .batched(BATCH)
        .repeat(epochs)
    )
    return _torch(workers, dataset, batch_size=None)


def through_folder(pictures: Pictures, workers: int, epochs: int) -> Batches:
    """Torchvision's class folders, each file opened by itself."""
    dataset = ImageFolder(str(pictures.folder), transform=PILToTensor())
    sampler = RandomSampler(dataset, num_samples=len(dataset) * epochs)
    return _torch(workers, dataset, sampler=sampler, batch_size=BATCH)


CONTESTANTS: dict[str, Callable[[Pictures, int, int], Batches]] = {
    LIMIT: limit,
    OWN: own_limit,
    CARRIED: carried,
    OURS: ours,
    WEBDATASET: through_webdataset,
    FOLDER: through_folder,
}


def _digest(pixels: NDArray[np.uint8]) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(pixels).tobytes(), digest_size=16).digest()


def check(pictures: Pictures, name: str, batches: Batches) -> None:
    """Compares one epoch of a contestant with the stored bytes, decoded one by one.

    Args:
        pictures: What it should give.
        name: The contestant's.
        batches: One epoch of it.

    Raises:
        RuntimeError: An image is missing, comes twice, or has other pixels or another label.
    """
    wanted: Counter[tuple[int, bytes]] = Counter()
    for content, label in zip(pictures.encoded, pictures.labels, strict=True):
        alone = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        wanted[label, _digest(alone.transpose(2, 0, 1))] += 1
    got: Counter[tuple[int, bytes]] = Counter()
    for images, labels in batches:
        got.update(
            (int(label), _digest(image.numpy()))
            for image, label in zip(images, labels, strict=True)
        )
    if got != wanted:
        raise RuntimeError(
            f"{name}: of {wanted.total()} images {(wanted - got).total()} are missing,"
            f" {(got - wanted).total()} are too many or others"
        )
