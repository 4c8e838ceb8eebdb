"""FLOPs of a training step, in closed form, and the peak FLOP/s of devices: together, MFU.

Counted are matrix products alone, 2 FLOPs a multiply-add: linear layers, the patch projection, and
attention's scores and weighted sums. A backward pass counts as twice its forward. Recomputation
(activation checkpointing) is not counted: MFU is about the model's FLOPs, not the hardware's.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import torch

from selfdistill.engine.models.images.shape import Shape

Stage = Literal["decoder", "pretrain", "distill", "finetune"]
TeacherMode = Literal["replicated", "sharded", "cached"]


class Part(NamedTuple):
    """What stages 1 and 2 train of an encoder, as `--adapt` says; rank: of low-rank updates."""

    adapt: Literal["full", "attention", "lora"] = "full"
    rank: int = 0


WHOLE = Part()


def step_flops(
    shape: Shape,
    stage: Stage,
    *,
    teacher: TeacherMode,
    classes: int = 0,
    cls_only: bool = False,
    part: Part = WHOLE,
) -> float:
    """FLOPs that one image costs in one optimiser step.

    ViT-B/16 at 224 pixels in distillation, all rows: teacher 35.1, student's full view 105.4, MAE
    57.2, in all 197.7 GFLOP.

    Args:
        shape: of the model.
        stage: decoder (of MAE, alone), pretrain (MAE), distill (MAE, the student's full view, the
            teacher), finetune.
        teacher: in distill; a cached one costs nothing in a step.
        classes: in finetune, outputs of the head.
        cls_only: of the full view the CLS vector alone is read (`RowsBlock`).
        part: of the encoder that pretrain and distill train.

    Returns:
        FLOPs an image, forward and backward.
    """
    full = encoder_flops(shape, shape.patches, cls_only)
    if stage == "finetune":
        return 3 * (full + 2 * shape.width * classes)
    mae = encoder_flops(shape, shape.kept) + decoder_flops(shape)
    if stage == "decoder":  # the encoder is frozen, and has no backward
        return mae + 2 * decoder_flops(shape)
    masked = encoder_step(shape, shape.kept, part=part) + 3 * decoder_flops(shape)
    if stage == "pretrain":
        return masked
    student = encoder_step(shape, shape.patches, cls_only, part)
    return masked + student + (0 if teacher == "cached" else full)


def encoder_step(shape: Shape, patches: int, cls_only: bool = False, part: Part = WHOLE) -> float:
    """FLOPs of the encoder's forward and backward; the arguments are those of `encoder_flops`."""
    if part.adapt == "full":
        return 3 * encoder_flops(shape, patches, cls_only)
    tokens, depth = shape.prefix + patches, shape.depth
    mlp = 3 * shape.mlp_width / 2 if shape.gated else shape.mlp_width
    sizes = (shape.width, mlp, part)
    # What is before the first block is frozen, and has no backward.
    total = 2.0 * patches * shape.patch_values * shape.width + 2 * pool_flops(shape, patches)
    for number in range(depth):
        rows = 1 if cls_only and shape.class_token and number == depth - 1 else tokens
        total += adapted_block(tokens, rows, rows, *sizes, first=number == 0, joint=True)
    return total


def adapted_block(
    tokens: int,
    queries: float,
    rows: float,
    width: int,
    mlp_width: float,
    part: Part,
    *,
    first: bool,
    joint: bool = False,
) -> float:
    """FLOPs of forward and backward of a block of which a part is trained.

    A linear layer's backward is two products, for its input's gradient and for its weight's; the
    second is left out where it is frozen. Nothing before the first block needs a gradient.

    Args:
        tokens: of the sequence.
        queries: rows whose queries are computed.
        rows: of output projection and MLP.
        width: of the block, D.
        mlp_width: M.
        part: not the whole.
        first: it is the first block.
        joint: one layer makes queries, keys and values.
    """
    into, out = 2 * width**2 * (queries + 2 * tokens), 2 * rows * width**2
    mlp, mixing = 4 * rows * width * mlp_width, 4 * queries * tokens * width
    frozen = 2 * (into + out + mlp) + 3 * mixing - (into if first else 0)
    if part.adapt == "attention":
        return frozen + into + out
    down = 2 * part.rank * tokens * width * (1 if joint else 3)
    ends = 2 * part.rank * (3 * tokens * width + rows * (2 * width + 2 * (width + mlp_width)))
    return frozen + 3 * (down + ends) - (down if first else 0)


def encoder_flops(shape: Shape, patches: int, cls_only: bool = False) -> float:
    """FLOPs of the encoder's forward on one image of which it sees `patches` patches."""
    project = 2 * patches * shape.patch_values * shape.width
    tokens, width = shape.prefix + patches, shape.width
    mlp = 3 * shape.mlp_width / 2 if shape.gated else shape.mlp_width  # gate, value and output
    block = block_flops(tokens, width, mlp)
    part = cls_only and shape.class_token
    last = part_flops(tokens, 1, width, mlp) if part else block
    return project + (shape.depth - 1) * block + last + pool_flops(shape, patches)


def pool_flops(shape: Shape, patches: int) -> float:
    """FLOPs of the attention that pools in a class token's place; 0 where there is one."""
    if shape.class_token:
        return 0
    width = shape.width
    # One query; keys and values of all; one row behind them.
    attention = 2 * (2 * patches * (width**2 + width) + 2 * width**2)
    return attention + 4 * width * shape.mlp_width


