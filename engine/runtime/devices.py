"""Which device this process computes on, and that no other rank has it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch

from selfdistill.data.errors import UserError
from selfdistill.engine.runtime.rendezvous import of_step


def take(env: MutableMapping[str, str]) -> torch.device:
    """Chooses this process's device, makes it torch's, and says so in the environment.

    DeepSpeed reads the number of its device from LOCAL_RANK, in three places.
    """
    device = choose(env)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        env["LOCAL_RANK"] = str(device.index)
    return device


def choose(env: Mapping[str, str]) -> torch.device:
    """The device of a process, by its number on the node.

    Args:
        env: with LOCAL_RANK, as `rendezvous.resolve` gives it, and SLURM's variables.

    Raises:
        UserError: an accelerator that is not supported, or more local ranks than GPUs.
    """
    if env.get("DS_ACCELERATOR") == "cpu":  # which DeepSpeed reads, too
        return torch.device("cpu")
    if not torch.cuda.is_available():  # ROCm is CUDA to torch
        found = torch.accelerator.current_accelerator()
        if found is not None and found.type not in ("cpu", "cuda"):
            raise UserError(
                f"this machine's accelerator is of the kind {found.type!r}, which is not supported:"
                " NVIDIA and AMD (ROCm) GPUs and processors are; DS_ACCELERATOR=cpu runs on its"
                " processor"
            )
        return torch.device("cpu")
    local, shown = int(env["LOCAL_RANK"]), torch.cuda.device_count()
    # srun shows a task that GPUs are bound to (--gpus-per-task, --gpu-bind) its own, from 0 on.
    # With --gpu-bind=none it shows all of the node's.
    own = env.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # such as a100:2
    bound = of_step(env) and (shown == 1 or (own.isdigit() and shown <= int(own)))
    index = 0 if bound else local
    if index >= shown:
        raise UserError(
            f"local rank {local} has no GPU: this machine shows {shown}; start fewer ranks"
            " (--num_gpus)"
        )
    return torch.device("cuda", index)


def uuid(device: torch.device) -> str | None:
    """The name that a GPU has however it is numbered; None of a CPU, or where none is told."""
    if device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return None if uuid is None else str(uuid)


def claim(store: Any, rank: int, name: str) -> None:
    """Refuses a GPU that another rank has, before NCCL meets it.

    Args:
        store: torch's, of all ranks.
        rank: this one.
        name: of its GPU.

    Raises:
        UserError: names both ranks.
    """
    host = socket.gethostname()
    key = f"gpu/{host}/{name}"
    number = store.add(key, 1)
    store.set(f"{key}/{number}", str(rank))
    if number > 1:
        first = store.get(f"{key}/1").decode()
        tasks = os.environ["LOCAL_WORLD_SIZE"]
        raise UserError(
            f"ranks {first} and {rank} on {host} have the same GPU ({name}); {tasks} ranks run"
            f" there: start as many as it has GPUs (SLURM: --gpus-per-node={tasks} beside"
            f" --ntasks-per-node={tasks}, or --gpus-per-task=1; deepspeed: --num_gpus)"
        )
