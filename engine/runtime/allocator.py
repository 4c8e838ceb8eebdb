"""Memory between steps, and between stages: what is kept, and what is given back."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3), in glibc's malloc.h
# Bytes; glibc before 2.35 takes no more than the second.
_LARGEST = (2**30, 2**25)


def keep_memory() -> bool:
    """Keeps memory that tensors on the CPU give back for the next step's, instead of the system's.

    By default glibc returns large blocks at once, and every page of the next step's activations is
    then mapped and zeroed again. The process stays at its peak, which the next step needs anyway;
    blocks of more than 1 GiB still come and go.

    Returns:
        Whether the C library took it; others than glibc have no such setting.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # That of mmap first: to set the other alone would end glibc's own adjustment of it.
        larger = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST)
        return larger and bool(mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never
    return False


def release(engine: Any) -> None:
    """Gives back the memory of a DeepSpeed engine that has done its work.

    DeepSpeed 0.19.8 goes on holding an engine that it has destroyed: under ZeRO-3 in its stack of
    modules, in the autograd classes that it makes for each module, and in a cache of the modules'
    parameters. So the tensors are emptied, even if something still refers to them. Every rank calls
    it.

    Args:
        engine: of a stage or a teacher; not to be used again, nor its module.
    """
    held = list(_tensors([engine.module, engine.optimizer]))
    engine.destroy()
    for tensor in held:
        storage = tensor.untyped_storage()
        if storage.resizable():  # memory that NumPy or a file lent is not ours
            storage.resize_(0)
    del held
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _tensors(roots: list[Any]) -> Iterator[Tensor]:
    """Tensors that modules and DeepSpeed's and torch's optimisers hold, with their gradients."""
    found: set[int] = set()
    pending = list(roots)
    while pending:
        one = pending.pop()
        if id(one) in found:
            continue
        found.add(id(one))
        if isinstance(one, Tensor):
            yield one
            # ZeRO-3 hangs a parameter's shard onto it, ZeRO 1 and 2 the place of its master.
            gradient = one.grad if one.is_leaf else None
            pending += [gradient, *getattr(one, "__dict__", {}).values()]
        elif isinstance(one, torch.nn.Module):
            pending += [*one.parameters(), *one.buffers()]
        elif isinstance(one, dict):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, (list, tuple, set)):
            pending += one
        elif isinstance(one, torch.optim.Optimizer) or type(one).__module__.startswith(
            "deepspeed.runtime"
        ):
            pending += getattr(one, "__dict__", {}).values()