def decoder_flops(shape: Shape, whole: bool = False) -> float:
    """FLOPs of the decoder's forward on one image; `whole`: it predicts the kept patches too."""
    tokens, hidden = 1 + shape.patches, shape.patches - shape.kept
    width, mlp = shape.decoder_width, shape.decoder_mlp_width
    embed = 2 * (1 + shape.kept) * shape.width * width
    block = block_flops(tokens, width, mlp)
    last = block if whole else part_flops(tokens, hidden, width, mlp)
    predict = 2 * (tokens if whole else hidden) * width * shape.patch_values
    return embed + (shape.decoder_depth - 1) * block + last + predict


def block_flops(tokens: int, width: int, mlp_width: float) -> float:
    """FLOPs of a transformer block's forward on one sequence.

    Multiply-adds: queries, keys, values and output 4 T D^2, scores and weighted sum 2 T^2 D, MLP
    2 T D M.
    """
    return 2 * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * mlp_width)


def part_flops(tokens: int, rows: int, width: int, mlp_width: float) -> float:
    """FLOPs of a block's forward for some of its tokens' rows (`RowsBlock`).

    Multiply-adds: keys and values 2 T D^2, queries and output 2 R D^2, their scores and weighted
    sum 2 R T D, their MLP 2 R D M.
    """
    return 2 * (2 * (tokens + rows) * width**2 + 2 * rows * (tokens * width + width * mlp_width))


def rows_block_flops(tokens: int, rows: float, width: int, mlp_width: int) -> float:
    """FLOPs of a block's forward whose output projection and MLP run on some rows alone.

    As `block_flops`, of which queries, keys, values and attention stay whole.
    """
    spared = 2 * (tokens - rows) * (width**2 + 2 * width * mlp_width)
    return block_flops(tokens, width, mlp_width) - spared


class Peak(NamedTuple):
    """A device's dense peak in TFLOP/s; None where it has no such units.

    Attributes:
        name: pattern in the name that CUDA reports; the first in the table that is found counts.
        fp32: without tensor cores, PyTorch's default for fp32 matrix products.
        tf32: with `torch.set_float32_matmul_precision("high")`.
        fp16: tensor cores with fp32 accumulation.
        bf16: the same.
    """

    name: str
    fp32: float
    tf32: float | None
    fp16: float
    bf16: float | None


# Vendors' data sheets; figures with sparsity are halved here. NVIDIA: the data sheet of each; for
# GeForce the white papers of GA102 and Ada (appendix A). AMD: the sheets of Instinct MI300X and
# MI250X, which shows as two devices: half of its sheet's figures.
PEAKS = (
    Peak(r"\bB200\b", 75.0, 1125.0, 2250.0, 2250.0),
    Peak(r"\bH(100|200) NVL\b", 60.0, 417.5, 835.0, 835.0),
    Peak(r"\bH100 PCIe\b", 51.2, 378.0, 756.0, 756.0),
    Peak(r"\b(H100|H200|GH200)\b", 66.9, 494.7, 989.4, 989.4),
    Peak(r"\bA100\b", 19.5, 156.0, 312.0, 312.0),
    Peak(r"\bA40\b", 37.4, 74.8, 149.7, 149.7),
    Peak(r"\bRTX A6000\b", 38.7, 77.4, 154.8, 154.8),
    Peak(r"\bA30\b", 10.3, 82.0, 165.0, 165.0),
    Peak(r"\bA10\b", 31.2, 62.5, 125.0, 125.0),
    Peak(r"\bL40S\b", 91.6, 183.0, 362.0, 362.0),
    Peak(r"\bL40\b", 90.5, 90.5, 181.0, 181.0),
    Peak(r"\bL4\b", 30.3, 60.0, 121.0, 121.0),
    Peak(r"\bV100-SXM", 15.7, None, 125.0, None),
    Peak(r"\bV100-PCIE", 14.0, None, 112.0, None),
    Peak(r"\bT4\b", 8.1, None, 65.0, None),
    Peak(r"\bRTX 3090$", 35.6, 35.6, 71.0, 71.0),
    Peak(r"\bRTX 4090$", 82.6, 82.6, 165.2, 165.2),
    Peak(r"\bMI300X\b", 163.4, 653.7, 1307.4, 1307.4),
    Peak(r"\bMI250X\b", 23.9, None, 191.5, 191.5),
)


def peak_flops(device: str, dtype: torch.dtype, *, tf32: bool | None = None) -> float | None:
    """Dense peak of a device for matrix products.

    Args:
        device: the name that CUDA reports, "NVIDIA H100 80GB HBM3" say.
        dtype: of the products.
        tf32: whether products of float32 are TF32's; None: as PyTorch's setting says.

    Returns:
        FLOP/s, or None where the device, or its peak at this dtype, is not in the table.
    """
    for peak in PEAKS:
        if not re.search(peak.name, device):
            continue
        tera: float | None = {torch.float16: peak.fp16, torch.bfloat16: peak.bf16}.get(dtype)
        if dtype == torch.float32:
            allowed = torch.get_float32_matmul_precision() != "highest" if tf32 is None else tf32
            tera = peak.tf32 if allowed and peak.tf32 is not None else peak.fp32
        return None if tera is None else tera * 1e12
    return None
