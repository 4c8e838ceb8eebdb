"""What a checkpoint of images holds: the record that readers of all formats fill."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.formats.images import Size, sides, typed
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN, IMAGENET_STD, Tensors

_BLOCK = re.compile(r"blocks\.([0-9]{1,6})\..+")
#: A decoder without weights may be so much larger than its encoder; a file may say anything.
_DECODER_GROWTH = 4


@dataclass
class Found:
    """What a checkpoint holds, under our names, not yet checked for completeness.

    `antialias`: how its makers resize positions; DINOv2's do it without. `target`: whether the
    file tells what pixels its decoder gives.
    """

    shape: Shape
    encoder: Tensors
    decoder: Tensors
    origin: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    notes: list[str] = field(default_factory=list)
    antialias: bool = True
    target: bool = True


def shape_of(origin: str, **values: Any) -> Shape:
    """A shape that a file tells; what is wrong with it is said of the file."""
    try:
        return Shape(**values)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def whole(size: Size, patch: int, rows: int) -> tuple[Size, list[str]]:
    """An image's size in whole patches, as its table has rows; and what to say of a border.

    SigLIP's so400m of 384 pixels has patches of 14, and leaves out the last 6.

    Args:
        size: in pixels.
        patch: side of a patch, in pixels.
        rows: of the table of positions, those of patches.

    Returns:
        The sides rounded down, where the table has just so many rows, else as they are.
    """
    pair = sides(size)
    height, width = (side // patch * patch for side in pair)
    if (height // patch) * (width // patch) != rows or (height, width) == pair:
        return size, []
    taken: Size = height if pair[0] == pair[1] else (height, width)
    own = typed(pair[0] if pair[0] == pair[1] else pair)
    note = f"{own} pixels are no whole patches of {patch}: images are {typed(taken)}"
    return taken, [f"{note}, for which it has positions"]


def normalise(found: Found, mean: Any, std: Any, place: object) -> None:
    """Notes mean and standard deviation: a number for each channel, or one for all.

    Raises:
        UserError: They are none, or nothing could be divided by them.
    """
    channels = found.shape.channels
    both = []
    for name, given in (("mean", mean), ("std", std)):
        values = list(given) if isinstance(given, list | tuple) else [given] * channels
        values = records.checked(list[records.Finite], values, f"{place}: {name}")
        small = name == "std" and min(values, default=0) < 1e-6
        if len(values) != channels or small or max(map(abs, values)) > 1e6:
            raise UserError(
                f"{place}: the {name} {values} is not one {'positive ' * (name == 'std')}number for"
                f" each of {channels} channels: correct it"
            )
        both.append(tuple(float(value) for value in values))
    found.mean, found.std = both


def depth_of(tensors: Mapping[str, Tensor]) -> int:
    """One more than the highest number of a block; what is no block is refused by name later."""
    return 1 + max((int(b[1]) for k in tensors if (b := _BLOCK.fullmatch(k))), default=0)


def check_sizes(found: Found) -> None:
    """Compares depths with the tensors that are there, before a model is built by them.

    Raises:
        UserError: They contradict each other.
    """
    shape = found.shape
    parts = (
        ("encoder", found.encoder, shape.depth),
        ("decoder", found.decoder, shape.decoder_depth),
    )
    for part, tensors, depth in parts:
        numbers = {int(block[1]) for name in tensors if (block := _BLOCK.fullmatch(name))}
        if tensors and len(numbers) != depth:
            raise UserError(
                f"{found.origin}: its {part} has {len(numbers)} blocks, its configuration asks for"
                f" {depth}: take a complete checkpoint"
            )
    if not found.decoder:
        own = shape.depth * shape.width * (4 * shape.width + 2 * shape.mlp_width)
        width = shape.decoder_width
        new = shape.decoder_depth * width * (4 * width + 2 * shape.decoder_mlp_width)
        if new > _DECODER_GROWTH * max(own, 10**7):
            raise UserError(
                f"{found.origin}: config.json describes a decoder of {new:,} weights beside an"
                f" encoder of {own:,}: correct decoder_hidden_size and decoder_num_hidden_layers"
            )
