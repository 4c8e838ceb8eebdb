"""Bytes that a sample's forward leaves for its backward, in closed form: an estimate.

What autograd saves, as PyTorch's own hooks count it (tests/launcher/plan/test_plan.py).
docs/planning.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.monitoring.flops import WHOLE, Part

#: Bytes of a value that goes into a LayerNorm.
NORM = 4


class Blocks(NamedTuple):
    """A stack of transformer blocks.

    Attributes:
        depth: number of blocks.
        width: D.
        mlp_width: M.
        heads: of attention.
        part: that is trained.
        layers: linear layers of a block, of which the last three make no queries, keys or values.
        recomputed: whether inputs alone are kept (`--checkpoint_activations`): see `peak`.
    """

    depth: int
    width: int
    mlp_width: int
    heads: int
    part: Part = WHOLE
    layers: int = 4
    recomputed: bool = False

    def more(self, layers: int) -> int:
        """Values that a token of the MLP's rows leaves beyond those of whole training.

        A frozen layer keeps no input: none of the MLP's two has, where attention alone is trained.
        An update keeps what lies between its factors, in so many layers.
        """
        unread = self.width + self.mlp_width if self.part.adapt == "attention" else 0
        return (self.part.rank * layers if self.part.adapt == "lora" else 0) - unread


def block_bytes(blocks: Blocks, tokens: int, size: int, *, mask: int = 0) -> int:
    """What one block saves of one sequence.

    Args:
        blocks: their shape.
        tokens: in the sequence.
        size: bytes of a value.
        mask: bytes of a value of dropout's masks, behind attention and MLP; 0 without dropout.
    """
    values = 2 * blocks.width * NORM + (6 * blocks.width + 2 * blocks.mlp_width) * size
    values += blocks.more(blocks.layers) * size
    # fp32: mean and deviation of two LayerNorms; a sum of exponentials a head.
    statistics = 4 * (2 * 2 + blocks.heads)
    return tokens * (values + statistics + 2 * blocks.width * mask)


class Cut(NamedTuple):
    """The last block of a stack of which only some rows are read.

    Attributes:
        rows: tokens of a sequence that are read.
        kept: vectors of width D that the block saves of every token all the same: its LayerNorm's
            output, keys, values (`RowsBlock`); attention's input and output, queries, keys and
            values (`LastRows`).
        norms: likewise inputs of LayerNorms.
    """

    rows: float
    kept: int
    norms: int


CLS_BLOCK, CLS_ROW = Cut(1, 3, 1), Cut(1, 5, 0)


def stack_bytes(
    blocks: Blocks, tokens: int, size: int, *, mask: int = 0, cut: Cut | None = None
) -> float:
    """What all blocks save of one sequence; one that is cut is never recomputed."""
    block = block_bytes(blocks, tokens, size, mask=mask)
    # Nothing before the first trained layer has a backward: the first LayerNorm keeps no input.
    frozen = 0 if blocks.part.adapt == "full" else tokens * blocks.width * NORM
    if blocks.recomputed:
        block, frozen = tokens * blocks.width * NORM, 0
    if cut is None:
        return blocks.depth * block - frozen
    width, statistics = blocks.width, 4 * (2 + blocks.heads)
    whole = tokens * (width * (cut.kept * size + cut.norms * NORM) + statistics)
    if blocks.part.adapt == "lora":
        whole += tokens * blocks.part.rank * (blocks.layers - 3) * size
    # Attention's output; LayerNorm's input and output, twice; the MLP.
    values = 2 * width * NORM + (5 * width + 2 * blocks.mlp_width + blocks.more(3)) * size
    rows = cut.rows * (values + 2 * width * mask)
    return (blocks.depth - 1) * block + whole + rows - frozen


def peak(saved: float, stacks: Sequence[tuple[Blocks, int]], size: int, *, mask: int = 0) -> float:
    """Most that is alive at once in the backward of a pass: what is saved, unless it is recomputed.

    Then the inputs of all blocks, and the larger of what is saved beside them, which the backward
    comes to first, and of one block, without its input.

    Args:
        saved: by the forward.
        stacks: its blocks, and the tokens of a sequence in each.
        size: bytes of a value.
        mask: see `block_bytes`.
    """
    if not any(blocks.recomputed for blocks, _ in stacks):
        return saved
    inputs = [tokens * blocks.width * NORM for blocks, tokens in stacks]
    every = sum(one * blocks.depth for one, (blocks, _) in zip(inputs, stacks, strict=True))
    block = max(
        block_bytes(blocks, tokens, size, mask=mask) - one
        for one, (blocks, tokens) in zip(inputs, stacks, strict=True)
    )
    return every + max(saved - every, block)


def _norm_bytes(blocks: Blocks, tokens: int, size: int) -> int:
    """The LayerNorm behind the last block, and what reads it."""
    return tokens * blocks.width * (NORM + size)


def encoder_blocks(shape: Shape, part: Part = WHOLE, recompute: bool = False) -> Blocks:
    """A ViT-MAE's encoder."""
    sizes = (shape.depth, shape.width, shape.mlp_width, shape.heads)
    return Blocks(*sizes, part, recomputed=recompute)


