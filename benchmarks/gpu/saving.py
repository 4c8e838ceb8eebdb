"""A checkpoint of ViT-B/16's auto-encoder, written with the steps waiting or not, and read."""

import tempfile
import time
from pathlib import Path

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


def main(tiny: bool = False) -> None:
    """Times it.

    Args:
        tiny: the tiny size.
    """
    size = "tiny" if tiny else "vit_base"
    step, engine = ours.make(
        size, "distill", LR, "bf16", batches(size, 8), zero="auto", teacher="cached", compiled=False
    )
    ranks = distributed.initialize()
    step()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoints"
        kept = Checkpoints(folder, ranks, 2, lambda: None)
        saved, copied, beside, alone, loaded, place = [], [], [], [], [], None
        for number in range(3):
            state = State(number + 1, 0, {}, "", 1)
            began = time.perf_counter()
            kept.save(engine, state)
            saved.append(time.perf_counter() - began)
        for number in range(3, 6):
            began = time.perf_counter()
            kept.save(engine, State(number + 1, 0, {}, "", 1), wait=False)
            copied.append(time.perf_counter() - began)
            for times in (beside, alone):
                began = time.perf_counter()
                step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - began)
                kept.settle()
        for _ in range(3):
            began = time.perf_counter()
            found = kept.find({}, "")
            assert found is not None
            place, state = found
            training_state.restore(engine, 0, Reader(place, state), state.optimizer)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            loaded.append(time.perf_counter() - began)
        assert place is not None
        gib = sum(f.stat().st_size for f in place.iterdir()) / 2**30
        say("save", "s", saved, GiB=gib)
        say("copy, --save_async true", "s", copied, GiB=gib)
        say("the step while it is written", "s", beside)
        say("a step alone", "s", alone)
        say("find, check and restore", "s", loaded, GiB=gib)


if __name__ == "__main__":
    cli.run(main)
