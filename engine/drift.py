"""How far the encoder is from theta_init: the paper's ||theta_init - theta_t||_2 (Figure 5)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.distributed import Ranks, total


class Drift:
    """Distance of a module's parameters from reference values; ZeRO-3 shards are compared in place.

    Args:
        module: module whose parameters are watched (after `deepspeed.initialize`).
        reference: name -> whole tensor; names that the module lacks are left out.
        ranks: this process.
    """

    def __init__(self, module: nn.Module, reference: Mapping[str, Tensor], ranks: Ranks) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.ranks, self.sharded = ranks, False
        for name, parameter in module.named_parameters():
            if name not in reference:
                continue
            whole = reference[name].float()
            shard = getattr(parameter, "ds_tensor", None)
            if shard is not None:
                self.sharded = True
                flat = torch.zeros(shard.numel() * ranks.world)
                flat[: whole.numel()] = whole.flatten()
                whole = flat.view(ranks.world, -1)[ranks.rank].clone()
            self.pairs.append((parameter, whole))

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The L2 distance, fp32 scalar on the device. Every rank calls it."""
        square = torch.zeros((), device=self.ranks.device)
        for parameter, reference in self.pairs:
            value = getattr(parameter, "ds_tensor", None) if self.sharded else parameter.data
            assert value is not None
            if reference.device != value.device:
                reference = reference.to(value.device)
            square += (value.float().flatten() - reference.flatten()).pow(2).sum().to(square.device)
        return (total(square) if self.sharded else square).sqrt()
