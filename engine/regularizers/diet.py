"""DIET (arXiv 2302.10260), DIET-CP (arXiv 2509.06990): each sample is a class of its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from selfdistill.data.errors import UserError
from selfdistill.engine.training.modalities.base import Pooled
from selfdistill.engine.training.objectives import Reconstructs, freeze_decoder, pick

#: Samples, of which each has a row in the head; with its moments that is 12 KiB at a width of 1024.
MOST = 2_000_000


class DietObjective(nn.Module):
    """Cross-entropy of a sample's number, told from its feature by a linear head.

    The head has a row for each sample, and is thrown away with the loss. The decoder takes no part,
    and stays as it was.

    Args:
        model: the auto-encoder.
        feature: what is read of the unmasked view.
        width: of that feature.
        samples: how many there are to tell apart.
        smoothing: share of the target that is spread over all samples.
    """

    def __init__(
        self, model: Reconstructs, feature: Pooled, width: int, samples: int, smoothing: float
    ) -> None:
        super().__init__()
        self.model, self.feature, self.smoothing = model, feature, smoothing
        freeze_decoder(model)
        self.head = nn.Linear(width, samples, bias=False)

    def forward(self, ids: Tensor, **batch: Tensor) -> dict[str, Tensor]:
        """The loss, and the share of samples that the head tells from all others.

        Args:
            ids: int64 [B], numbers of the samples.
            batch: entries of an unmasked view.
        """
        tokens, counts = self.model.encode(cls_only=self.feature == "cls", **batch)
        logits = self.head(pick(tokens, self.feature, counts)).float()
        loss = F.cross_entropy(logits, ids, label_smoothing=self.smoothing)
        told: dict[str, Any] = {"told_apart": (logits.argmax(1) == ids).float().mean()}
        return {"loss": loss, "diet": loss.detach(), **told}


def check(samples: int, origin: str) -> None:
    """Refuses a set whose head would be larger than any encoder.

    Raises:
        UserError: says how many there may be, and the cure.
    """
    if samples > MOST:
        raise UserError(
            f"--pretrain.objective diet has a row of its head for each of {samples:,} samples of"
            f" {origin}, and takes {MOST:,} at most: take fewer (python -m data.subset), or"
            " --pretrain.objective mae"
        )
