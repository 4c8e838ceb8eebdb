"""`make quickstart`, `make quickstart-text`: the main job on a small real set with few labels.

Packs the set, runs all three stages through the deepspeed launcher with plain fine-tuning and
further pre-training beside them, and prints the table. A second call continues or repeats it.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from data import cli, pack
from data.errors import UserError
from data.manifest import Manifest
from launcher import compare, digits, docstrings

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Example:
    """A small real set.

    Attributes:
        title: of the table.
        recipe: of the run.
        pack: (a folder for raw files, the shards' folder) -> None.
    """

    title: str
    recipe: str
    pack: Callable[[Path, Path], None]


def _pack_digits(raw: Path, shards: Path) -> None:
    digits.write(raw)
    pack.pack(str(raw), str(shards), size=digits.SIZE, overwrite=True)


def _pack_docstrings(raw: Path, shards: Path) -> None:
    docstrings.write(raw / "labelled", raw / "unlabelled.txt")
    extra = str(raw / "unlabelled.txt")
    pack.pack(str(raw / "labelled"), str(shards), unlabelled=extra, overwrite=True)


EXAMPLES = {
    "images": Example("handwritten digits", "quickstart", _pack_digits),
    "text": Example("docstrings by their package", "quickstart_text", _pack_docstrings),
}


def main(
    kind: Literal["images", "text"] = "images", output: str | None = None, ranks: int = 0
) -> None:
    """Runs the main job on a small real set and prints what came out.

    Args:
        kind: images (handwritten digits) or text (docstrings of installed packages).
        output: folder for raw files, shards and the run; by default runs/quickstart[-text].
        ranks: processes; 0 takes one a GPU, or without GPUs one a core, at most 2.
    """
    began = time.monotonic()
    example = EXAMPLES[kind]
    folder = Path(output or ("runs/quickstart" + ("-text" if kind == "text" else "")))
    console = Console()
    shards = folder / "shards"
    if not (shards / "test" / "manifest.json").exists():
        example.pack(folder / kind, shards)
    if ranks == 0:
        import torch

        ranks = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    command = [
        *(str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)),
        *("engine/run.py", "--stage", "all", "--compare", "true", "--recipe", example.recipe),
        *("--data", str(shards.resolve()), "--output", str((folder / "run").resolve())),
    ]
    console.print("$ " + " ".join(["deepspeed", *command[1:]]), style="bold", highlight=False)
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise UserError(f"the run ended with exit code {done.returncode}: its message stands above")
    train, test = (Manifest.load_split(str(shards), s).samples for s in ("train", "test"))
    title = f"{example.title}, {train} labelled {kind} to train on, {test} to test on"
    compare.show(folder / "run", title=title)
    console.print(f"whole quickstart: {time.monotonic() - began:.0f} s")
    console.print(f"TensorBoard: .venv/bin/tensorboard --logdir {folder / 'run'}", highlight=False)


if __name__ == "__main__":
    cli.run(main)
