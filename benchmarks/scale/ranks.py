"""What the ranks of `benchmarks.scale` do: a distillation step, its bytes counted, its time taken.

Bytes are counted at torch.distributed's ProcessGroup, through whose methods every collective of
Python goes, DeepSpeed's and ours. DeepSpeed's own log of communication (`comms_logger`) sees only
what goes through deepspeed.comm. What counts is the tensor that is asked for.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from selfdistill.launcher.plan import scaling
from selfdistill.launcher.plan.workload import Parameters, count

BASE = Path(__file__).resolve().parents[2] / "recipes" / "vit_small"

#: Images of a rank's micro-batch: where bytes are counted (they do not depend on it), where timed.
COUNTED, TIMED = 2, 16
#: Steps of a case, the last of which is counted: ZeRO-3 fetches ahead from the second one on.
SEEN = 3
#: ZeRO settings of the timed steps, and that of several ranks by default. ZeRO-3 comes last: it
#: leaves its own linear function in place of torch's.
SETTINGS, SETTING = ("zero0", "zero1", "zero2", "zero3"), "zero1"
#: Collectives that are timed by themselves: large ones, small ones.
LARGE, SMALL = 10, 50

#: Methods of ProcessGroup -> what they are; the argument that holds the whole tensor.
METHODS: dict[str, tuple[scaling.Collected, int]] = {
    "allreduce": ("all-reduce", 0),
    "allreduce_coalesced": ("all-reduce", 0),
    "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0),
    "allgather": ("all-gather", 0),
    "_allgather_base": ("all-gather", 0),
    "all_gather_single": ("all-gather", 0),
    "allgather_coalesced": ("all-gather", 0),
    "allgather_into_tensor_coalesced": ("all-gather", 0),
    "all_gather_single_coalesced": ("all-gather", 0),
    "reduce_scatter": ("reduce-scatter", 1),
    "_reduce_scatter_base": ("reduce-scatter", 1),
    "reduce_scatter_single": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", 1),
    "reduce_scatter_single_coalesced": ("reduce-scatter", 1),
}
#: Others that move data. A step has none; one that has is an error, not a smaller sum.
UNKNOWN = (
    *("alltoall", "alltoall_base", "all_to_all_single", "gather", "gather_single"),
    *("gather_into_tensor", "scatter", "send", "recv", "recv_anysource"),
)


def size(tensors: Any) -> int:
    """Bytes of a tensor, or of all in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(size, tensors))


@contextmanager
def counting() -> Iterator[list[tuple[scaling.Collected, int, int]]]:
    """Lists kind, bytes and ranks of every collective that this process asks for within it."""
    group, found = dist.ProcessGroup, []
    # As they lie in the class: what getattr gives is no longer bound when it is put back.
    before = {n: vars(group)[n] for n in (*METHODS, *UNKNOWN) if n in vars(group)}

    def counted(name: str) -> Any:
        def call(self: Any, *args: Any, **named: Any) -> Any:
            if name not in METHODS:
                raise LookupError(f"no formula for the bytes of {name}")
            kind, place = METHODS[name]
            found.append((kind, size(args[place]), self.size()))
            return before[name](self, *args, **named)

        return call

    for name in before:
        setattr(group, name, counted(name))
    try:
        yield found
    finally:
        for name, method in before.items():
            setattr(group, name, method)


def parameters() -> Parameters:
    """Those of the model that is distilled."""
    from selfdistill.engine.models.images.vit_mae import ViTMAE
    from selfdistill.engine.models.images.weights import load_pretrained

    shape = load_pretrained(str(BASE)).shape
    return count(lambda: ViTMAE(shape))


def encoder() -> int:
    """Parameters of its encoder, which a distillation passes twice."""
    from selfdistill.engine.models.images.vit_mae import ViTEncoder
    from selfdistill.engine.models.images.weights import load_pretrained

    shape = load_pretrained(str(BASE)).shape
    return count(lambda: ViTEncoder(shape)).all


