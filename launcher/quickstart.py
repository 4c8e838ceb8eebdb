"""`make quickstart`, `make quickstart-text`: the main job on a small real set with few labels.

Packs the set, runs all three stages through the deepspeed launcher with plain fine-tuning and
further pre-training beside them, and prints the table. A second call continues or repeats it.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

from rich.console import Console

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.launcher import compare
from selfdistill.launcher.examples import __main__ as example

ROOT = Path(__file__).resolve().parent.parent


def main(
    kind: Literal["images", "text"] = "images", output: str | None = None, ranks: int = 0
) -> None:
    """Runs the main job on a small real set and prints what came out.

    Args:
        kind: images (handwritten digits) or text (docstrings of installed packages).
        output: folder for shards and the run; by default runs/quickstart[-text].
        ranks: processes; 0 takes one a GPU, or without GPUs one a core, at most 2.
    """
    began = time.monotonic()
    chosen = example.EXAMPLES[kind]
    folder = Path(output or ("runs/quickstart" + ("-text" if kind == "text" else "")))
    console = Console()
    shards = folder / "shards"
    example.main(kind, str(shards))
    if ranks == 0:
        import torch

        ranks = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    command = [
        *(str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks)),
        *("engine/run.py", "--stage", "all", "--compare", "true", "--recipe", chosen.recipe),
        *("--data", str(shards.resolve()), "--output", str((folder / "run").resolve())),
    ]
    console.print("$ " + " ".join(["deepspeed", *command[1:]]), style="bold", highlight=False)
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        raise UserError(f"the run ended with exit code {done.returncode}: its message stands above")
    train, test = (Manifest.load_split(str(shards), s).samples for s in ("train", "test"))
    title = f"{chosen.title}, {train} labelled {kind.rstrip('s')}s to train on, {test} to test on"
    compare.show(folder / "run", title=title)
    console.print(f"whole quickstart: {time.monotonic() - began:.0f} s")
    console.print(f"TensorBoard: .venv/bin/tensorboard --logdir {folder / 'run'}", highlight=False)


if __name__ == "__main__":
    cli.run(main)
