"""Devices that a plan can be made for: name, memory and peak."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, NamedTuple

from selfdistill.data.errors import UserError

if TYPE_CHECKING:
    import torch


class Device(NamedTuple):
    """A device.

    Attributes:
        name: as CUDA reports it, or as near as `engine.monitoring.flops.PEAKS` needs it.
        memory: in bytes. A data sheet's "80 GB" counts as 80e9: what the card has beyond (an H100
            85.5e9) is left to CUDA's context, NCCL and fragmentation.
        peak: dense FLOP/s at the precision that was asked for.
    """

    name: str
    memory: float
    peak: float


#: --device -> (name that CUDA reports, memory in GB by the vendor's data sheet).
DEVICES: dict[str, tuple[str, float]] = {
    "b200": ("NVIDIA B200", 180),
    "h200": ("NVIDIA H200", 141),
    "gh200": ("NVIDIA GH200 480GB", 96),
    "h100": ("NVIDIA H100 80GB HBM3", 80),
    "h100-pcie": ("NVIDIA H100 PCIe", 80),
    "h100-nvl": ("NVIDIA H100 NVL", 94),
    "a100": ("NVIDIA A100-SXM4-80GB", 80),
    "a100-40gb": ("NVIDIA A100-SXM4-40GB", 40),
    "a40": ("NVIDIA A40", 48),
    "a30": ("NVIDIA A30", 24),
    "a10": ("NVIDIA A10", 24),
    "rtx-a6000": ("NVIDIA RTX A6000", 48),
    "l40s": ("NVIDIA L40S", 48),
    "l40": ("NVIDIA L40", 48),
    "l4": ("NVIDIA L4", 24),
    "v100": ("Tesla V100-SXM2-32GB", 32),
    "v100-16gb": ("Tesla V100-SXM2-16GB", 16),
    "t4": ("Tesla T4", 16),
    "rtx-3090": ("NVIDIA GeForce RTX 3090", 24),
    "rtx-4090": ("NVIDIA GeForce RTX 4090", 24),
    "mi300x": ("AMD Instinct MI300X", 192),
    "mi250x": ("AMD Instinct MI250X", 64),  # shows as two devices: half of the card
}


def find(
    name: str,
    dtype: torch.dtype,
    *,
    tf32: bool = True,
    memory_gb: float | None = None,
    tflops: float | None = None,
) -> Device:
    """The device of a name, its figures replaced by those that are given.

    Args:
        name: a key of `DEVICES`, in any case; another one if both figures are given.
        dtype: of the matrix products.
        tf32: whether those of float32 are TF32's, where the device has it.
        memory_gb: memory in GB (1e9 bytes).
        tflops: dense peak in TFLOP/s.

    Raises:
        UserError: an unknown device, or one without units for the precision.
    """
    from selfdistill.engine.monitoring.flops import peak_flops  # and torch: late, it takes seconds

    key = _key(name)
    if key not in DEVICES:
        if memory_gb is not None and tflops is not None:
            return Device(name, memory_gb * 1e9, tflops * 1e12)
        close = difflib.get_close_matches(key, DEVICES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(
            f"--device {name}: not known; there are {', '.join(DEVICES)}{hint} For another one give"
            " --memory_gb and --tflops"
        )
    full_name, memory = DEVICES[key]
    peak = peak_flops(full_name, dtype, tf32=tf32) if tflops is None else tflops * 1e12
    if peak is None:
        precision = str(dtype).removeprefix("torch.")
        raise UserError(
            f"--device {name}: it has no matrix units for {precision}: take another --precision, or"
            " give --tflops"
        )
    return Device(full_name, (memory if memory_gb is None else memory_gb) * 1e9, peak)


def best_precision(name: str) -> str:
    """What `--precision auto` takes on a device: fp32 where it is known to have no bf16 units."""
    import torch

    from selfdistill.engine.monitoring.flops import peak_flops

    known = DEVICES.get(_key(name))
    return "fp32" if known and peak_flops(known[0], torch.bfloat16) is None else "bf16"


def _key(name: str) -> str:
    return name.lower().replace("_", "-").replace(" ", "-")