def work(file: str) -> None:
    """What a rank does: reads cases from a file; rank 0 writes there what was found.

    Args:
        file: JSON with `cases` (name, zero: a file, accumulation), and of the timed steps
            `settings` and `steps`; `values` of the largest collectives.
    """
    from selfdistill.engine.runtime.allocator import keep_memory
    from selfdistill.engine.runtime.distributed import initialize

    ranks = initialize()
    keep_memory()
    torch.set_num_threads(1)  # what initialize() shares out: a rank has one here, on any machine
    told = json.loads(Path(file).read_text(encoding="utf-8"))
    found = {}
    for case in told["cases"]:
        found[case["name"]] = _counts(Stepper(case["zero"], case["accumulation"], COUNTED, ranks))
    answer: dict[str, Any] = {"bytes": found}
    answer["rates"] = {
        setting: _rates(Stepper(setting, 1, TIMED, ranks), told["steps"], ranks.world)
        for setting in told["settings"]
    }
    if ranks.world > 1:
        answer["collectives"] = _collectives(told["values"], ranks.world)
    if ranks.main:
        Path(file).write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may outlive the group


class Stepper:
    """One optimiser step of the stage, on random images."""

    def __init__(self, setting: str, accumulation: int, micro: int, ranks: Any) -> None:
        from selfdistill.engine.checkpoints.folder import Run
        from selfdistill.engine.config import options as configuration
        from selfdistill.engine.models.images.networks import ImageAutoencoder, Normalize
        from selfdistill.engine.models.images.vit_mae import ViTMAE
        from selfdistill.engine.models.images.weights import load_pretrained
        from selfdistill.engine.training.engine import build_engine
        from selfdistill.engine.training.objectives import DistillObjective

        config = configuration.load(
            {
                "recipe": "vit_small",
                "stage": "distill",
                "precision": "fp32",
                "zero": setting,
                "distill.batch": micro * accumulation * ranks.world,
                "distill.accumulation": accumulation,
            }
        )
        torch.manual_seed(0)
        shape = load_pretrained(str(BASE)).shape
        # Any, as a stage has it: the protocols say nothing of modules.
        model: Any = ImageAutoencoder(ViTMAE(shape), Normalize((0.5,) * 3, (0.5,) * 3))
        run = Run(config, ranks, Path("."))
        self.engine = build_engine(run, DistillObjective(model), "distill", config.distill)
        self.accumulation = accumulation
        side, width = shape.image_size, shape.width
        self.batch = {
            "target": torch.randn(micro, width),
            "images": torch.randint(0, 256, (micro, 3, side, side), dtype=torch.uint8),
            "noise": torch.rand(micro, (side // shape.patch_size) ** 2),
        }

    def __call__(self) -> None:
        """Takes it."""
        for _ in range(self.accumulation):
            self.engine.backward(self.engine(**self.batch)["loss"])
            self.engine.step()

    def close(self) -> None:
        """Ends the engine."""
        self.engine.destroy()


def _counts(step: Stepper) -> dict[str, list[int]]:
    """Kind of collective -> calls and bytes of the last of a few steps."""
    for _ in range(SEEN - 1):
        step()
    with counting() as found:
        step()
    step.close()
    return {
        kind: [len(sizes), sum(sizes)]
        for kind in dict.fromkeys(kind for kind, _, _ in found)
        if (sizes := [bytes_ for other, bytes_, _ in found if other == kind])
    }


def _rates(step: Stepper, steps: int, world: int) -> list[float]:
    """Images a second of every step on all ranks, after two that warm up."""
    rates = []
    for number in range(steps + 2):
        dist.barrier()
        began = time.perf_counter()
        step()
        dist.barrier()
        if number > 1:
            rates.append(world * TIMED / (time.perf_counter() - began))
    step.close()
    return rates


def _collectives(values: int, world: int) -> dict[str, list[float]]:
    """Kind of collective -> seconds of one of next to no bytes, bytes a second that a rank sends.

    Args:
        values: fp32 values of the large one; a step's gradients.
        world: number of ranks.
    """
    found: dict[str, list[float]] = {}
    for kind in ("all-reduce", "all-gather", "reduce-scatter"):
        seconds = []
        for length, times in ((world, SMALL), (values // world * world, LARGE)):
            whole, part = torch.zeros(length), torch.zeros(length // world)
            took = []
            for _ in range(times):
                dist.barrier()
                began = time.perf_counter()
                if kind == "all-reduce":
                    dist.all_reduce(whole)
                elif kind == "all-gather":
                    dist.all_gather_into_tensor(whole, part)
                else:
                    dist.reduce_scatter_tensor(part, whole)
                took.append(time.perf_counter() - began)
            seconds.append(statistics.median(took))
        moved = scaling.sent(kind, float(size(whole)), world)
        found[kind] = [seconds[0], moved / max(seconds[1] - seconds[0], 1e-9)]
    return found
