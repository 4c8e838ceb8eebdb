"""A contestant of `benchmarks.step`, in a process of its own: it runs a round whenever it is told.

On standard input a line `run N` asks for N steps; on standard output a line of JSON, after a mark,
answers with their seconds, losses and peak of memory. `count N` and `profile N` do the same and add
FLOPs, and the operations that take longest. `rest 0` gives memory back that is not in use. The end
of the input ends the process.
"""

import json
import os
import resource
import sys
import time
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import ours
from benchmarks.peers import plain
from benchmarks.sizes import Stage, batches, for_transformers
from selfdistill.data import cli
from selfdistill.engine.runtime import distributed

MARK = "@@ "

#: One rate for all: the losses are compared.
LR = 1e-4


class Rounds:
    """The rounds that are asked for."""

    def __init__(self, device: torch.device, batch: int) -> None:
        self.device, self.batch = device, batch
        self.left = 0
        self.losses: list[Tensor] = []
        self.began = 0.0
        self.counter: Any = None
        self.profiler: Any = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def begin(self) -> bool:
        """Waits for the next round; False at the end."""
        line = sys.stdin.readline().split()
        while line and line[0] == "rest":
            # The device's memory is for whoever runs; what this process keeps are its weights.
            torch.cuda.empty_cache()
            print(MARK + json.dumps({"losses": []}), flush=True)
            line = sys.stdin.readline().split()
        if not line:
            return False
        self.left, self.losses = int(line[1]), []
        if line[0] == "count":
            # The counter knows matrix products; fused attention on the CPU is none to it.
            self.counter = (FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH))
            for part in self.counter:
                part.__enter__()
        if line[0] == "profile":
            self.profiler = profile()
            self.profiler.__enter__()
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.began = time.perf_counter()
        return True

    def after(self, loss: Tensor) -> bool:
        """Told of a step's loss; True while there are more to take."""
        self.losses.append(loss)
        self.left -= 1
        return True if self.left else self.end() and self.begin()

    def end(self) -> bool:
        """Answers."""
        self._wait()
        answer: dict[str, Any] = {"seconds": time.perf_counter() - self.began}
        answer["losses"] = [float(loss) for loss in self.losses]
        answer["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.device.type == "cuda":
            answer["peak_bytes"] = torch.cuda.max_memory_allocated()
        if self.counter:
            for part in reversed(self.counter):
                part.__exit__(None, None, None)
            samples = len(self.losses) * self.batch
            answer["flops"] = self.counter[0].get_total_flops() / samples
            self.counter = None
        if self.profiler:
            self.profiler.__exit__(None, None, None)
            answer["operations"] = operations(self.profiler, self.device)
            self.profiler = None
        print(MARK + json.dumps(answer), flush=True)
        return True


def operations(found: profile, device: torch.device) -> list[tuple[str, float, int]]:
    """Names of the operations that take longest by themselves, their shares, calls of all steps."""
    name = f"self_{'device' if device.type == 'cuda' else 'cpu'}_time_total"
    events = sorted(found.key_averages(), key=lambda e: -getattr(e, name))
    total = sum(getattr(e, name) for e in events) or 1
    return [(e.key[:60], getattr(e, name) / total, e.count) for e in events[:16]]


def main(
    who: Literal["plain", "trainer", "ours"],
    size: str,
    stage: Stage,
    batch: int,
    precision: str = "fp32",
    zero: str = "auto",
    teacher: Literal["cached", "replicated"] = "cached",
    compiled: bool = False,
    threads: int = 0,
) -> None:
    """Runs rounds until the input ends.

    Args:
        who: the contestant.
        size: of `benchmarks.sizes`.
        stage: which.
        batch: samples of a step.
        precision: of ours and the trainer's; the plain loop is fp32.
        zero: ours alone.
        teacher: ours alone.
        compiled: ours alone.
        threads: of a CPU; 0: all cores.
    """
    cores = threads or len(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = str(cores)  # before a launcher's default of one is taken
    torch.set_num_threads(cores)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = batches(size, batch)
    rounds = Rounds(device, batch)
    if who == "trainer":
        from benchmarks.peers import trainer  # accelerate, which nothing else needs

        distributed.initialize()  # where no launcher is, accelerate looks for MPI
        taken = [for_transformers(size, b) for b in data]
        if rounds.begin():
            trainer.race(size, stage, LR, precision, taken, rounds.after)
        return
    if who == "plain":
        one = plain.make(size, stage, LR, device)
        taken = [for_transformers(size, b) for b in data]
        number = 0

        def step() -> Tensor:
            nonlocal number
            number += 1
            return one(taken[(number - 1) % len(taken)])
    else:
        step, _ = ours.make(
            size, stage, LR, precision, data, zero=zero, teacher=teacher, compiled=compiled
        )
    more = rounds.begin()
    while more:
        more = rounds.after(step())


if __name__ == "__main__":
    cli.run(main)
