"""What an export says of pictures on their way into the model, for each library in its own words.

An exported processor makes of a photo what packing made of it. transformers' own processors cut
squares and squash; what they cannot (rectangles that are cut, borders) is left to timm's, which
transformers wraps. Transparency, 16 bits and the like no processor treats as packing does: what
they need lies in ``selfdistill.json``, which our own commands read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfdistill.data.formats import fitting
from selfdistill.data.formats.fitting import Fit
from selfdistill.engine.models.images.shape import Shape

_MODES = {"crop": "center", "pad": "border", "squash": "squash"}


@dataclass(frozen=True)
class Pixels:
    """How pictures become a model's input.

    Attributes:
        mean: of each channel, of pixels in [0, 1].
        std: standard deviation of each channel.
        fit: how they come to the model's size.
    """

    mean: Sequence[float]
    std: Sequence[float]
    fit: Fit = "crop"

    @classmethod
    def of(
        cls, mean: Sequence[float], std: Sequence[float], own: Mapping[str, Any] | None
    ) -> Pixels:
        """With what an export says for this program of images as they were packed."""
        return cls(mean, std, fitting.of((own or {}).get("image") or {}))


def by_timm(shape: Shape, pixels: Pixels) -> bool:
    """Whether transformers' own processors cannot fit pictures as packing did."""
    square = isinstance(shape.image_size, int)
    return pixels.fit == "pad" or (pixels.fit == "crop" and not square)


def hugging_face(shape: Shape, pixels: Pixels) -> dict[str, Any]:
    """The content of preprocessor_config.json."""
    height, width = shape.sides
    cut = pixels.fit == "crop" and height == width
    size = {"height": height, "width": width}
    return {
        # ViTImageProcessor of transformers 4 has no crop; Bit's does the same work in all versions.
        # timm's reads what `model` puts into config.json.
        "image_processor_type": _named(shape, pixels),
        "do_center_crop": cut,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(pixels.mean),
        "image_std": list(pixels.std),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": height} if cut else size,
        "crop_size": size,
    }


def _named(shape: Shape, pixels: Pixels) -> str:
    return "TimmWrapperImageProcessor" if by_timm(shape, pixels) else "BitImageProcessor"


def model(shape: Shape, pixels: Pixels, *, wrapped: bool = False) -> dict[str, Any]:
    """What config.json must say for transformers to find the processor.

    Args:
        shape: the model's.
        pixels: how they become its input.
        wrapped: whether it is a timm model in transformers' wrapper, which would else take timm's
            processor.
    """
    if by_timm(shape, pixels):
        found = {"pretrained_cfg": timm(shape, pixels)}
        return found | {"image_processor_type": _named(shape, pixels)}
    return {"image_processor_type": _named(shape, pixels)} if wrapped else {}


def timm(shape: Shape, pixels: Pixels, classes: int = 0) -> dict[str, Any]:
    """Timm's ``pretrained_cfg``."""
    return {
        "input_size": [shape.channels, *shape.sides],
        "fixed_input_size": True,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": _MODES[pixels.fit],
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "num_classes": classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
