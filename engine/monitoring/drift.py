"""How far the encoder is from theta_init: the paper's ||theta_init - theta_t||_2 (Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.models.adapters import updates
from selfdistill.engine.runtime.distributed import Ranks, total
from selfdistill.engine.runtime.zero import gathered


class Drift:
    """Distance of a module's trained weights (fp32) from reference values.

    The references lie on the device, where they are compared: on rank 0 alone, or under ZeRO-3 on
    each rank those of its own shards. What is frozen goes nowhere, though fp16 rounds it.

    Args:
        engine: of the stage, as `deepspeed.initialize` returned it.
        module: part of it, whose parameters are watched.
        reference: name -> whole tensor; names that the module lacks are left out. A low-rank update
            is a way from it by itself.
        ranks: this process.
    """

    def __init__(
        self, engine: Any, module: nn.Module, reference: Mapping[str, Tensor], ranks: Ranks
    ) -> None:
        self.ranks, self.sharded = ranks, engine.zero_optimization_stage() == 3
        # fp16 weights are the masters' rounded values; the masters are gathered by all ranks.
        self.masters = training_state.layout(engine, ranks.rank) if engine.fp16_enabled() else None
        self.pairs: list[tuple[Tensor, Tensor]] = []
        for name, parameter in module.named_parameters():
            if name not in reference or not (self.sharded or self.masters or ranks.main):
                continue
            if not parameter.requires_grad:
                continue
            whole, value = reference[name].float(), self._weight(parameter)
            if self.sharded:
                flat = torch.zeros(value.numel() * ranks.world)
                flat[: whole.numel()] = whole.flatten()
                whole = flat.view(ranks.world, -1)[ranks.rank].clone()
            self.pairs.append((parameter, whole.flatten().to(value.device)))
        known = self.sharded or self.masters or ranks.main
        self.updates = list(updates(module)) if known else []

    def _weight(self, parameter: Tensor) -> Tensor:
        if self.sharded:
            # DeepSpeed hangs the shard onto the parameter, which its type does not know.
            shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            return shard
        if self.masters:
            return self.masters.get(parameter, training_state.WEIGHT)
        return parameter.data

    def _whole(self, parameter: Tensor) -> Tensor:
        """A low-rank factor, whole, fp32."""
        if not self.sharded:
            return self._weight(parameter).float()
        with gathered(parameter) as whole:
            return whole.float().clone()

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The L2 distance, fp32 scalar on the device; 0 on ranks that do not know it.

        Every rank calls it.
        """
        square = torch.zeros((), device=self.ranks.device)
        for parameter, reference in self.pairs:
            difference = self._weight(parameter).float().flatten() - reference
            square += difference.pow(2).sum().to(square.device)
        for down, up, scale in self.updates:
            a, b = self._whole(down), self._whole(up)
            # ||B A||^2 = trace(A^T B^T B A): the update itself is never made.
            norm = scale**2 * ((b.T @ b) * (a @ a.T)).sum()
            if self.ranks.main or not self.sharded:  # else it would be summed over the ranks
                square += norm.to(square.device)
        return (total(square) if self.sharded else square).sqrt()
