"""R3F (Aghajanyan et al. 2021, arXiv 2008.03156): noise on the embeddings changes no prediction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfdistill.data.loading.datasets import Keyed
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.sections import R3FSection
from selfdistill.engine.regularizers.base import Regularizer
from selfdistill.engine.training.modalities.base import Batch
from selfdistill.engine.training.objectives import Classifies, ClassLoss
from selfdistill.engine.training.views import NoiseKeys, Together


class Noise:
    """A forward hook of an embedding layer, which adds noise while `keys` are set.

    A sample's noise comes from a generator of its own, so that it depends neither on the batch it
    is in nor on the number of ranks, nor on how texts lie in rows.

    Attributes:
        keys: seeds, int64 [B] on the CPU, or None for no noise.
        lengths: vectors of each sample that get noise, int64 [B] on the CPU; None for all. How far
            texts are padded depends on the batch.
        places: of each sample's first vector in the flattened rows, int64 [B] on the CPU; None
            where each sample has a row.
    """

    def __init__(self, settings: R3FSection) -> None:
        self.settings = settings
        self.keys: Tensor | None = None
        self.lengths: Tensor | None = None
        self.places: Tensor | None = None

    def __call__(self, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
        """The embeddings [R, T, D] with noise; R is B unless several samples share a row."""
        return None if self.keys is None else output + self.draw(output)

    @torch.no_grad()
    def draw(self, output: Tensor) -> Tensor:
        """Noise for embeddings [R, T, D], drawn in fp32."""
        assert self.keys is not None
        noise, width = torch.zeros(output.shape, device=output.device), output.shape[1]
        vectors, keys = noise.flatten(0, 1), self.keys.tolist()
        places = [n * width for n in range(len(noise))]
        places = places if self.places is None else self.places.tolist()
        lengths = [width] * len(keys) if self.lengths is None else self.lengths.tolist()
        generator = torch.Generator(output.device)
        for place, key, length in zip(places, keys, lengths, strict=True):
            own = vectors[place : place + length]
            generator.manual_seed(key)
            if self.settings.noise == "normal":
                own.normal_(0, self.settings.eps, generator=generator)
            else:
                own.uniform_(-self.settings.eps, self.settings.eps, generator=generator)
        return noise.to(output.dtype)


class R3FObjective(nn.Module):
    """Cross-entropy + weight * (KL(p || q) + KL(q || p)): p without noise, q with it.

    The divergences are summed over the classes and averaged over the batch; the gradient goes
    through both. Without `noise_key` (in evaluation) and at weight 0 there is one pass.

    Args:
        model: the classifier; its `embedding` gets the noise.
        settings: weight, kind and size of the noise.
        loss: by default plain cross-entropy.
    """

    def __init__(
        self, model: Classifies, settings: R3FSection, loss: ClassLoss | None = None
    ) -> None:
        super().__init__()
        self.model, self.weight, self.noise = model, settings.weight, Noise(settings)
        self.loss = loss or ClassLoss()
        model.embedding.register_forward_hook(self.noise)

    def forward(
        self,
        labels: Tensor,
        noise_key: Tensor | None = None,
        noise_length: Tensor | None = None,
        noise_at: Tensor | None = None,
        scale: Tensor | None = None,
        **batch: Tensor,
    ) -> dict[str, Tensor]:
        """Losses and logits.

        Args:
            labels: int64 [B].
            noise_key: int64 [B] on the CPU, seeds of the samples' noise.
            noise_length: int64 [B] on the CPU, tokens of each text.
            noise_at: int64 [B] on the CPU, where each text begins in rows that texts share.
            scale: see `ClassLoss`.
            batch: the model's entries.
        """
        logits = self.model.classify(**batch).float()
        loss = self.loss(logits, labels, batch.get("share"), scale)
        out = {"loss": loss, "cross_entropy": loss.detach(), "logits": logits.detach()}
        if noise_key is None or not self.weight or not self.training:
            return out
        self.noise.keys, self.noise.lengths, self.noise.places = noise_key, noise_length, noise_at
        try:
            noised = self.model.classify(**batch).float()
        finally:
            self.noise.keys = None
        term = symmetric_divergence(logits, noised)
        return out | {"loss": loss + self.weight * term, "r3f": term.detach()}


def symmetric_divergence(first: Tensor, second: Tensor) -> Tensor:
    """KL(p || q) + KL(q || p) of two sets of logits [B, C], the mean over the batch, in nats.

    sum (p - q) (log p - log q): both divergences at once, and no difference of large numbers.
    """
    logs = F.log_softmax(first, -1), F.log_softmax(second, -1)
    return ((logs[0].exp() - logs[1].exp()) * (logs[0] - logs[1])).sum(-1).mean()


class R3F(Regularizer):
    """`--finetune.regularizer r3f`."""

    section = "r3f"

    def __init__(self, run: Run, weights: Any) -> None:
        super().__init__(run, weights)
        self.counted = not self.config.r3f.weight

    def check(self, steps: int) -> None:
        """See `Regularizer`: only a warning."""
        precision = self.config.precision
        if precision != "fp32":
            bits = {"bf16": 8, "fp16": 11}[precision]
            self.run.info_once(
                f"warning: --precision {precision} keeps {bits} bits: noise of"
                f" {self.config.r3f.eps:g} is lost in embeddings that are not as small: take fp32"
            )

    def objective(self, model: Any, loss: ClassLoss | None = None) -> nn.Module:
        """See `Regularizer`."""
        if not self.config.r3f.weight:
            return super().objective(model, loss)
        return R3FObjective(model, self.config.r3f, loss)

    def keyed(self, view: Keyed | None, seed: int) -> Keyed | None:
        """See `Regularizer`: also the seeds of the noise."""
        if not self.config.r3f.weight:
            return view
        return Together((NoiseKeys(seed),) if view is None else (view, NoiseKeys(seed)))

    def entries(self, batch: Batch) -> Batch:
        """See `Regularizer`: the seeds stay on the CPU, where generators take them from."""
        names = ("noise_key", "noise_length", "noise_at")
        return {name: batch[name] for name in names if name in batch}
