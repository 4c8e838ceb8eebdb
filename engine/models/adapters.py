"""What stages 1 and 2 train of an encoder: all of it, its attention, or low-rank updates (LoRA).

Low-rank updates are PEFT's: W x becomes W x + (alpha / rank) B A x, with W frozen, A [rank, in] and
B [out, rank] trained (Hu et al. 2021, arXiv 2106.09685). Attention alone: arXiv 2503.18873.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.engine.config.schema import Config
from selfdistill.engine.config.sections import LoraSection

#: What timm and transformers call the module of attention in a block.
_ATTENTION = {"attn", "attention", "self_attn"}
#: PEFT's names: the frozen layer, and A and B of its update.
_BASE, _A, _B = "base_layer.", "lora_A.default.", "lora_B.default."


def check(config: Config) -> None:
    """Refuses what --adapt cannot work with, before anything is trained.

    Raises:
        UserError: PEFT is not installed; fp16, in which the frozen weights would be rounded.
    """
    if config.adapt == "full":
        return
    if config.precision == "fp16":
        raise UserError(
            f"--precision fp16 rounds the weights that --adapt {config.adapt} freezes, also in"
            " exports: take bf16 or fp32"
        )
    if config.adapt == "lora" and importlib.util.find_spec("peft") is None:
        raise UserError(
            "--adapt lora needs PEFT, which is not installed: pip install peft, or take --adapt"
            " attention"
        )


def record(config: Config) -> dict[str, Any]:
    """Settings that the figures of stages 1 and 2 depend on, which must be equal at resume."""
    lora = config.lora.model_dump() if config.adapt == "lora" else {}
    return {"adapt": config.adapt, **{f"lora.{name}": value for name, value in lora.items()}}


def linear_layers(encoder: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of an encoder's blocks, by name: those that lie in a numbered module."""
    return {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and any(part.isdigit() for part in name.split("."))
    }


def attention_layers(encoder: nn.Module) -> dict[str, nn.Linear]:
    """Of these, the projections to queries, keys and values, and of attention's output."""
    found = linear_layers(encoder).items()
    return {name: layer for name, layer in found if _ATTENTION & set(name.split("."))}


def adapt(encoder: nn.Module, config: Config) -> None:
    """Freezes an encoder but for what `--adapt` names; lora: puts updates of zero beside it.

    Args:
        encoder: with its weights, whole; changed in place.
        config: of the run. The first values of A are drawn by its seed: the same on all ranks.

    Raises:
        UserError: PEFT is missing, or the rank is too large.
    """
    if config.adapt == "full":
        return
    encoder.requires_grad_(False)
    if config.adapt == "attention":
        layers = attention_layers(encoder)
        assert layers, f"no attention in {type(encoder)}"
        for layer in layers.values():
            layer.requires_grad_(True)
        return
    check(config)
    _check_rank(linear_layers(encoder), config.lora)
    from selfdistill.engine.models.low_rank import inject

    inject(encoder, list(linear_layers(encoder)), config.lora, config.seed)


def _check_rank(layers: Mapping[str, nn.Linear], settings: LoraSection) -> None:
    """Refuses updates that are no smaller than the weights themselves."""
    width = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    if settings.rank >= width:
        raise UserError(
            f"--lora.rank {settings.rank}: the encoder's layers are {width} wide, and updates of"
            f" that rank are larger than the weights: give at most {max(1, width // 2)}, or --adapt"
            " full"
        )


def updates(encoder: nn.Module) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A [rank, in], B [out, rank] and alpha / rank of each adapted layer."""
    for module in encoder.modules():
        if hasattr(module, "lora_A"):
            pair: Any = module
            yield pair.lora_A["default"].weight, pair.lora_B["default"].weight, _scale(pair)


def _scale(layer: Any) -> float:
    return float(layer.scaling["default"])


def merged(state: Mapping[str, Tensor], settings: LoraSection) -> dict[str, Tensor]:
    """A state dict with updates added to their weights, under the names of a plain model.

    Args:
        state: whole tensors; without updates it is returned as it is.
        settings: rank and alpha of the updates.
    """
    factors = {name: value for name, value in state.items() if _A in name or _B in name}
    plain = {n.replace(_BASE, ""): value for n, value in state.items() if n not in factors}
    return added(plain, factors, settings)


def added(
    plain: Mapping[str, Tensor], factors: Mapping[str, Tensor], settings: LoraSection
) -> dict[str, Tensor]:
    """A plain model's tensors with updates added: W + (alpha / rank) B A.

    Args:
        plain: name -> whole tensor.
        factors: A and B of each adapted layer, by PEFT's names.
        settings: rank and alpha.

    Raises:
        RuntimeError: shapes do not fit.
    """
    found = dict(plain)
    for name in factors:
        if _A in name:
            layer = name.removesuffix(f"{_A}weight")
            update = factors[f"{layer}{_B}weight"] @ factors[name]
            found[f"{layer}weight"] = (
                found[f"{layer}weight"] + settings.alpha / settings.rank * update
            )
    return found
