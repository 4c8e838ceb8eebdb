"""What a type of image encoder is: its configuration, its tensors' names, its classifier."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from selfdistill.engine.models.images.shape import Shape

Tensors = dict[str, Tensor]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

#: transformers' names of activations -> timm's.
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}

#: A block's tensor in any version of transformers.
_THEIR_BLOCK = re.compile(
    r"(?:encoder\.layers?|model\.layers?|layers?)\.(\d+)\.(.+)\.(weight|bias|lambda1)"
)
_OUR_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias|gamma)")


@dataclass(frozen=True)
class Names:
    """transformers' names of an encoder's tensors, and ours, which are timm's.

    Attributes:
        blocks: what stands before a block's number.
        plain: names outside the blocks.
        inside: names inside a block, without ``.weight`` and the like. q, k and v are parts of
            ours: rows of the fused ``attn.qkv`` in that order.
        also: further names inside a block, of other versions, which are read and not written.
        prefixes: what classes with a head put before all.
        dropped: leading dimensions of one that some of theirs lack, by our name.
        biased: whether q, k and v have their biases; those of others that lack are 0.
    """

    blocks: str
    plain: Mapping[str, str]
    inside: Mapping[str, str]
    also: Mapping[str, str] = field(default_factory=dict)
    prefixes: Sequence[str] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)
    biased: bool = True

    def ours(self, tensors: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
        """Renames theirs, and joins queries, keys and values; then the names that are unknown.

        A class with a head may keep two encoders, as CLIP's: those without our prefix are unknown
        as soon as one has it.
        """
        prefix = next((p for p in self.prefixes for name in tensors if name.startswith(p)), "")
        encoder: Tensors = {}
        unknown = []
        inside = {**self.inside, **self.also}
        for name, tensor in tensors.items():
            bare = name.removeprefix(prefix)
            block = _THEIR_BLOCK.fullmatch(bare)
            if not name.startswith(prefix):
                unknown.append(name)
            elif block is not None and block[2] in inside:
                leaf = "gamma" if block[3] == "lambda1" else block[3]
                encoder[f"blocks.{block[1]}.{inside[block[2]]}.{leaf}"] = tensor
            elif (own := self.plain.get(bare)) is not None:
                encoder[own] = tensor[(None,) * self.dropped.get(own, 0)]
            else:
                unknown.append(name)
        return fused(encoder if self.biased else _with_biases(encoder)), unknown

    def theirs(self, encoder: Mapping[str, Tensor], prefix: str = "") -> Tensors:
        """Renames ours, and parts queries, keys and values."""
        plain = {own: name for name, own in self.plain.items()}
        inside = {own: name for name, own in self.inside.items()}
        named: Tensors = {}
        for name, tensor in encoder.items():
            block = _OUR_BLOCK.fullmatch(name)
            if block is None:
                dropped = self.dropped.get(name, 0)
                named[prefix + plain[name]] = tensor.reshape(tensor.shape[dropped:])
                continue
            before = f"{prefix}{self.blocks}.{block[1]}"
            if block[2] == "attn.qkv":
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    named[f"{before}.{inside[f'attn.{letter}']}.{block[3]}"] = part
            else:
                leaf = "lambda1" if block[3] == "gamma" else block[3]
                named[f"{before}.{inside[block[2]]}.{leaf}"] = tensor
        return named


def _with_biases(tensors: Mapping[str, Tensor]) -> Tensors:
    """Adds zeros where q, k or v of a block have no bias."""
    biases = {
        f"{name.removesuffix('weight')}bias": weight.new_zeros(weight.shape[:1])
        for name, weight in tensors.items()
        if name.endswith((".attn.q.weight", ".attn.k.weight", ".attn.v.weight"))
    }
    return biases | dict(tensors)


def fused(tensors: Mapping[str, Tensor]) -> Tensors:
    """Joins the q, k, v of each block that has all three; an incomplete one is left out."""
    joined = {}
    for name, tensor in tensors.items():
        if ".attn.q." in name:
            parts = [tensors.get(name.replace(".attn.q.", f".attn.{p}.")) for p in "qkv"]
            whole = [p for p in parts if p is not None]
            if len(whole) == 3:
                joined[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(whole)
        elif ".attn.k." not in name and ".attn.v." not in name:
            joined[name] = tensor
    return joined


class ModelType(ABC):
    """One type of encoder.

    Attributes:
        title: what people call it.
        model_types: ``model_type`` in config.json.
        names: of its tensors.
        defaults: values of config.json where it is silent, by its own keys.
        extra: how names begin that a checkpoint has beside the encoder, and that are left out.
        silent: the same, of which nothing is said.
        mean: of each channel, where the checkpoint does not say it.
        std: the standard deviation, likewise.
        normalised_by: whose those are, in words.
        within: what stands before the encoder's names where it is exported alone: versions of
            transformers differ, and this is what all of them read.
        squares: whether transformers' classes take a table of positions of a square for granted;
            other images are for timm alone.
    """

    title: str
    model_types: tuple[str, ...]
    names: Names
    defaults: ClassVar[Mapping[str, Any]]
    extra: tuple[str, ...] = ("pooler.", "classifier.")
    silent: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    normalised_by = "ImageNet's"
    within = ""
    squares = False

    @abstractmethod
    def fits(self, shape: Shape) -> bool:
        """Whether a shape can be written as this type."""

    def has_class(self, shape: Shape) -> bool:
        """Whether transformers has a class of the encoder for images of this shape."""
        return not self.squares or isinstance(shape.image_size, int)

    @abstractmethod
    def head(self, shape: Shape, pool: str) -> str | None:
        """Transformers' class of a classifier; None where it has none that pools so."""

    def settings(self, config: dict[str, Any], origin: str) -> dict[str, Any]:
        """Values of a shape that only this type has.

        Args:
            config: config.json over the defaults; keys may be added, and are read later.
            origin: the model's name, for messages.

        Raises:
            UserError: It has what is not known here.
        """
        return {}

    def antialias(self, shape: Shape) -> bool:
        """Whether positions are resized with antialiasing: as timm does, or as its makers do."""
        return True

    def incoming(self, encoder: Tensors, origin: str) -> Tensors:
        """Ours from tensors that have our names already."""
        return encoder

    def outgoing(self, encoder: Mapping[str, Tensor], shape: Shape) -> Mapping[str, Tensor]:
        """The inverse of `incoming`."""
        return encoder

    def model_class(self, shape: Shape) -> str:
        """Transformers' class of the encoder alone."""
        return f"{type(self).__name__}Model"

    def config(self, shape: Shape) -> dict[str, Any]:
        """What config.json says of the encoder."""
        return {
            "architectures": [self.model_class(shape)],
            "attention_probs_dropout_prob": 0.0,
            "dtype": "float32",
            "hidden_act": activation_of(shape),
            "hidden_dropout_prob": 0.0,
            "hidden_size": shape.width,
            "image_size": shape.image_size,
            "initializer_range": 0.02,
            "intermediate_size": shape.mlp_width,
            "layer_norm_eps": shape.norm_eps,
            "model_type": self.model_types[0],
            "num_attention_heads": shape.heads,
            "num_channels": shape.channels,
            "num_hidden_layers": shape.depth,
            "patch_size": shape.patch_size,
            "qkv_bias": True,
        }

    def tensors(self, encoder: Mapping[str, Tensor], shape: Shape, prefix: str = "") -> Tensors:
        """The encoder's tensors for transformers."""
        return self.names.theirs(self.outgoing(encoder, shape), prefix)

    def classifier(
        self,
        shape: Shape,
        encoder: Mapping[str, Tensor],
        head: Mapping[str, Tensor],
        pool: str,
    ) -> tuple[dict[str, Any], Tensors]:
        """config.json, without the classes' names, and tensors of the class that `head` names."""
        config = self.config(shape) | {"architectures": [self.head(shape, pool)]}
        tensors = self.tensors(encoder, shape, self.prefix(shape))
        return config, tensors | {f"classifier.{k}": v for k, v in head.items()}

    def prefix(self, shape: Shape) -> str:
        """What its classifier puts before the encoder's names."""
        return self.names.prefixes[0]


def activation_of(shape: Shape) -> str:
    """Transformers' name of a shape's activation."""
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return "silu" if shape.gated else names[shape.activation]


def our_activation(config: Mapping[str, Any]) -> str:
    """Timm's name of a configuration's; unknown ones as they are, for `Shape` to refuse."""
    name = str(config.get("hidden_act", "gelu"))
    return _ACTIVATIONS.get(name, name)
