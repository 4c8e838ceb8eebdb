"""PEFT's low-rank updates on our encoders. Imported where they are asked for: PEFT is an extra."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from torch import Tensor, nn

from selfdistill.data import rng
from selfdistill.engine.config.sections import LoraSection
from selfdistill.engine.models.images.rows_block import SplitLinear


class LowRankSplit(lora.Linear):
    """PEFT's layer around a `SplitLinear`, which can be asked for some queries."""

    def forward(self, x: Tensor, rows: slice | None = None) -> Any:
        """See `SplitLinear.forward`."""
        if rows is None:
            return super().forward(x)
        query, others = self.base_layer(x, rows)
        name, width = self.active_adapters[0], query.shape[-1]
        inner = self.lora_A[name](self.lora_dropout[name](x))
        update = self.scaling[name] * self.lora_B[name](inner)
        return query + update[:, rows, :width], others + update[..., width:]


def inject(encoder: nn.Module, layers: list[str], settings: LoraSection, seed: int) -> None:
    """Puts updates beside some layers, and freezes all else: A random, B zero, as PEFT has them.

    Args:
        encoder: changed in place.
        layers: names of linear layers.
        settings: rank, alpha, dropout.
        seed: of the first values.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=layers,
    )
    config._register_custom_module({SplitLinear: LowRankSplit})
    torch.manual_seed(int(rng.bits(seed, "lora", 0).random_raw()) >> 1)
    inject_adapter_in_model(config, encoder)
    for module in encoder.modules():
        if isinstance(module, lora.LoraLayer):
            # Autocast gives a product the type it wants; PEFT's cast to fp32 would be one more.
            module.cast_input_dtype_enabled = False
