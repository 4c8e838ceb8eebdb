"""SupCon (Khosla et al. 2020, arXiv 2004.11362): further pre-training by contrasts of classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.config.schema import Config
from selfdistill.engine.config.sections import SupConSection
from selfdistill.engine.training.objectives import Reconstructs, freeze_decoder


class _Gather(torch.autograd.Function):
    """Rows of all ranks, in their order; the gradient comes back to a rank's own rows.

    Every rank computes the same loss of all rows, and DeepSpeed averages the ranks' gradients of
    the weights: each holds its own rows' share of the whole gradient, so that the average is the
    whole one over the number of ranks. Times that number it is the one of a single process.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """[n, D] of each of W ranks -> [W n, D]."""
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.rows = len(rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """This rank's rows, times the number of ranks."""
        begin = dist.get_rank() * ctx.rows
        return gradients[0][begin : begin + ctx.rows] * dist.get_world_size()


def gathered_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, equally many of each; those of one process as they are."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    found: Tensor = _Gather.apply(rows)
    return found


def contrast(vectors: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """L_out, equation 2 of the paper, the mean over the anchors, in fp32.

    -1/|P(i)| sum over p in P(i) of log(exp(z_i z_p / T) / sum over a != i of exp(z_i z_a / T)),
    P(i) the other vectors of i's class.

    Args:
        vectors: [n, D], of length 1; every label at least twice.
        labels: int64 [n].
        temperature: T.
    """
    with torch.autocast(vectors.device.type, enabled=False):  # which would round the products
        products = vectors.float() @ vectors.float().T / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    logs = products - products.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    same = (labels[:, None] == labels[None]) & ~itself
    return -(logs * same).sum(1).div(same.sum(1)).mean()


class SupConObjective(nn.Module):
    """The contrastive loss of two views of each sample, over the global batch.

    The CLS vector goes through a projection head (linear, ReLU, linear), which is thrown away with
    the loss, to length 1. The decoder takes no part, and stays as it was.

    Args:
        model: the auto-encoder.
        width: of its CLS vector.
        settings: temperature, and width of the projection.
    """

    def __init__(self, model: Reconstructs, width: int, settings: SupConSection) -> None:
        super().__init__()
        self.model, self.temperature = model, settings.temperature
        freeze_decoder(model)
        self.projection = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, settings.projection)
        )

    def forward(self, labels: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        """The loss, the same on every rank.

        Args:
            labels: int64 [B].
            batch: the model's entries, of 2 B views: all first ones, then all second ones.
        """
        tokens, _ = self.model.encode(cls_only=True, **batch)
        vectors = F.normalize(self.projection(tokens[:, 0]).float(), dim=-1)
        every = gathered_rows(torch.cat([labels, labels]))
        loss = contrast(gathered_rows(vectors), every, self.temperature)
        return {"loss": loss, "supcon": loss.detach()}


def check(config: Config, train: Manifest) -> None:
    """Refuses data without labels, and batches in parts.

    Raises:
        UserError: says which, and the cure.
    """
    name = "--pretrain.objective supcon"
    if config.data.split == "unlabelled" or not train.classes:
        place = "--data.split unlabelled" if train.classes else train.root
        raise UserError(
            f"{name} contrasts classes, and {place} has no labels: take a set packed with its"
            " classes, or --pretrain.objective mae"
        )
    if train.several:
        raise UserError(
            f"{name} contrasts classes, and samples of {train.root} have several: take"
            " --pretrain.objective mae"
        )
    if config.data.mix:
        raise UserError(
            f"{name} contrasts the classes of {train.root}, and other sets mixed in (--data.mix)"
            " have others: leave them out, or take --pretrain.objective mae"
        )
    if config.pretrain.accumulation > 1:
        raise UserError(
            f"{name} contrasts all samples of a batch, which --pretrain.accumulation"
            f" {config.pretrain.accumulation} cuts into parts: take 1"
        )
