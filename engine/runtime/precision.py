"""Precision and determinism: what `--precision auto` means on a device, and torch's switches.

bf16 is torch's autocast: weights, gradients, their sums over micro-batches and ranks, and AdamW's
moments are fp32; matrix products run in bf16, and LayerNorms and losses in fp32. So the weights of
exports, checkpoints and distances are the trained ones, and a feature leaves its last LayerNorm
unrounded. fp16, whose range needs a scaled loss, is DeepSpeed's own: fp16 weights, fp32 masters.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from selfdistill.engine.config.schema import Config


def fast_bf16(device: torch.device) -> bool:
    """Whether a device has units for bf16 products that are faster than its fp32 ones."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    told = {name.strip(): value.split() for name, value in pairs}
    flags, vendor = told.get("flags", []), told.get("vendor_id", [])
    # AMX doubles the rate and more. AVX-512's products do on AMD's cores; on Intel's they come at
    # fp32's rate, and oneDNN reaches two thirds of it (a Xeon of 2023, AMX hidden by its host: 75
    # against 114 GFLOPS a core).
    return "amx_bf16" in flags or ("avx512_bf16" in flags and "GenuineIntel" not in vendor)


def choose(asked: str, began: str | None, device: torch.device) -> tuple[str, str]:
    """The precision of a launch.

    Args:
        asked: --precision.
        began: that of the run's launches before; None for a new run.
        device: of this process.

    Returns:
        fp32, bf16 or fp16, and what to say of the choice ("" where the user made it).
    """
    if asked != "auto":
        return asked, ""
    if began not in (None, "auto"):
        slow = began == "bf16" and not fast_bf16(device)
        return str(began), "as the run began" + (", slow here: no fast bf16 units" if slow else "")
    if fast_bf16(device):
        return "bf16", "this device has units for it"
    return "fp32", "this device has no fast bf16 units"


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Around a forward pass that DeepSpeed does not run: what DeepSpeed puts around its own."""
    if dtype != torch.bfloat16:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def before_cuda(config: Config) -> None:
    """What must stand in the environment before CUDA and NCCL begin."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS, "Reproducibility"
        # Sums over ranks are then always added in the same order.
        os.environ.setdefault("NCCL_ALGO", "Ring")
        os.environ.setdefault("NCCL_PROTO", "Simple")


def set_switches(config: Config, device: torch.device) -> None:
    """Sets torch's switches of a launch, before its first product."""
    if device.type == "cuda":  # on a CPU the first would speak of another format
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.tf32
    torch.use_deterministic_algorithms(config.deterministic)
    # Else every new tensor is filled first, which makes only faulty programs repeatable. (torch
    # says nothing of this attribute's type.)
    torch.utils.deterministic.fill_uninitialized_memory = not config.deterministic  # type: ignore[attr-defined]
    # Of attention's backwards flash and plain products alone have a deterministic form.
    torch.backends.cuda.enable_mem_efficient_sdp(not config.deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not config.deterministic)
