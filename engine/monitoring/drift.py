"""How far the encoder is from theta_init: the paper's ||theta_init - theta_t||_2 (Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.runtime.distributed import Ranks, total


class Drift:
    """Distance of a module's trained weights (fp32) from reference values.

    The references lie on the device, where they are compared: on rank 0 alone, or under ZeRO-3 on
    each rank those of its own shards.

    Args:
        engine: of the stage, as `deepspeed.initialize` returned it.
        module: part of it, whose parameters are watched.
        reference: name -> whole tensor; names that the module lacks are left out.
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
            whole, value = reference[name].float(), self._weight(parameter)
            if self.sharded:
                flat = torch.zeros(value.numel() * ranks.world)
                flat[: whole.numel()] = whole.flatten()
                whole = flat.view(ranks.world, -1)[ranks.rank].clone()
            self.pairs.append((parameter, whole.flatten().to(value.device)))

    def _weight(self, parameter: Tensor) -> Tensor:
        if self.sharded:
            # DeepSpeed hangs the shard onto the parameter, which its type does not know.
            shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
            return shard
        if self.masters and parameter.requires_grad:
            return self.masters.get(parameter, training_state.WEIGHT)
        return parameter.data

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The L2 distance, fp32 scalar on the device; 0 on ranks that do not know it.

        Every rank calls it.
        """
        square = torch.zeros((), device=self.ranks.device)
        for parameter, reference in self.pairs:
            difference = self._weight(parameter).float().flatten() - reference
            square += difference.pow(2).sum().to(square.device)
        return (total(square) if self.sharded else square).sqrt()
