"""The peers on the same batches: the plain loop in three precisions, or the Trainer in bf16."""

import gc
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from benchmarks.contestant import LR
from benchmarks.gpu.counted import tell
from benchmarks.gpu.say import failed, say
from benchmarks.peers import plain
from benchmarks.sizes import Batch, Stage, batches, for_transformers
from selfdistill.data import cli

PRECISIONS = {"fp32": ("highest", False), "TF32": ("high", False), "bf16": ("highest", True)}


def main(who: Literal["plain", "trainer"], tiny: bool = False) -> None:
    """Times a peer at ViT-B/16.

    Args:
        who: which.
        tiny: the tiny size.
    """
    size, seconds = ("tiny", 0.2) if tiny else ("vit_base", 3.0)
    stages: tuple[tuple[Stage, int], ...] = (("distill", 256), ("pretrain", 256), ("distill", 64))
    for stage, batch in stages if who == "plain" else stages[:1]:
        data = [for_transformers(size, b) for b in batches(size, 8 if tiny else batch)]
        title = f"{stage}, batch {batch}"
        try:
            if who == "plain":
                _plain(title, size, stage, data, seconds)
            else:
                _trainer(title, size, stage, data, seconds)
        except Exception as error:  # of any library: the others are timed all the same
            failed(title, error)


def _plain(title: str, size: str, stage: Stage, data: list[Batch], seconds: float) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, (products, autocast) in PRECISIONS.items():
        torch.set_float32_matmul_precision(products)
        one = plain.make(size, stage, LR, device, autocast=autocast)
        step = _cycled(one, data)
        base = f"plain: {title}, fp32"
        tell(f"{title}, {name}", step, len(data[0]["labels"]), seconds, base=base)
        del one, step
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _cycled(one: Callable[[Batch], Tensor], data: list[Batch]) -> Callable[[], Tensor]:
    number = -1

    def step() -> Tensor:
        nonlocal number
        number += 1
        return one(data[number % len(data)])

    return step


def _trainer(title: str, size: str, stage: Stage, data: list[Batch], seconds: float) -> None:
    """The Trainer has its own loop: it is told after each step, and stopped when time is up."""
    from benchmarks.peers import trainer
    from selfdistill.engine.runtime import distributed

    distributed.initialize()  # where no launcher is, accelerate looks for MPI
    samples, marks = len(data[0]["labels"]), list[float]()
    warm, peak = 4, 0.0

    def after(_: Tensor) -> bool:
        nonlocal peak
        if len(marks) == warm and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
        marks.append(time.perf_counter())
        return len(marks) < warm + 4 or marks[-1] - marks[warm] < seconds

    trainer.race(size, stage, LR, "bf16", data, after)
    found = [samples / (b - a) for a, b in zip(marks[warm:], marks[warm + 1 :], strict=False)]
    say(
        f"{title}, bf16",
        "samples/s",
        found,
        **{"peak GiB": round(peak, 2)},
        base=f"plain: {title}, fp32",
    )


if __name__ == "__main__":
    cli.run(main)
