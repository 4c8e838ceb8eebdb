"""Tiny data sets made on the fly; each picture carries its own number in its pixels."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from selfdistill.data.packing.shard import index_tars
from selfdistill.data.shards import manifest
from selfdistill.data.shards.manifest import Manifest

CLASSES = ["ant", "bee", "cow"]


def numbered(number: int, size: int = 4) -> Image.Image:
    """A flat picture: red and green are the number's bytes, blue is 77."""
    return Image.new("RGB", (size, size), (number % 256, number // 256, 77))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def number_of(picture: np.ndarray) -> int:
    """The number in a picture uint8 [3, H, W]."""
    assert (picture[2] == 77).all()
    return int(picture[0, 0, 0]) + 256 * int(picture[1, 0, 0])


def uneven(folder: Path, counts: Sequence[int], *, size: int = 4, labels: bool = True) -> Manifest:
    """A split of shards with these sample counts; sample i has number i and label i % 3."""
    folder.mkdir(parents=True, exist_ok=True)
    names, number = [], 0
    for shard, count in enumerate(counts):
        names.append(f"t-{shard:06d}.tar")
        with tarfile.open(folder / names[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(count):
                parts = [("png", png(numbered(number, size)))]
                if labels:
                    parts.insert(0, ("cls", str(number % 3).encode()))
                for extension, content in parts:
                    info = tarfile.TarInfo(f"k{number:05d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
                number += 1
    shards, members = index_tars(folder, names)
    manifest.write(
        folder,
        split="train",
        classes=CLASSES if labels else [],
        class_counts=[len(range(i, number, 3)) for i in range(3)] if labels else [],
        shards=shards,
        members=members,
        image={"size": size},
    )
    return Manifest.load(str(folder))


def class_folders(root: Path, counts: dict[str, int], size: int = 4, start: int = 0) -> int:
    """root/CLASS/*.png with numbers from `start` on; returns the next number."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"p{i}.png").write_bytes(png(numbered(start, size)))
            start += 1
    return start
