"""AdamW with the paper's weight-decay groups, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from selfdistill.engine.config.stages import StageSection


def decays(name: str, parameter: torch.Tensor, stage: str) -> bool:
    """Whether weight decay applies to a parameter (groups of the authors' code, Table 9).

    Pre-training and distillation: not on 1-D parameters and biases. Fine-tuning: not on biases, the
    position embedding and the CLS token (LayerNorm scales do decay).
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "bias":
        return False
    if stage == "finetune":
        return leaf not in ("pos_embed", "cls_token") and "position_embeddings" not in name
    # Under ZeRO-3 a parameter is an empty tensor outside its module's forward.
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) > 1


def parameter_groups(module: nn.Module, stage: str, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in a decayed and an undecayed group."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for n, p in named if decays(n, p, stage)],
            "weight_decay": weight_decay,
        },
        {
            "params": [p for n, p in named if not decays(n, p, stage)],
            "weight_decay": 0.0,
        },
    ]
    return [g for g in groups if g["params"]]


def build(module: nn.Module, stage: str, plan: StageSection, *, offload: bool) -> Any:
    """The optimiser of a stage: torch's fused AdamW, or DeepSpeed's CPU Adam under offload."""
    groups = parameter_groups(module, stage, plan.weight_decay)
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=plan.lr, betas=plan.betas, eps=plan.eps, adamw_mode=True)
    return torch.optim.AdamW(groups, lr=plan.lr, betas=plan.betas, eps=plan.eps, fused=True)


def learning_rate(step: int, steps: int, plan: StageSection) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then decay to 0 at `steps`.

    The same curves as transformers' `get_linear_schedule_with_warmup` and, of half a wave,
    `get_cosine_schedule_with_warmup`. A pure function of the step, so that resuming needs no
    schedule state.
    """
    if step < plan.warmup:
        return plan.lr * step / max(1, plan.warmup)
    left = max(0.0, (steps - step) / max(1, steps - plan.warmup))
    if plan.schedule == "cosine":
        left = (1 + math.cos(math.pi * (1 - left))) / 2
    return plan.lr * left


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Sets the rate of every group (through DeepSpeed's wrapper, too)."""
    for group in optimizer.param_groups:
        group["lr"] = value
