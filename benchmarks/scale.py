"""Bytes that ranks send each other in a step, and weak scaling: `python -m benchmarks.scale`.

The step is that of the distillation stage, fp32, on the embedded ViT-MAE (recipes/vit_small, 64
pixels), its engine built as the stage builds it, with random images and features: no data, no
teacher. The ranks are real processes under torchrun, joined by gloo.

Bytes are counted at torch.distributed's ProcessGroup, through whose methods every collective of
Python goes, DeepSpeed's and ours. DeepSpeed's own log of communication (`comms_logger`) sees only
what goes through deepspeed.comm. What counts is the tensor that is asked for; a rank's bytes follow
by the ring's formula (`launcher.scaling.sent`), whatever gloo itself puts on the wire.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks import record
from data import cli
from data.errors import UserError
from engine import zero
from launcher import scaling
from launcher.workload import Parameters, count

ROOT = Path(__file__).resolve().parent.parent
BASE = ROOT / "recipes" / "vit_small"

#: Images of a rank's micro-batch: where bytes are counted (they do not depend on it), where timed.
COUNTED, TIMED = 2, 16
#: Steps of a case, the last of which is counted: ZeRO-3 fetches ahead from the second one on.
SEEN = 3
#: ZeRO setting of the timed steps: the recipes'.
SETTING = "zero1"
#: Seconds after which ranks that say nothing are ended.
PATIENCE = 900

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


class Case(NamedTuple):
    """A setting whose bytes are counted.

    Attributes:
        name: for people.
        zero: of ds_configs/.
        changes: of its section zero_optimization.
        accumulation: micro-batches of a step.
    """

    name: str
    zero: str
    changes: dict[str, Any] = {}  # noqa: RUF012 - no instance writes to it
    accumulation: int = 1

    def content(self) -> dict[str, Any]:
        """DeepSpeed's configuration."""
        found = zero.read(self.zero)
        found["zero_optimization"] |= self.changes
        return found


_WHOLE = {"stage3_param_persistence_threshold": 0}
CASES = (
    Case("0", "zero0"),
    Case("1", "zero1"),
    Case("2", "zero2"),
    Case("3", "zero3"),
    Case("1, A = 2", "zero1", {}, 2),
    Case("2, A = 2", "zero2", {}, 2),
    Case("3, A = 2", "zero3", {}, 2),
    Case(
        "2, use_multi_rank_bucket_allreduce off",
        "zero2",
        {"use_multi_rank_bucket_allreduce": False},
    ),
    Case("3, no persistent parameters", "zero3", _WHOLE),
    Case(
        "3, nothing kept for the backward",
        "zero3",
        _WHOLE | {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    ),
)
#: Of them the plain stages, the first ones.
STAGES = 4


def size(tensors: Any) -> int:
    """Bytes of a tensor, or of all in nested lists."""
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(size, tensors))


@contextmanager
def counting() -> Iterator[list[tuple[scaling.Collected, int]]]:
    """Lists the kind and the bytes of every collective that this process asks for within it."""
    group, found = dist.ProcessGroup, []
    # As they lie in the class: what getattr gives is no longer bound when it is put back.
    before = {n: vars(group)[n] for n in (*METHODS, *UNKNOWN) if n in vars(group)}

    def counted(name: str) -> Any:
        def call(self: Any, *args: Any, **named: Any) -> Any:
            if name not in METHODS:
                raise LookupError(f"no formula for the bytes of {name}")
            kind, place = METHODS[name]
            found.append((kind, size(args[place])))
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
    from engine.models.vit_mae import ViTMAE
    from engine.models.weights import load_pretrained

    shape = load_pretrained(str(BASE)).shape
    return count(lambda: ViTMAE(shape))


