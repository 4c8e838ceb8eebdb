"""AdamW, its parameter groups (weight decay, rates of layers), learning rate, copies of weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.config.stages import FinetuneSection, KeptSection, StageSection
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.runtime.preemption import Preempted


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


def parameter_groups(module: nn.Module, stage: str, plan: StageSection) -> list[dict[str, Any]]:
    """Trainable parameters in a decayed and an undecayed group, of each layer under layer decay.

    `lr_scale` of a group, where it has one, is a factor of its learning rate; names of copies that
    are kept of the weights (`training_state.AVERAGE`, `BEST`) stand beside it.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    scales: dict[Tensor, float] = {}
    copies = {}
    if isinstance(plan, FinetuneSection) and plan.ema:
        copies[training_state.AVERAGE] = True
    if isinstance(plan, KeptSection) and plan.keep == "best":
        copies[training_state.BEST] = True
    if isinstance(plan, FinetuneSection) and plan.layer_decay < 1:
        model: Any = module.model
        scales = layer_scales(module, model.encoder, plan.layer_decay)
    groups = []
    for scale in sorted(set(scales.values())) or [1.0]:
        more = copies | ({"lr_scale": scale} if scales else {})
        layer = [(n, p) for n, p in named if scales.get(p, 1.0) == scale]
        for decayed in (True, False):
            params = [p for n, p in layer if decays(n, p, stage) == decayed]
            weight_decay = plan.weight_decay if decayed else 0.0
            groups.append({"params": params, "weight_decay": weight_decay, **more})
    return [g for g in groups if g["params"]]


#: In names of norms before the first layer: CLIP's, and DeBERTa's of its relative positions.
_BELOW = ("embed", "norm_pre", "encoder.LayerNorm")


def layer_scales(module: nn.Module, encoder: Any, decay: float) -> dict[Tensor, float]:
    """Factors of the parameters' rates: 1 of the head, `decay` of the last layer, and so on down.

    As timm's `param_groups_layer_decay` has it, after BEiT (Bao et al. 2022): the embeddings are
    below the first layer, with a norm before it; a norm behind the last one belongs to that. What
    pools belongs to the head.

    Args:
        module: classifier, or its objective.
        encoder: part of it, of any library.
        decay: from each layer to the one below.
    """
    stacks = [m for m in encoder.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    layers = max(stacks, key=lambda stack: len(list(stack.parameters())))
    depth = len(layers)
    number = dict.fromkeys(module.parameters(), depth + 1)
    for name, parameter in encoder.named_parameters():
        if "pool" not in name:
            behind = "norm" in name.lower() and not any(part in name for part in _BELOW)
            number[parameter] = depth if behind else 0
    for below, layer in enumerate(layers):
        number |= dict.fromkeys(layer.parameters(), below + 1)
    return {parameter: decay ** (depth + 1 - n) for parameter, n in number.items()}


def build(module: nn.Module, stage: str, plan: StageSection, *, offload: bool) -> Any:
    """The optimiser of a stage: torch's fused AdamW, or DeepSpeed's CPU Adam under offload."""
    groups = parameter_groups(module, stage, plan)
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
    warmup = plan.warmup_steps(steps)
    if step < warmup:
        return plan.lr * step / max(1, warmup)
    left = max(0.0, (steps - step) / max(1, steps - warmup))
    if plan.schedule == "cosine":
        left = (1 + math.cos(math.pi * (1 - left))) / 2
    return plan.lr * left


def set_learning_rate(optimizer: Any, value: float) -> None:
    """Sets the rate of every group, times its own factor (through DeepSpeed's wrapper, too)."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


class Copy:
    """A copy of an engine's weights, at first of those that it starts with.

    Kept in fp32 where the optimiser keeps weights and moments, in the same parts, and saved in
    checkpoints with them.

    Args:
        engine: ready for its next step, perhaps with the copy of a checkpoint.
        ranks: this process.
    """

    key: ClassVar[str]

    def __init__(self, engine: Any, ranks: Ranks) -> None:
        self.how = training_state.layout(engine, ranks.rank)
        self.weights, self.state = list(self.how.flats()), self.how.optimizer.state
        kept = [self.state.get(flat, {}).get(self.key) for flat in self.weights]
        self.copies = [
            flat.detach().clone() if copy is None else copy
            for flat, copy in zip(self.weights, kept, strict=True)
        ]

    def remember(self) -> None:
        """Lays the copy where a checkpoint finds it."""
        for flat, copy in zip(self.weights, self.copies, strict=True):
            if self.state.get(flat):  # AdamW fills a state that is empty: the copy comes after
                self.state[flat][self.key] = copy

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the copy takes the weights' place. Every rank calls it.

        Whoever leaves by another error than `Preempted`, on which the ranks agreed, leaves alone:
        nothing is put back, since the others would not take part.
        """
        self._exchange()
        leaving: Preempted | None = None
        try:
            yield
        except Preempted as met:
            leaving = met
        self._exchange()
        if leaving is not None:
            raise leaving

    @torch.no_grad()
    def _exchange(self) -> None:
        for flat, copy in zip(self.weights, self.copies, strict=True):
            weight = flat.clone()
            flat.copy_(copy)
            copy.copy_(weight)
        self.how.publish()


class Average(Copy):
    """The exponential moving average of the weights.

    Args:
        engine: see `Copy`.
        decay: share of the average that a step leaves.
        ranks: this process.
    """

    key = training_state.AVERAGE

    def __init__(self, engine: Any, decay: float, ranks: Ranks) -> None:
        super().__init__(engine, ranks)
        self.blend = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Takes in the weights of now, after the optimiser's step."""
        self.blend(self.copies, self.weights, None)
        self.remember()


class Best(Copy):
    """The weights that measured best so far."""

    key = training_state.BEST

    @torch.no_grad()
    def take(self) -> None:
        """Takes the weights of now."""
        for flat, copy in zip(self.weights, self.copies, strict=True):
            copy.copy_(flat)
