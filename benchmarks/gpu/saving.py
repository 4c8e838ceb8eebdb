"""A checkpoint of ViT-B/16's auto-encoder, written with the steps waiting or not, and read."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import ours
from benchmarks.contestant import LR
from benchmarks.gpu.say import say
from benchmarks.sizes import batches
from selfdistill.data import cli
from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.checkpoints.checkpoint import Checkpoints, Reader
from selfdistill.engine.checkpoints.state import State
from selfdistill.engine.runtime import distributed


def seconds(*actions: Callable[[], Any]) -> list[float]:
    """How long each action takes, its work on the device too."""
    found = []
    for action in actions:
        began = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return found


def main(
    tiny: bool = False,
    batch: int = 8,
    precision: Literal["fp32", "bf16"] = "bf16",
    rounds: int = 3,
    threads: int = 0,
    place: str | None = None,
    patience: float = 0.0,
) -> None:
    """Times it; rounds alternate between a step alone and steps with a checkpoint.

    Args:
        tiny: the tiny size.
        batch: samples of a step.
        precision: of the matrix products.
        rounds: of each measurement.
        threads: that compute on a CPU; 0: as many as it has cores.
        place: folder to write into, on the disk that is measured.
        patience: seconds after which no further round begins, on a slow disk; 0: all are taken.
    """
    size = "tiny" if tiny else "vit_base"
    step, engine = ours.make(
        *(size, "distill", LR, precision, batches(size, batch)),
        zero="auto",
        teacher="cached",
        compiled=False,
    )
    if threads:
        torch.set_num_threads(threads)
    ranks = distributed.initialize()
    with tempfile.TemporaryDirectory(dir=place) as name:
        kept = Checkpoints(Path(name) / "checkpoints", ranks, 2, lambda: None)
        saved: list[list[float]] = []
        behind: list[list[float]] = []
        alone: list[float] = []
        loaded = []

        def save(number: int, *, wait: bool) -> Callable[[], None]:
            return lambda: kept.save(engine, State(number, 0, {}, "", 1), wait=wait)

        began = time.perf_counter()
        for number in range(-1, rounds):  # the first does not count
            if number > 0 and 0 < patience < time.perf_counter() - began:
                break
            one = seconds(step)
            waited = seconds(save(2 * number + 3, wait=True), step)
            beside = seconds(save(2 * number + 4, wait=False), step, kept.settle)
            if number >= 0:
                alone += one
                saved.append(waited)
                behind.append(beside)

        def load() -> None:
            found = kept.find({}, "")
            assert found is not None
            training_state.restore(engine, 0, Reader(*found), found[1].optimizer)

        for _ in range(3):
            loaded += seconds(load)
        found = kept.newest()
        assert found is not None
        gib = sum(f.stat().st_size for f in found[0].iterdir()) / 2**30
        say("save", "s", [a for a, _ in saved], GiB=gib)
        say("copy, --save_async true", "s", [a for a, _, _ in behind], GiB=gib)
        say("the step while it is written", "s", [b for _, b, _ in behind])
        say("rest of the writing", "s", [c for _, _, c in behind])
        say("a step alone", "s", alone)
        pairs = list(zip(alone, saved, behind, strict=True))
        say(
            "a step that waits for its checkpoint", "times", [(a + b) / c for c, (a, b), _ in pairs]
        )
        say("a step and the copy alone", "times", [(a + c) / c for c, _, (a, _, _) in pairs])
        say("a step beside its checkpoint", "times", [(a + b) / c for c, _, (a, b, _) in pairs])
        say("find, check and restore", "s", loaded, GiB=gib)


if __name__ == "__main__":
    cli.run(main)
