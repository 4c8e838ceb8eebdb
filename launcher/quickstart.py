"""`make quickstart`, `make quickstart-text`: the main job on a small real set with few labels.

Packs the set, runs all three stages through the deepspeed launcher with plain fine-tuning and
further pre-training beside them, and prints the table. A second call continues or repeats it.
"""

import os
import shlex
import time
from pathlib import Path
from typing import Literal

from rich.console import Console

from selfdistill.data import cli
from selfdistill.data.shards.manifest import Manifest
from selfdistill.launcher import compare
from selfdistill.launcher import train as training
from selfdistill.launcher.examples import __main__ as example


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
    folder = Path(output or ("runs/quickstart" + ("-text" if kind == "text" else ""))).expanduser()
    console = Console()
    shards = folder / "shards"
    example.main(kind, str(shards))
    if ranks == 0:
        import torch

        # DeepSpeed's launcher takes all GPUs that are visible; told how many, it takes the first.
        ranks = 0 if torch.cuda.device_count() else min(2, len(os.sched_getaffinity(0)))
    words = [
        *(("--num_gpus", str(ranks)) if ranks else ()),
        *("--stage", "all", "--compare", "true"),
        *("--recipe", chosen.recipe, "--data", str(shards), "--output", str(folder / "run")),
    ]
    typed = shlex.join([*training.program().split(), "train", *words])
    console.print(f"$ {typed}", style="bold", highlight=False, soft_wrap=True)
    training.run(words)
    train, test = (Manifest.load_split(str(shards), s).samples for s in ("train", "test"))
    title = f"{chosen.title}, {train} labelled {kind.rstrip('s')}s to train on, {test} to test on"
    compare.show(folder / "run", title=title)
    console.print(f"whole quickstart: {time.monotonic() - began:.0f} s")
    training.say_next(folder / "run")


if __name__ == "__main__":
    cli.run(main)
