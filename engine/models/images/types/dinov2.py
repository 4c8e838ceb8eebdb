"""DINOv2 (Oquab et al. 2023), without and with registers (Darcet et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types import vit
from selfdistill.engine.models.images.types.base import ModelType, Names, Tensors

_INSIDE = {
    "attention.attention.query": "attn.q",
    "attention.attention.key": "attn.k",
    "attention.attention.value": "attn.v",
    "attention.output.dense": "attn.proj",
    "norm1": "norm1",
    "norm2": "norm2",
    "layer_scale1": "ls1",
    "layer_scale2": "ls2",
}
_PLAIN_MLP = {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_GATED_MLP = {"mlp.weights_in": "mlp.fc1", "mlp.weights_out": "mlp.fc2"}
_PLAIN = vit.PLAIN | {"embeddings.register_tokens": "reg_token"}
#: Names of the two classes' encoders inside their classifiers.
_PREFIXES = ("dinov2.", "dinov2_with_registers.")


class DINOv2(ModelType):
    """See `ModelType`."""

    title = "DINOv2"
    model_types = ("dinov2", "dinov2_with_registers")
    names = Names("encoder.layer", _PLAIN, _INSIDE | _PLAIN_MLP, vit.ALSO | _GATED_MLP, _PREFIXES)
    defaults: ClassVar = {"layer_norm_eps": 1e-6, "patch_size": 14}
    silent = tuple(f"{prefix}embeddings.mask_token" for prefix in ("", *_PREFIXES))
    squares = True

    def fits(self, shape: Shape) -> bool:
        """See `ModelType`."""
        scaled = shape.class_token and shape.layer_scale and _ratio(shape) is not None
        return scaled and not (shape.pre_norm or shape.rope)

    def head(self, shape: Shape, pool: str) -> str | None:
        """See `ModelType`: its class reads CLS and the mean of the patches, and so either."""
        return f"{self._name(shape)}ForImageClassification"

    def settings(self, config: dict[str, Any], origin: str) -> dict[str, Any]:
        """See `ModelType`: the MLP's width follows from its ratio."""
        width, ratio = config.get("hidden_size", 768), config.get("mlp_ratio", 4)
        if type(width) is not int or type(ratio) not in (int, float) or not 0 < ratio < 64:
            raise UserError(
                f"{origin}: mlp_ratio is {ratio!r} in config.json: fetch the file again"
            )
        hidden, gated = int(width * ratio), bool(config.get("use_swiglu_ffn"))
        config["intermediate_size"] = _swiglu(hidden) if gated else hidden
        registers = config.get("num_register_tokens", 4)
        return {
            "layer_scale": True,
            "gated": gated,
            "registers": registers if config["model_type"] == self.model_types[1] else 0,
        }

    def antialias(self, shape: Shape) -> bool:
        """See `ModelType`: those with registers came later, with it."""
        return bool(shape.registers)

    def model_class(self, shape: Shape) -> str:
        """See `ModelType`."""
        return f"{self._name(shape)}Model"

    def config(self, shape: Shape) -> dict[str, Any]:
        """See `ModelType`."""
        registers = {"num_register_tokens": shape.registers} if shape.registers else {}
        return super().config(shape) | {
            "hidden_act": "gelu" if shape.gated else super().config(shape)["hidden_act"],
            "model_type": self.model_types[bool(shape.registers)],
            "layerscale_value": 1.0,
            "mlp_ratio": _ratio(shape),
            "use_swiglu_ffn": shape.gated,
            **registers,
        }

    def tensors(self, encoder: Mapping[str, Tensor], shape: Shape, prefix: str = "") -> Tensors:
        """See `ModelType`."""
        mlp = _GATED_MLP if shape.gated else _PLAIN_MLP
        return Names("encoder.layer", _PLAIN, _INSIDE | mlp).theirs(encoder, prefix)

    def classifier(
        self,
        shape: Shape,
        encoder: Mapping[str, Tensor],
        head: Mapping[str, Tensor],
        pool: str,
    ) -> tuple[dict[str, Any], Tensors]:
        """See `ModelType`: the half of the head that is not read is zero."""
        other = torch.zeros_like(head["weight"])
        halves = [head["weight"], other] if pool == "cls" else [other, head["weight"]]
        return super().classifier(
            shape, encoder, {"weight": torch.cat(halves, 1), "bias": head["bias"]}, pool
        )

    def prefix(self, shape: Shape) -> str:
        """See `ModelType`."""
        return _PREFIXES[bool(shape.registers)]

    @staticmethod
    def _name(shape: Shape) -> str:
        return "Dinov2WithRegisters" if shape.registers else "Dinov2"


def _swiglu(hidden: int) -> int:
    """Width behind the gate, of a hidden width, as transformers' Dinov2SwiGLUFFN rounds it."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def _ratio(shape: Shape) -> int | None:
    """The ``mlp_ratio`` that gives the MLP's width, a whole number in transformers; or None."""
    width = _swiglu if shape.gated else int
    ratios = range(1, 64)
    return next((r for r in ratios if width(r * shape.width) == shape.mlp_width), None)
