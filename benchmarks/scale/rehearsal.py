"""One rank of a thousand, rehearsed: `python -m benchmarks.scale.rehearsal --world 1024`.

torch's fake process group answers every collective at once with nothing, so a single process can be
any rank of any world. The engine is the real one, built as the distillation stage builds it. What a
rank asks the others for, and what it keeps in memory, do not depend on their answers; losses and
times mean nothing here.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.scale.ranks import encoder
from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.runtime import zero
from selfdistill.launcher.plan import memory, scaling
from selfdistill.launcher.plan.workload import Parameters

SETTINGS = ("zero0", "zero1", "zero2", "zero3", "zero3_hpz")
#: Ranks of a node.
NODE = 8
#: Images of the micro-batch: activations are not what is looked at.
MICRO = 1
MIB = 2**20


def storages() -> dict[int, int]:
    """Address -> bytes of what Python's tensors and their gradients lie in."""
    import torch

    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout == torch.strided and t.untyped_storage().data_ptr()
    }


def be(rank: int, world: int, out: str) -> None:
    """Is one rank: builds the engine by ZeRO setting, takes steps, and writes what was counted."""
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(NODE)}
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    import deepspeed
    from deepspeed.runtime.zero import partitioned_param_coordinator, stage3

    from benchmarks.scale.ranks import SEEN, Stepper, counting, parameters
    from selfdistill.engine.runtime.distributed import Ranks
    from selfdistill.engine.training import engine as training

    # As `initialize` does: else it is compiled first.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    # The group in which ranks agree on leaving is gloo's, which would look for the others.
    new_group = dist.new_group
    dist.new_group = lambda *words, **options: new_group(*words, **options | {"backend": "fake"})
    training.gather = lambda value: [value]  # all nodes are alike
    # ZeRO-3 compares the order of its modules with rank 0's, whose answer is nothing here.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None
    # What nobody fills in may be NaN, for which it would skip its step.
    stage3.is_invalid_grad_norm = lambda _: False
    torch.set_num_threads(1)
    model, found = parameters(), {}
    for setting in SETTINGS:
        before = storages()
        step = Stepper(setting, 1, MICRO, Ranks(rank, 0, world, torch.device("cpu")))
        for _ in range(SEEN - 1):
            step()
        with counting() as calls:
            step()
        kept = sum(size for place, size in storages().items() if place not in before)
        batch = sum(tensor.untyped_storage().nbytes() for tensor in step.batch.values())
        step.close()
        found[setting] = {
            "kept": kept - batch,
            "calls": len(calls),
            "sent": sum(scaling.sent(*call) for call in calls),
        }
        del step
        gc.collect()
    told = [model.trained, model.frozen, model.largest, model.sizes]
    Path(out).write_text(json.dumps({"found": found, "parameters": told}), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)


def rehearse(rank: int, world: int) -> tuple[dict[str, Any], Parameters]:
    """Starts a process that is one rank.

    Returns:
        setting -> bytes `kept` between steps, `calls` of collectives and bytes `sent` in a step;
        and the model's parameters.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        code = f"from benchmarks.scale.rehearsal import be; be({rank}, {world}, {str(out)!r})"
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=Path(__file__).resolve().parents[2],
            env=env,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = " ".join((done.stdout + done.stderr)[-2000:].split())
            raise UserError(f"rank {rank} of {world} failed ({done.returncode}): {said}")
        told = json.loads(out.read_text(encoding="utf-8"))
    *numbers, sizes = told["parameters"]
    return told["found"], Parameters(*numbers, tuple(sizes))


def compared(setting: str, found: dict[str, Any], world: int, model: Parameters) -> dict[str, Any]:
    """What a rank did under a setting, beside the plan's formulas."""
    content = zero.read(setting)
    asked = scaling.asked(content, model, size=4, twice=encoder(), node=NODE)
    need = memory.need(content, model, size=4, world=world, node=NODE)
    # Between steps there are no gradients; ZeRO-3 has a shard of the weights, and keeps its bucket.
    planned = need.weights + need.optimizer
    if zero.stage_of(content) == 3:
        planned = 4 * model.all / world + need.optimizer + need.backward
    return found | {
        "planned_kept": planned,
        "planned_sent": scaling.volume(asked, world),
        "planned_calls": sum(collective.calls for collective in asked),
    }


def main(out: Path | None = None, world: int = 1024) -> None:
    """Rehearses the first, a middle and the last rank of a world, and compares with the plan.

    Args:
        out: folder for rehearsal.json and rehearsal.md.
        world: number of ranks.
    """
    if world < 2:
        raise UserError(f"--world {world}: give 2 or more")
    rows, figures = [], []
    for rank in sorted({0, world // 2 - 1, world - 1}):
        each, model = rehearse(rank, world)
        for setting, found in each.items():
            row = compared(setting, found, world, model)
            figures.append({"rank": rank, "setting": setting} | row)
            sizes = [row[name] / MIB for name in ("kept", "planned_kept", "sent", "planned_sent")]
            kept, planned_kept, sent, planned_sent = (f"{size:.2f}" for size in sizes)
            cells = (kept, planned_kept, row["calls"], row["planned_calls"], sent, planned_sent)
            rows.append(f"| {rank:,} | {setting} | {' | '.join(map(str, cells))} |")
    text = "\n".join(
        (
            f"One rank of {world:,}, {model.trained:,} trained parameters, fp32:",
            "",
            "| rank | --zero | kept, MiB | by the plan | collectives a step | by the plan |"
            " sent a step, MiB | by the plan |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        )
    )
    record.write(out, "rehearsal", {"world": world, "ranks": figures}, text)


if __name__ == "__main__":
    cli.run(main)
