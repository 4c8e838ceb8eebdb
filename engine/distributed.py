"""The process group, and what its ranks do together."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data.cli import one_line
from data.errors import TryAgain, UserError
from engine.rendezvous import in_step, resolve


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
        """Processor cores that are this process's own.

        A SLURM task may be bound to them, or see those of its node's other tasks as well.
        """
        seen, told = len(os.sched_getaffinity(0)), os.environ.get("SLURM_CPUS_PER_TASK", "")
        if in_step(os.environ) and told.isdigit():
            return max(1, min(seen, int(told)))
        return max(1, seen // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def initialize() -> Ranks:
    """Joins the process group of the launcher's environment; alone, makes one of size 1.

    `engine.rendezvous` reads SLURM's, torchrun's and DeepSpeed's.

    Raises:
        UserError: the environment is incomplete, or there are more local ranks than GPUs.
        TryAgain: the ranks do not find each other.
    """
    os.environ |= resolve()
    local_rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        # srun --gpus-per-task shows each task a GPU of its own, as number 0.
        index = 0 if torch.cuda.device_count() == 1 and in_step(os.environ) else local_rank
        if index >= torch.cuda.device_count():
            raise UserError(
                f"local rank {local_rank} has no GPU: this machine shows "
                f"{torch.cuda.device_count()}; start fewer ranks (--num_gpus)"
            )
        torch.cuda.set_device(index)
        device, backend = torch.device("cuda", index), "nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
        local_world = int(os.environ["LOCAL_WORLD_SIZE"])
        threads = os.environ.get("OMP_NUM_THREADS")
        if threads is None or (threads == "1" and local_world > 1):
            # Launchers set one thread a process; ranks on a CPU share its cores evenly instead.
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world))
    import deepspeed  # late: it takes seconds, and a wrong option should be told at once

    if device.type == "cpu":
        # gloo carries all that the ranks say. DeepSpeed would first compile an all-reduce through
        # shared memory, which serves its inference alone: half a minute, and one build at a time.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(minutes=30),
        )
    except (dist.DistError, OSError) as error:
        # DistNetworkError: the port is taken, the host is unknown or does not answer.
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise TryAgain(
            f"the {world} ranks cannot meet at {place}: {one_line(error)[:200]}: set MASTER_PORT"
            " to a free port; python -m launcher.doctor under srun tests names and ports"
        ) from error
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device)


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


def broadcast(value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


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


def agree(error: str | None) -> None:
    """Raises rank 0's error on every rank, so that none is left waiting.

    Raises:
        UserError: rank 0 passed a message.
    """
    message = broadcast(error)
    if message is not None:
        raise UserError(message)


def main_only(ranks: Ranks, action: Any) -> Any:
    """Runs `action()` on rank 0 and gives its result, or its UserError, to every rank."""
    result, error = None, None
    if ranks.main:
        try:
            result = action()
        except UserError as caught:
            error = str(caught)
        except OSError as caught:
            error = describe(caught)
    agree(error)
    return broadcast(result)


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error).lower()
    gone = (
        "connection closed by peer",
        "connection reset by peer",
        "broken pipe",
        "timed out waiting",
        "connection timed out",
        "no route to host",
        "application timeout caused pair closure",
    )
    return isinstance(error, dist.DistError) or any(words in text for words in gone)


def explain(error: RuntimeError, world: int) -> str | None:
    """A failure of the machine as one line with the cure; None for what is no such failure."""
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full: take a smaller batch, more --STAGE.accumulation, --precision"
            " bf16, or --zero zero2, zero3 or zero3_offload"
        )
    if world > 1 and lost_peer(error):
        return (
            "another rank is gone: its message tells why; if there is none, it was killed (out of"
            " memory?): launch again, the stage goes on from its checkpoint"
        )
    return None


#: Refusals of a file system or network that may be over at the next launch.
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH)


def describe(error: OSError) -> str:
    """An operating system's refusal as one line with the cure."""
    cures = {
        errno.EACCES: "change its permissions or choose another folder",
        errno.EPERM: "change its permissions or choose another folder",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.ENOSPC: "the disk is full: free space or choose another disk",
        errno.EDQUOT: "the disk quota is used up: free space or choose another disk",
        errno.ENOENT: "it does not exist: check the path",
        errno.ENOTDIR: "a part of the path is a file: choose another folder",
        errno.EEXIST: "a file of that name is in the way: choose another folder",
        errno.EISDIR: "it is a folder, not a file",
    }
    cure = cures.get(error.errno or 0, "check the path and the disk")
    return f"{error.filename or 'a file'}: {error.strerror or error}: {cure}"
