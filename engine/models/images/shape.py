"""The shape of an image encoder and of its MAE decoder: all but the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from selfdistill.data.errors import UserError
from selfdistill.data.formats.images import Size, sides, typed

#: Of an MLP, under timm's names.
Activation = Literal["gelu", "quick_gelu", "gelu_tanh"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)

#: Fields of a shape on which the encoder's weights and features depend.
ENCODER = (
    *("image_size", "patch_size", "width", "depth", "heads", "mlp_width", "layer_scale"),
    *("registers", "activation", "gated", "pre_norm", "class_token", "rope"),
)

#: The largest that a shape may have, well beyond any published: a file may say anything.
_MOST = {
    "patch_size": 2**14,
    **dict.fromkeys(("width", "decoder_width"), 2**16),
    **dict.fromkeys(("depth", "decoder_depth", "heads", "decoder_heads"), 2**10),
    **dict.fromkeys(("mlp_width", "decoder_mlp_width"), 2**18),
    "channels": 2**8,
}


@dataclass(frozen=True)
class Shape:
    """All that fixes a ViT-MAE apart from its weights; the defaults are the paper's.

    ``image_size`` and ``patch_size`` are in pixels, one side of a square; images may also be of a
    height and another width, in this order. ``mlp_width`` is the hidden width of a block's MLP.
    ``norm_eps`` is 1e-12 in Hugging Face's models and 1e-6 in FAIR's and timm's: it travels with
    the weights. ``mask_ratio`` is the share of patches that the encoder does not see in
    pre-training. ``normalize_pixels``: the target is each patch's pixels less their mean, over
    their standard deviation.

    The others are what later encoders have: ``layer_scale``, a learnt factor for each channel of
    what a block adds (DINOv2); ``registers``, tokens beside the patches that no one reads (DINOv2
    and 3, DeiT's distillation token); ``activation`` of the MLP, under timm's name; ``gated``, a
    SwiGLU in the MLP's place, ``mlp_width`` wide behind its gate (DINOv2 giant); ``pre_norm``, a
    LayerNorm before the first block (CLIP); no ``class_token``, but attention that pools the
    patches (SigLIP); ``rope``, the base of rotary positions in place of a table, 0 without
    (DINOv3).
    """

    image_size: Size
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_mlp_width: int = 2048
    channels: int = 3
    norm_eps: float = 1e-12
    mask_ratio: float = 0.75
    normalize_pixels: bool = True
    layer_scale: bool = False
    registers: int = 0
    activation: Activation = "gelu"
    gated: bool = False
    pre_norm: bool = False
    class_token: bool = True
    rope: float = 0.0

    def __post_init__(self) -> None:
        """Refuses a shape that no model can have, with a UserError."""
        if isinstance(self.image_size, tuple) and len(set(self.image_size)) == 1:
            object.__setattr__(self, "image_size", self.image_size[0])
        given = [("image_size", side, 2**14) for side in sides(self.image_size)]
        for name, value, most in (*given, *((n, getattr(self, n), m) for n, m in _MOST.items())):
            if type(value) is not int or not 0 < value <= most:
                raise UserError(f"{name} is {value!r}: it must be a whole number, 1 to {most}")
        if type(self.registers) is not int or not 0 <= self.registers <= 64:
            raise UserError(f"registers is {self.registers!r}: it must be a whole number, 0 to 64")
        if self.activation not in ACTIVATIONS:
            raise UserError(
                f"activation is {self.activation!r}: only {', '.join(ACTIVATIONS)} are known here"
            )
        if type(self.rope) not in (int, float) or not 0 <= self.rope <= 1e9:
            raise UserError(f"rope is {self.rope!r}: it must be a positive number, or 0 for none")
        if self.rope and self.width // self.heads % 4:
            raise UserError(
                f"width {self.width} over {self.heads} heads is no multiple of 4, as rotary"
                " positions need it: change one of them"
            )
        for name, value in (("norm_eps", self.norm_eps), ("mask_ratio", self.mask_ratio)):
            if type(value) not in (int, float) or not 0 < value < 1:
                raise UserError(f"{name} is {value!r}: it must be a number between 0 and 1")
        if any(side % self.patch_size for side in self.sides):
            near = [max(1, round(s / self.patch_size)) * self.patch_size for s in self.sides]
            square = isinstance(self.image_size, int)
            raise UserError(
                f"image size {typed(self.image_size)} is not a multiple of patch size"
                f" {self.patch_size}: take {typed(near[0] if square else (near[0], near[1]))}"
            )
        for name, width, heads in (
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ):
            if width % heads or width % 4:
                raise UserError(
                    f"{name} {width} is not a multiple of both 4 and its {heads} heads: change one "
                    "of them"
                )
        if not 0 < self.kept < self.patches:
            raise UserError(
                f"mask ratio {self.mask_ratio} keeps {self.kept} of {self.patches} patches: it "
                "must leave some, and hide some"
            )

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return sides(self.image_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.sides
        return height // self.patch_size, width // self.patch_size

    @property
    def patches(self) -> int:
        """Patches in an image, K."""
        return math.prod(self.grid)

    @property
    def prefix(self) -> int:
        """Tokens before the patches inside the encoder: the class token, registers."""
        return int(self.class_token) + self.registers

    @property
    def patch_values(self) -> int:
        """Values in a patch, p·p·C."""
        return self.patch_size**2 * self.channels

    @property
    def kept(self) -> int:
        """Patches that the masked view keeps, L."""
        return kept_patches(self.patches, self.mask_ratio)


def kept_patches(patches: int, ratio: float) -> int:
    """How many of ``patches`` are kept at a mask ratio: rounded down as transformers does."""
    return int(patches * (1 - ratio))