def decoder_blocks(shape: Shape, recompute: bool = False) -> Blocks:
    """A ViT-MAE's decoder."""
    width, depth = shape.decoder_width, shape.decoder_depth
    sizes = (depth, width, shape.decoder_mlp_width, shape.decoder_heads)
    return Blocks(*sizes, recomputed=recompute)


def whole_images(
    shape: Shape,
    size: int,
    *,
    mask: int = 0,
    cls_only: bool = False,
    part: Part = WHOLE,
    recompute: bool = False,
) -> float:
    """Of an image whose patches are all encoded, and all or the CLS vector alone are read."""
    tokens = shape.prefix + shape.patches
    masks = tokens * shape.width * mask  # behind the embeddings
    pixels = shape.patches * shape.patch_values * size if part.adapt == "full" else 0
    blocks = encoder_blocks(shape, part, recompute)
    cut = CLS_BLOCK if cls_only and shape.class_token and not recompute else None
    norm = _norm_bytes(blocks, 1 if cls_only else tokens, size)
    return pixels + masks + norm + stack_bytes(blocks, tokens, size, mask=mask, cut=cut)


def masked_images(
    shape: Shape, size: int, part: Part = WHOLE, recompute: bool = False, *, frozen: bool = False
) -> float:
    """Of an image in masked auto-encoding: kept patches, decoder, the loss on pixels in fp32.

    Of an encoder that is frozen, as in stage 0, its output alone is kept, which the decoder reads.
    """
    hidden = shape.patches - shape.kept
    kept_pixels, hidden_pixels = (n * shape.patch_values for n in (shape.kept, hidden))
    kept_pixels *= part.adapt == "full"
    tokens = shape.prefix + shape.kept
    encoder = stack_bytes(encoder_blocks(shape, part, recompute), tokens, size)
    encoder += _norm_bytes(encoder_blocks(shape), tokens, size)
    if frozen:
        encoder, kept_pixels = (1.0 + shape.kept) * shape.width * size, 0
    blocks, cut = decoder_blocks(shape, recompute), None if recompute else Cut(hidden, 3, 1)
    decoder = stack_bytes(blocks, 1 + shape.patches, size, cut=cut)
    decoder += _norm_bytes(blocks, hidden, size)
    # Input of the projection; the prediction; its difference to the target, and the target.
    return encoder + decoder + kept_pixels * size + hidden_pixels * (size + 4 + 4)


def whole_texts(
    blocks: Blocks, tokens: int, size: int, *, mask: int = 0, cut: Cut | None = None
) -> float:
    """Of a text that is encoded whole."""
    # Embeddings: their sum, LayerNorm's output comes with the first block.
    ends = tokens * blocks.width * (NORM + mask)
    return ends + stack_bytes(blocks, tokens, size, mask=mask, cut=cut)


def masked_texts(
    blocks: Blocks,
    tokens: int,
    masked: float,
    vocabulary: int,
    size: int,
    *,
    mask: int,
    cuts: bool,
    frozen: bool = False,
) -> float:
    """Of a text in masked language modelling; the head sees its masked tokens alone.

    Args:
        blocks: the encoder's.
        tokens: in the text.
        masked: of these, the masked ones.
        vocabulary: outputs of the head.
        size: bytes of a value.
        mask: see `block_bytes`.
        cuts: whether the last layer runs on the masked tokens alone (`LastRows`).
        frozen: whether the encoder is, as in stage 0: it then leaves nothing.
    """
    # Dense layer, GELU, LayerNorm; logits in fp32 (and in the network's type before), and either
    # their logarithms or, later, their gradient.
    logits = vocabulary * (8 + (size if size < 4 else 0))
    head = masked * (4 * blocks.width * size + logits)
    if frozen:
        return head
    cut = Cut(masked, 5, 0) if cuts else None
    return whole_texts(blocks, tokens, size, mask=mask, cut=cut) + head
