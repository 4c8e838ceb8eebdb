"""Bytes that ranks send each other in a step, and weak scaling: `python -m benchmarks.scale`.

The step is that of the distillation stage, fp32, on the embedded ViT-MAE (recipes/vit_small, 64
pixels), its engine built as the stage builds it, with random images and features: no data, no
teacher. The ranks are real processes under torchrun, joined by gloo.

Bytes are those of the tensors that are asked for (`benchmarks.scale.ranks`); what a rank sends
follows by the ring's formula (`launcher.plan.scaling.sent`), whatever gloo itself puts on the wire.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from benchmarks import record
from benchmarks.scale import model as scale_model
from benchmarks.scale import tables as scale_tables
from benchmarks.scale.ranks import SETTING, SETTINGS, encoder, parameters
from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.runtime import zero
from selfdistill.launcher.plan import scaling

ROOT = Path(__file__).resolve().parents[2]
#: Seconds after which ranks are ended, and those more for each timed step.
PATIENCE, EACH = 900, 10


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
    Case("3, small parameters whole", "zero3", {"stage3_param_persistence_threshold": 100_000}),
    Case(
        "3, nothing kept for the backward",
        "zero3",
        {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0},
    ),
)
#: Of them the plain stages, the first ones.
STAGES = 4


def measure(
    ranks: int, cases: Sequence[Case], steps: int, settings: Sequence[str] = (SETTING,)
) -> dict[str, Any]:
    """Starts ranks on this machine, one thread each, and returns what `work` found.

    Args:
        ranks: their number.
        cases: settings whose bytes are counted.
        steps: timed steps of each setting.
        settings: of ds_configs/, whose steps are timed.

    Returns:
        `bytes`: case -> kind -> [calls, bytes of the tensors]; `rates`: setting -> images/s of each
        step; of several ranks `collectives`: kind -> [seconds, bytes a second].

    Raises:
        UserError: a rank failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, told = Path(folder) / "work.json", []
        work: dict[str, Any]
        for number, case in enumerate(cases):
            setting = Path(folder) / f"{number}.json"
            setting.write_text(json.dumps(case.content()), encoding="utf-8")
            told.append(
                {"name": case.name, "zero": str(setting), "accumulation": case.accumulation}
            )
        work = {"cases": told, "steps": steps, "settings": list(settings)}
        work["values"] = parameters().trained
        file.write_text(json.dumps(work), encoding="utf-8")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        code = f"from benchmarks.scale.ranks import work; work({str(file)!r})"
        words = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"),
            *(f"--master_port={port}", "--no-python", sys.executable, "-c", code),
        ]
        with subprocess.Popen(
            words,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                said, limit = process.communicate(timeout=PATIENCE + EACH * steps)[0], ""
            except subprocess.TimeoutExpired:
                said, limit = "", f"not done after {PATIENCE + EACH * steps} s"
            finally:
                with suppress(ProcessLookupError):  # nobody is left
                    os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            said = limit or " ".join(said[-2000:].split())
            raise UserError(f"{ranks} ranks failed ({process.returncode}): {said}")
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
    theory = scale_model.textbook(stage, told.trained, size=4, accumulation=times)
    plan = scaling.asked(content, told, size=4, accumulation=times, twice=encoder())
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


def main(out: Path | None = None, steps: int = 10, ranks: str = "1,2,4", rounds: int = 3) -> None:
    """Counts the bytes of a distillation step by ZeRO stage, and times it on more and more ranks.

    Args:
        out: folder for scale.json and scale.md.
        steps: timed steps of each ZeRO stage in a round.
        ranks: numbers of ranks, on this machine.
        rounds: alternating rounds of all numbers of ranks.
    """
    for name, value in (("steps", steps), ("rounds", rounds)):
        if value < 1:
            raise UserError(f"--{name} {value}: give 1 or more")
    asked = numbers(ranks)
    several = [number for number in asked if number > 1]
    # The variants once: more ranks change (N-1)/N and nothing else.
    cases = {number: CASES if number == several[0] else CASES[:STAGES] for number in several}
    found: list[dict[int, dict[str, Any]]] = [{} for _ in range(rounds)]
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=rounds * len(asked))
        for number, taken in enumerate(found):
            for world in asked:
                progress.update(task, description=f"round {number + 1}: {world} rank(s)")
                counted = () if number else cases.get(world, ())
                taken[world] = measure(world, counted, steps, SETTINGS)
                progress.advance(task)
    volumes = [
        compared(case, found[0][number]["bytes"][case.name], number)
        for number, told in cases.items()
        for case in told
    ]
    cores, model = len(os.sched_getaffinity(0)), parameters()
    weak, held = scale_model.weak(found, cores), scale_model.held(found, cores, model)
    told = {name: value for name, value in asdict(model).items() if name != "sizes"}
    figures = {"parameters": told, "volumes": volumes, "weak_scaling": weak}
    figures |= {"plan": held, "rounds": found}
    record.write(out, "scale", figures, scale_tables.text(volumes, weak, held, model.trained))


if __name__ == "__main__":
    cli.run(main)
