"""The loader with 8 and 14 processes, on PNGs as packed and on JPEGs as they came; a real run."""

import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.gpu.say import failed, say
from selfdistill.data import cli, pack
from selfdistill.data.loading.loader import Loader
from selfdistill.data.shards.manifest import Manifest


def pictures(folder: Path, number: int, width: int, height: int) -> None:
    """JPEGs of two classes: smooth colours with a little noise, about as large as photographs."""
    generator = np.random.default_rng(0)
    for i in range(number):
        small = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth, np.int16) + generator.integers(
            -6, 7, (height, width, 3), dtype=np.int8
        )
        out = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
        place = folder / f"class{i % 2}" / f"{i:05d}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(out.getvalue())


def rate(shards: Path, side: int, batch: int, workers: int, seconds: float) -> list[float]:
    """Images a second of four rounds, after the queues are full."""
    from selfdistill.data.loading.codec import Images

    split = Manifest.load_split(str(shards), "train")
    loader = Loader(split, batch=batch, workers=workers, codec=Images(side))
    stream = iter(loader)
    for _ in itertools.islice(stream, 4 * workers + 4):
        pass
    found = []
    for _ in range(4):
        images, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds / 4:
            images += len(next(stream)["labels"])
        found.append(images / (time.perf_counter() - began))
    loader.close()
    return found


def main(tiny: bool = False) -> None:
    """Measures.

    Args:
        tiny: few and small images, few processes.
    """
    side, batch, number, seconds = (32, 8, 40, 0.4) if tiny else (224, 256, 1000, 2.0)
    counts = (1, 2) if tiny else (8, 14)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures(folder / "raw", number, *((64, 48) if tiny else (512, 384)))
        kinds: dict[str, dict[str, Any]] = {
            "PNGs": {"size": side},
            "JPEG originals": {"keep_original": True},
        }
        for kind, options in kinds.items():
            shards = folder / kind.split()[0]
            pack.pack(str(folder / "raw"), str(shards), splits="0.9,0.05,0.05", **options)
            for workers in counts:
                title = f"{kind}, {workers} processes"
                try:
                    found = rate(shards, side, batch, workers, seconds)
                    say(title, "images/s", found, **{"a core": found[0] / workers})
                except Exception as error:  # of any library: the others are timed all the same
                    failed(title, error)
        _run(folder, side, tiny)


def _run(folder: Path, side: int, tiny: bool) -> None:
    """Further pre-training by the command line: what its own figures say of the wait for data."""
    shape = {"image_size": side, "patch_size": 16 if not tiny else 8}
    shape |= {} if tiny else {"width": 768, "depth": 12, "heads": 12}
    shape |= {} if tiny else {"decoder_width": 512, "decoder_depth": 8, "decoder_heads": 16}
    options: dict[str, Any] = {
        "stage": "pretrain",
        "data": folder / "PNGs",
        "model": "scratch",
        "output": folder / "run",
        **{f"model.shape.{k}": v for k, v in shape.items()},
        "pretrain.batch": 8 if tiny else 256,
        "pretrain.steps": 6 if tiny else 40,
        "log_every": 2 if tiny else 10,
        "save_every": 0,
        "picture_every": 0,
    }
    words = [w for k, v in options.items() for w in (f"--{k}", str(v))]
    done = subprocess.run(
        [sys.executable, "engine/run.py", *words],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ,
    )
    print(done.stdout[-4000:])
    file = folder / "run" / "pretrain" / "metrics.jsonl"
    if done.returncode or not file.exists():
        failed("a run", RuntimeError(f"exit code {done.returncode}: {done.stdout[-200:]}"))
        return
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for key, unit in (
        ("speed/data_wait_percent", "%"),
        ("speed/images_per_second", "images/s"),
        ("speed/mfu_percent", "%"),
    ):
        values = [line[key] for line in lines[1:] if key in line]
        if values:
            say(f"a run: {key}", unit, values)


if __name__ == "__main__":
    cli.run(main)
