"""Pictures that a run leaves in TensorBoard: reconstructions, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from selfdistill.engine.models.images.patches import patchify, unpatchify
from selfdistill.engine.models.images.shape import Shape

#: Side in pixels up to which small images are enlarged.
SIDE = 128
#: Confusion matrices of more classes are drawn without labels; more squares than this, summed.
LABELLED, SQUARES = 200, 500
#: Colours from 0 to 1 of the confusion matrix: white, blue, night.
COLOURS = np.array([[255, 255, 255], [66, 133, 190], [8, 29, 88]], dtype=np.float64)


@torch.no_grad()
def reconstruction(
    images: Tensor,
    prediction: Tensor,
    mask: Tensor,
    shape: Shape,
    mean: Sequence[float],
    std: Sequence[float],
    count: int = 8,
) -> Tensor:
    """Draws what a masked auto-encoder makes of some images.

    Where the model predicts normalised pixels, each patch gets its own true mean and deviation back
    (He et al. 2022 normalise the target by them), so that the picture shows the structure learnt.
    Visible patches are pasted in: the loss does not train their prediction.

    Args:
        images: [n, 3, H, W], uint8 or already normalised by mean and std (then floating point).
        prediction: [n, K, p*p*C], or of the masked patches alone [n, M, p*p*C]; pixels in the order
            (row, column, channel).
        mask: [n, K], 1 = hidden.
        shape: of the model.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        count: columns at most.

    Returns:
        uint8 [3, H', W'], rows original, masked input, reconstruction; a column for each image.
    """
    images, prediction, mask = (t[:count].detach().cpu() for t in (images, prediction, mask))
    means, stds = (torch.tensor(v, dtype=torch.float32).view(1, -1, 1, 1) for v in (mean, std))
    if images.dtype == torch.uint8:
        pixels = images.float() / 255
        images = (pixels - means) / stds
    else:
        images = images.float()
        pixels = images * stds + means

    target = patchify(images, shape.patch_size)
    hidden = mask.bool().unsqueeze(-1)
    filled = prediction.float()
    if filled.shape != target.shape:
        filled = torch.zeros_like(target).masked_scatter(hidden, filled)
    if shape.normalize_pixels:
        # As the loss: unbiased variance, and 1e-6 below the root.
        deviation = (target.var(dim=-1, keepdim=True) + 1e-6).sqrt()
        filled = filled * deviation + target.mean(dim=-1, keepdim=True)
    filled = unpatchify(torch.where(hidden, filled, target), shape.patch_size, shape.grid)
    masked = patchify(pixels, shape.patch_size).masked_fill(hidden, 0.5)
    masked = unpatchify(masked, shape.patch_size, shape.grid)
    rows = [pixels, masked, filled * stds + means]
    return _grid([(row.clamp(0, 1) * 255).round().to(torch.uint8) for row in rows])


def confusion(matrix: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draws a confusion matrix; colours are shares of the true class.

    Up to 25 classes with the counts, up to 200 with the names, beyond that a heat map alone.

    Args:
        matrix: int64 [C, C], rows true, columns predicted.
        classes: the C names.

    Returns:
        uint8 [3, H, W].
    """
    n = len(classes)
    counts = matrix.astype(np.float64)
    if n > SQUARES:  # neighbouring classes share a square
        edges = np.linspace(0, n, SQUARES + 1).astype(int)[:-1]
        counts = np.add.reduceat(np.add.reduceat(counts, edges, axis=0), edges, axis=1)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    cell = min(max(1000 // len(counts), 13 if n <= LABELLED else 1), 44)
    # The root lets rare mistakes be seen beside the diagonal.
    tint = np.sqrt(share)
    heat = np.stack([np.interp(tint, [0, 0.5, 1], channel) for channel in COLOURS.T], axis=-1)
    squares = Image.fromarray(heat.round().astype(np.uint8)).resize(
        (cell * len(counts), cell * len(counts)), Image.Resampling.NEAREST
    )

    font = ImageFont.load_default(min(cell - 2, 16) if n <= LABELLED else 16)
    names = [_short(name) for name in classes] if n <= LABELLED else []
    label = max((int(font.getlength(name)) for name in names), default=0) + 8
    head = 24  # room for the axis title
    left = top = label + head
    page = Image.new("RGB", (left + squares.width + head, top + squares.height + head), "white")
    page.paste(squares, (left, top))
    draw = ImageDraw.Draw(page)
    draw.rectangle((left - 1, top - 1, left + squares.width, top + squares.height), outline="#888")
    for i, name in enumerate(names):
        at = (left - 4, top + i * cell + cell / 2)
        draw.text(at, name, fill="black", font=font, anchor="rm")
    _sideways(page, [(name, left + i * cell, top - 4) for i, name in enumerate(names)], cell, font)
    title = ImageFont.load_default(16)
    draw.text((left + squares.width / 2, 4), "predicted", fill="#555", font=title, anchor="ma")
    middle = top + (squares.height - cell) // 2
    _sideways(page, [("true", 2, middle + 20)], 20, title)
    if n <= 25:
        for row, column in np.argwhere(matrix > 0):
            at = (left + (column + 0.5) * cell, top + (row + 0.5) * cell)
            colour = "white" if tint[row, column] > 0.5 else "black"
            number = str(matrix[row, column])
            size = min(14, int(1.6 * (cell - 4) / len(number)))
            small = ImageFont.load_default(size)
            draw.text(at, number, fill=colour, font=small, anchor="mm")
    return np.asarray(page).transpose(2, 0, 1)


def _grid(rows: list[Tensor], gap: int = 2) -> Tensor:
    """Rows of uint8 [n, 3, H, W] -> uint8 [3, H', W'] on white, enlarged without smoothing."""
    enlarge = max(1, SIDE // rows[0].shape[-1])
    tiles = torch.stack(rows)
    tiles = tiles.repeat_interleave(enlarge, dim=-1).repeat_interleave(enlarge, dim=-2)
    tiles = torch.nn.functional.pad(tiles, (gap, 0, gap, 0), value=255)
    rows_, columns, channels, height, width = tiles.shape
    page = tiles.permute(2, 0, 3, 1, 4).reshape(channels, rows_ * height, columns * width)
    return torch.nn.functional.pad(page, (0, gap, 0, gap), value=255)


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _sideways(
    page: Image.Image,
    texts: list[tuple[str, float, float]],
    height: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Writes texts from bottom to top; each (text, left, bottom) takes `height` pixels across."""
    for text, left, bottom in texts:
        strip = Image.new("L", (int(font.getlength(text)) + 2, height), 0)
        ImageDraw.Draw(strip).text((0, height / 2), text, fill=255, font=font, anchor="lm")
        strip = strip.transpose(Image.Transpose.ROTATE_90)
        page.paste((0, 0, 0), (int(left), int(bottom) - strip.height), strip)
