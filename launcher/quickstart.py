"""`make quickstart`: the main job on scikit-learn's handwritten digits, few of them labelled.

Packs the images, runs all three stages through the deepspeed launcher with plain fine-tuning and
further pre-training beside them, and prints the table. A second call continues or repeats it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from data import cli, pack
from data.errors import UserError
from launcher import compare

ROOT = Path(__file__).resolve().parent.parent

#: Images of the train split for each digit; 10 more for val; the rest is the test split.
LABELLED, VALIDATION = 20, 10


def write_digits(folder: Path, seed: int = 0) -> None:
    """Writes the 1,797 digits (8x8 grey, UCI's handwritten digits) as class folders of PNGs.

    Args:
        folder: gets {train,val,test}/DIGIT/NUMBER.png.
        seed: of the draw of labelled images.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    for digit in range(10):
        numbers = [i for i in order if digits.target[i] == digit]
        parts = {
            "train": numbers[:LABELLED],
            "val": numbers[LABELLED : LABELLED + VALIDATION],
            "test": numbers[LABELLED + VALIDATION :],
        }
        for split, chosen in parts.items():
            target = folder / split / str(digit)
            target.mkdir(parents=True, exist_ok=True)
            for i in chosen:
                pixels = np.uint8(np.rint(digits.images[i] * (255 / 16)))
                Image.fromarray(pixels).save(target / f"{i:04d}.png")


def main(output: str = "runs/quickstart", ranks: int = 0) -> None:
    """Runs the main job on a small real set and prints what came out.

    Args:
        output: folder for images, shards and the run.
        ranks: processes; 0 takes one a GPU, or without GPUs one a core, at most 2.
    """
    began = time.monotonic()
    folder = Path(output)
    console = Console()
    shards = folder / "shards"
    if not (shards / "test" / "manifest.json").exists():
        write_digits(folder / "images")
        pack.pack(str(folder / "images"), str(shards), size=QUICK_SIZE, overwrite=True)
    if ranks == 0:
        import torch

        ranks = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    command = [
        *(str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)),
        *("engine/run.py", "--stage", "all", "--compare", "true", "--recipe", "quickstart"),
        *("--data", str(shards.resolve()), "--output", str((folder / "run").resolve())),
    ]
    console.print("$ " + " ".join(["deepspeed", *command[1:]]), style="bold", highlight=False)
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise UserError(f"the run ended with exit code {done.returncode}: its message stands above")
    train, test = 10 * LABELLED, 1797 - 10 * (LABELLED + VALIDATION)
    compare.show(
        folder / "run", title=f"handwritten digits, {train} training images, {test} test images"
    )
    console.print(f"whole quickstart: {time.monotonic() - began:.0f} s")
    console.print(f"TensorBoard: .venv/bin/tensorboard --logdir {folder / 'run'}", highlight=False)


#: Side to which the 8x8 digits are enlarged.
QUICK_SIZE = 32

if __name__ == "__main__":
    cli.run(main)
