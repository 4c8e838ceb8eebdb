"""What a failure was, and whose: the user's (exit code 2), the machine's or another rank's (75)."""

from __future__ import annotations

import errno
import re
import socket

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from selfdistill.data.cli import format_error
from selfdistill.data.errors import PASSING, PeerLost, TryAgain, UserError

_MEMORY = (
    "the GPU's memory is full: take a smaller batch, more --STAGE.accumulation, --precision bf16,"
    " or --zero zero2, zero3 or zero3_offload"
)

#: Words of CUDA and NCCL -> what the user can do. They come from every rank, however often one
#: tries again.
_USERS = {
    r"out of memory": _MEMORY,
    r"duplicate gpu detected": (
        "two ranks of a node have the same GPU: start as many as it has GPUs (--num_gpus; SLURM:"
        " --gpus-per-node as many as --ntasks-per-node)"
    ),
    r"nccl ?invalid ?usage|invalid usage": (
        "NCCL is used in a way that it refuses: look at NCCL_ variables of the environment, and"
        " whether every rank has a GPU of its own; NCCL_DEBUG=INFO tells more"
    ),
    r"nccl ?invalid ?argument|invalid argument": (
        "CUDA or NCCL refuses an argument: look at NCCL_ variables of the environment;"
        " NCCL_DEBUG=INFO tells more"
    ),
}

#: Words of CUDA and its driver when a device, not a program, is at fault.
_MACHINES = (
    r"uncorrectable ecc|ecc error|nvlink|\bxid\b|fallen off the bus|hardware stack error"
    r"|device is lost|device unavailable|busy or unavailable"
)

_GONE = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "timed out waiting",
    "connection timed out",
    "no route to host",
    "application timeout caused pair closure",
)


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in text for words in _GONE)


def explain(error: RuntimeError, world: int, device: torch.device) -> UserError | None:
    """A failure as an error of one line with the cure; None for what is a fault of this program.

    Args:
        error: as torch raised it, with the words of CUDA or NCCL.
        world: number of ranks.
        device: of this process.

    Returns:
        UserError for a mistake of the user's; TryAgain for a device that failed; PeerLost for
        another rank that is gone.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return UserError(_MEMORY)
    text = " ".join(str(error).lower().split())
    # torch.AcceleratorError, which CUDA's errors are since torch 2.8, says no more by its type.
    if re.search(_MACHINES, text):
        host = socket.gethostname()
        return TryAgain(
            f"{device} of {host} failed ({format_error(error)[:160]}): launch again, the stage goes"
            " on from its checkpoint; if it comes again, leave that machine out (sbatch --exclude="
            f"{host})"
        )
    by_device = isinstance(error, dist.DistError) or "nccl" in text or "cuda" in text
    for words, cure in _USERS.items():
        if by_device and re.search(words, text):
            return UserError(cure)
    if world > 1 and lost_peer(error):
        return PeerLost(
            "another rank is gone: its message tells why; if there is none, it was killed (out of"
            " memory?): launch again, the stage goes on from its checkpoint"
        )
    return None


def refused(error: OSError | SafetensorError | UserError, line: str = "") -> UserError:
    """An error to raise elsewhere: TryAgain, where what the system refused may be over next time.

    A new one: the old one's frames hold files and locks for as long as it lives.

    Args:
        error: safetensors tells the system's number in its words alone.
        line: what to say, in place of the error's own words.
    """
    if isinstance(error, UserError):
        return (TryAgain if isinstance(error, TryAgain) else UserError)(line or str(error))
    if isinstance(error, OSError):
        number, line = error.errno, line or describe(error)
    else:
        said = re.search(r"\(os error (\d+)\)", str(error))
        number, line = int(said[1]) if said else None, line or format_error(error)
    return (TryAgain if number in PASSING else UserError)(line)


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
