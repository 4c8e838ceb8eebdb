"""A step's rate, memory, operations and waits, for the parts that time steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.say import say

_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpy", "cudaMemset")


def rates(
    step: Callable[[], Tensor], samples: int, seconds: float, rounds: int = 4
) -> tuple[list[float], float]:
    """Samples a second of some rounds, and the peak of memory in GiB.

    Args:
        step: takes one step.
        samples: of a step.
        seconds: that all rounds may take together.
        rounds: their number.
    """
    cuda = torch.cuda.is_available()
    for _ in range(3):
        step()
    _wait()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    step()
    _wait()
    each = max(1, int(seconds / rounds / max(time.perf_counter() - began, 1e-6)))
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(each):
            step()
        _wait()
        found.append(samples * each / (time.perf_counter() - began))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return found, peak


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def asked(step: Callable[[], Tensor]) -> dict[str, Any]:
    """What a step asks of the device: launches, and waits of the host; on a CPU operations."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as told:
        step()
    events = told.key_averages()
    reads = sum(e.count for e in events if e.key == "aten::_local_scalar_dense")
    if not torch.cuda.is_available():
        return {"operations": sum(e.count for e in events if e.key.startswith("aten::"))}
    # The profiler itself waits once for the device at its end.
    waits = sum(e.count for e in events if e.key.startswith(_WAITS))
    launches = sum(e.count for e in events if e.key.startswith(_LAUNCHES))
    return {"launches": launches, "waits": max(0, waits - 1), "host reads": reads}


def tell(
    name: str,
    step: Callable[[], Tensor],
    samples: int,
    seconds: float,
    *,
    flops: float = 0.0,
    peak_flops: float | None = None,
    count: bool = True,
    **more: Any,
) -> None:
    """Times a step and says its figures.

    Args:
        name: of the record.
        step: takes one step.
        samples: of a step.
        seconds: that the timed rounds may take.
        flops: of a sample.
        peak_flops: of the device.
        count: whether operations are counted, too.
        more: see `say`.
    """
    began = time.perf_counter()
    loss = float(step())
    told: dict[str, Any] = {"first step s": time.perf_counter() - began, "first loss": loss}
    found, peak = rates(step, samples, seconds)
    told["peak GiB"] = round(peak, 2)
    if flops and peak_flops:
        told["MFU %"] = round(100 * sorted(found)[len(found) // 2] * flops / peak_flops, 1)
    if count:
        told |= asked(step)
    say(name, "samples/s", found, **told, **more)