def work(file: str) -> None:
    """What a rank does: reads cases from a file; rank 0 writes there what was found.

    Args:
        file: JSON with `cases` (name, zero: a file, accumulation) and `steps`.
    """
    from engine.distributed import initialize

    ranks = initialize()
    torch.set_num_threads(1)  # what initialize() shares out: a rank has one here, on any machine
    told = json.loads(Path(file).read_text(encoding="utf-8"))
    found = {}
    for case in told["cases"]:
        found[case["name"]] = _counts(_Stepper(case["zero"], case["accumulation"], COUNTED, ranks))
    rates = _rates(_Stepper(SETTING, 1, TIMED, ranks), told["steps"], ranks.world)
    if ranks.main:
        Path(file).write_text(json.dumps({"bytes": found, "rates": rates}), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may outlive the group


class _Stepper:
    """One optimiser step of the stage, on random images."""

    def __init__(self, setting: str, accumulation: int, micro: int, ranks: Any) -> None:
        from engine import config as configuration
        from engine.fit import build_engine
        from engine.folder import Run
        from engine.models.image import ImageAutoencoder, Normalize
        from engine.models.vit_mae import ViTMAE
        from engine.models.weights import load_pretrained
        from engine.objectives import DistillObjective

        config = configuration.load(
            {
                "recipe": "vit_small",
                "stage": "distill",
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
        for _ in range(self.accumulation):
            self.engine.backward(self.engine(**self.batch)["loss"])
            self.engine.step()

    def close(self) -> None:
        self.engine.destroy()


def _counts(step: _Stepper) -> dict[str, list[int]]:
    """Kind of collective -> calls and bytes of the last of a few steps."""
    for _ in range(SEEN - 1):
        step()
    with counting() as found:
        step()
    step.close()
    return {
        kind: [len(sizes), sum(sizes)]
        for kind in dict.fromkeys(kind for kind, _ in found)
        if (sizes := [bytes_ for other, bytes_ in found if other == kind])
    }


def _rates(step: _Stepper, steps: int, world: int) -> list[float]:
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


def measure(ranks: int, cases: Sequence[Case], steps: int) -> dict[str, Any]:
    """Starts ranks on this machine, one thread each, and returns what `work` found.

    Args:
        ranks: their number.
        cases: settings whose bytes are counted.
        steps: timed steps.

    Returns:
        `bytes`: case -> kind -> [calls, bytes of the tensors]; `rates`: images/s of each step.

    Raises:
        RuntimeError: a rank failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, told = Path(folder) / "work.json", []
        for number, case in enumerate(cases):
            setting = Path(folder) / f"{number}.json"
            setting.write_text(json.dumps(case.content()), encoding="utf-8")
            told.append(
                {"name": case.name, "zero": str(setting), "accumulation": case.accumulation}
            )
        file.write_text(json.dumps({"cases": told, "steps": steps}), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        code = f"from benchmarks.scale import work; work({str(file)!r})"
        words = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"),
            *(f"--master_port={port}", "--no-python", sys.executable, "-c", code),
        ]
        done = subprocess.run(
            words,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-4000:])
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def compared(
    case: Case, counts: Mapping[scaling.Collected, list[int]], ranks: int
) -> dict[str, Any]:
    """Bytes that a rank sends in a step: the textbook's, the plan's and those that were counted.

    Args:
        case: the setting.
        counts: kind -> [calls, bytes of the tensors].
        ranks: their number.
    """
    content, told = case.content(), parameters()
    stage, times = zero.stage_of(content), case.accumulation
    theory = scaling.textbook(stage, told.trained, size=4, accumulation=times)
    plan = scaling.asked(content, told, size=4, accumulation=times)
    sums = [scaling.sent(kind, payload, ranks) for kind, (_, payload) in counts.items()]
    return {
        "setting": case.name,
        "ranks": ranks,
        "textbook": scaling.volume(theory, ranks),
        "plan": scaling.volume(plan, ranks),
        "measured": sum(sums),
        "calls": {kind: calls for kind, (calls, _) in counts.items()},
        "payload": {kind: payload for kind, (_, payload) in counts.items()},
    }


def numbers(text: str) -> list[int]:
    """Numbers of ranks, from words such as 1,2,4.

    Raises:
        UserError: something else.
    """
    words = text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise UserError(f"--ranks {text}: give numbers of ranks, such as 1,2,4")
    return sorted({int(word) for word in words})


def main(out: Path | None = None, steps: int = 20, ranks: str = "1,2,4") -> None:
    """Counts the bytes of a distillation step by ZeRO stage, and times it on more and more ranks.

    Args:
        out: folder for scale.json and scale.md.
        steps: timed steps.
        ranks: numbers of ranks, on this machine.
    """
    if steps < 1:
        raise UserError(f"--steps {steps}: give 1 or more")
    asked = numbers(ranks)
    several = [number for number in asked if number > 1]
    # The variants once: more ranks change (N-1)/N and nothing else.
    cases = {number: CASES if number == several[0] else CASES[:STAGES] for number in several}
    found = {number: measure(number, cases.get(number, ()), steps) for number in asked}
    volumes = [
        compared(case, found[number]["bytes"][case.name], number)
        for number, told in cases.items()
        for case in told
    ]
    cores = len(os.sched_getaffinity(0))
    rates = {number: record.spread(found[number]["rates"]) for number in asked}
    first = rates[asked[0]]["median"] / min(asked[0], cores)
    weak = [
        {
            "ranks": number,
            "cores": cores,
            **rate,
            "efficiency": rate["median"] / (first * min(number, cores)),
        }
        for number, rate in rates.items()
    ]
    figures = {"parameters": asdict(parameters()), "volumes": volumes, "weak_scaling": weak}
    record.write(out, "scale", figures, text(volumes, weak))


def text(volumes: Sequence[dict[str, Any]], weak: Sequence[dict[str, Any]]) -> str:
    """Both tables, with what is behind them.

    Args:
        volumes: lines of `compared`.
        weak: ranks, cores, median, min, max, n and efficiency.
    """
    told = parameters()
    lines = ["# Communication and weak scaling of a distillation step", ""]
    if volumes:
        lines += [
            f"ViT-MAE of recipes/vit_small, P = {told.trained:,} trained parameters, fp32, gloo:"
            " MB that a rank sends in one optimiser step.",
            "",
            _volume_table(volumes),
            "",
            "Counted: every tensor that ProcessGroup is asked to move, times 2 (N-1)/N for an"
            " all-reduce and (N-1)/N otherwise (a ring's convention, not gloo's own traffic)."
            " Textbook: 2 P under ZeRO 0, 1 and 2, 3 P under ZeRO 3, times (N-1)/N. Plan: what"
            " launcher/scaling.py says of DeepSpeed 0.19.8. A: micro-batches a step; the textbook"
            " takes a sum for each in ZeRO 2, and all three passes in ZeRO 3.",
            "",
            "ZeRO 1 and 2 all-reduce whole buckets of gradients, of which a rank keeps its part;"
            " two of their all-reduces, and those of ZeRO 3, are the overflow and the norm. ZeRO 3"
            " gathers once, not twice, since all parameters are below stage3_max_live_parameters;"
            " the frozen position tables come with them, and those below"
            " stage3_param_persistence_threshold once a step, one call each. Where nothing is kept,"
            " the encoder is gathered for each of its two views, forward and backward: the plan"
            " counts one.",
            "",
        ]
    cores = weak[0]["cores"]
    lines += [
        f"Weak scaling, {SETTING}, {TIMED} images of 64 pixels a rank, one thread a rank; this"
        f" machine has {cores} cores: more ranks than that share them.",
        "",
        record.markdown(
            ("ranks", "cores used", "images/s, median", "min to max", "n", "efficiency"),
            [
                (
                    *(f"{row['ranks']}", f"{min(row['ranks'], cores)}", f"{row['median']:.1f}"),
                    *(f"{row['min']:.1f} to {row['max']:.1f}", f"{row['n']}"),
                    f"{100 * row['efficiency']:.0f}%",
                )
                for row in weak
            ],
        ),
        "",
        f"Efficiency: images/s over those of {weak[0]['ranks']} rank(s), for each core used:"
        " min(ranks, cores).",
    ]
    return "\n".join(lines)


def _volume_table(volumes: Sequence[dict[str, Any]]) -> str:
    columns = ("ZeRO", "ranks", "textbook", "plan", "measured", "measured / textbook", "calls")
    rows = [
        (
            *(row["setting"], f"{row['ranks']}"),
            *(f"{row[name] / 1e6:.3f}" for name in ("textbook", "plan", "measured")),
            f"{row['measured'] / row['textbook']:.3f}",
            ", ".join(f"{calls} {kind}" for kind, calls in row["calls"].items()),
        )
        for row in volumes
    ]
    return record.markdown(columns, rows)


if __name__ == "__main__":
    cli.run(main)
