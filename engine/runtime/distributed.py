"""The process group, and what its ranks do together."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from selfdistill.data.errors import TryAgain, UserError
from selfdistill.engine.runtime import devices, network
from selfdistill.engine.runtime.failures import refused
from selfdistill.engine.runtime.meeting import PATIENCE, Meeting
from selfdistill.engine.runtime.rendezvous import of_step, resolve


@dataclass(frozen=True)
class Ranks:
    """Who this process is among the others."""

    rank: int
    local_rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes files and the terminal."""
        return self.rank == 0

    @property
    def cores(self) -> int:
        """Processor cores that are this process's own."""
        return cores()


def cores() -> int:
    """Processor cores that are this process's own.

    A SLURM task may be bound to them, or see those of its node's other tasks as well.
    """
    seen, granted = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_PER_TASK", "")
    if of_step(os.environ) and granted.isdigit():
        return max(1, min(seen, int(granted)))
    return max(1, seen // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def few_cores() -> str | None:
    """What to say where srun gives a task one core of many; None where all is well."""
    tasks, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), os.cpu_count() or 1
    if not of_step(os.environ) or cores() > 1 or there < 2 * tasks:
        return None
    return (
        f"warning: SLURM gives each task 1 of this node's {there} cores: no loader process reads"
        f" ahead of the training: add #SBATCH --cpus-per-task={there // tasks}"
    )


def initialize() -> Ranks:
    """Joins the process group of the launcher's environment; alone, makes one of size 1.

    `engine.runtime.rendezvous` reads SLURM's, torchrun's and DeepSpeed's.

    Raises:
        UserError: the environment is incomplete, or the ranks have no GPU each.
        TryAgain: the ranks do not find each other.
        preemption.Preempted: a signal asked to leave before they had.
    """
    os.environ |= resolve()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = devices.take(os.environ)
    if device.type == "cuda":
        for name in ("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"):
            os.environ.setdefault(name, "2000")  # collectives; torch renamed it
    _share_cores()
    _raise_limit()
    import deepspeed  # late: it takes seconds, and a wrong option should be told at once

    if device.type == "cpu":
        # gloo carries all that the ranks say. DeepSpeed would first compile an all-reduce through
        # shared memory, which serves its inference alone: half a minute, and one build at a time.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        Meeting(os.environ).hold(functools.partial(_join, device))
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device)


def _join(device: torch.device, store: Any) -> None:
    """Makes the process group, once the ranks have looked at each other over their store."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    if gpu := devices.uuid(device):
        devices.claim(store, rank, gpu)
    network.prefer_interface(os.environ, store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def _share_cores() -> None:
    """Threads of this process: its part of the cores, where a launcher set one, or none is set.

    On a CPU they compute; on a GPU DeepSpeed's CPUAdam, under offload, does.
    """
    threads, several = os.environ.get("OMP_NUM_THREADS"), int(os.environ["LOCAL_WORLD_SIZE"]) > 1
    if threads is None or (threads == "1" and (several or torch.cuda.is_available())):
        torch.set_num_threads(cores())


def _raise_limit() -> None:
    """As many open files as the system allows: a thousand ranks need as many connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device, on its way there: the host waits for nothing.

    CUDA copies beside the host's work out of page-locked memory alone; the loaders' batches are.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def barrier() -> None:
    """Waits for every rank."""
    if dist.get_world_size() > 1:
        dist.barrier()


def broadcast(value: Any, source: int = 0) -> Any:
    """The `value` of rank 0, or of another, on every rank."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def mean(values: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """Means of scalar tensors over the ranks; the one host synchronisation of a log step."""
    if not values:
        return {}
    packed = torch.stack([v.detach().double().reshape(()) for v in values.values()]).to(device)
    if dist.get_world_size() > 1:
        dist.all_reduce(packed)
        packed /= dist.get_world_size()
    return dict(zip(values, packed.tolist(), strict=True))


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def agree(error: UserError | None) -> None:
    """Raises rank 0's error on every rank, so that none is left waiting.

    Raises:
        UserError: rank 0 passed one; TryAgain, where it was that.
    """
    met = error and (str(error), isinstance(error, TryAgain))
    if told := broadcast(met):
        message, passing = told
        raise (TryAgain if passing else UserError)(message)


def main_only(ranks: Ranks, action: Any) -> Any:
    """Runs `action()` on rank 0 and gives its result, or its UserError, to every rank.

    An error of the file system that may be over at the next launch is a TryAgain.
    """
    result: Any = None
    error: UserError | None = None
    if ranks.main:
        try:
            result = action()
        except (UserError, OSError) as caught:
            error = refused(caught)
    agree(error)
    return broadcast(result)
