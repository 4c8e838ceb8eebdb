"""What a fine-tuning is looked at by: losses and their gap, distance and features (Figure 5)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.runtime.distributed import Ranks, sent, total
from selfdistill.engine.runtime.precision import autocast
from selfdistill.engine.runtime.zero import gathered
from selfdistill.engine.training.modalities.base import Batch, Modality
from selfdistill.engine.training.scoring.evaluation import Scores, evaluate, scored_batch
from selfdistill.engine.training.scoring.several import SetScores
from selfdistill.engine.training.teacher import frozen, view

#: Samples by whose features the encoders are compared.
COMPARED = 1024
#: Blocks of neighbouring samples, evenly spread, that stand for a large train split.
BLOCKS = 40


def analyse(
    run: Run,
    engine: Any,
    modality: Modality,
    weights: Any,
    initial: Any,
    splits: Mapping[str, Manifest],
) -> tuple[dict[str, Scores | SetScores], dict[str, Any]]:
    """Scores a fine-tuned classifier, each split in one pass. Every rank calls it.

    Args:
        run: The launch.
        engine: Of the classifier's objective.
        modality: Of its inputs.
        weights: Those that it started from.
        initial: theta_init.
        splits: Name -> manifest; test is left out under `--finetune.test false`.

    Returns:
        The scores of val and test, and the analysis: losses, accuracy of train, `gap` (test loss -
        train loss; `val_gap` where test is not scored), `distance_from_init` (L2 norm over the
        encoder's parameters), `feature_drift` (mean squared L2 distance of the CLS vectors of
        fine-tuned and initial encoder on test, or val) and `feature_cosine`, and the share of each
        class's samples that are right, by split (None for a class that has none there).
    """
    plan = run.config.finetune
    asked = [s for s in ("val", "test") if s in splits and (s != "test" or plan.test)]
    scores: dict[str, Scores | SetScores] = {}
    found: dict[str, Any] = {}
    if plan.train_scored:
        spans = spread(splits["train"].samples, plan.train_scored, run.ranks, scored_batch(run))
        scores["train"] = evaluate(
            run, engine, modality, weights, splits["train"], spans=spans, ranked=False
        )
        found["train_accuracy"] = scores["train"].accuracy
    for split in asked:
        features = None
        if split == asked[-1]:
            features = Features(run, modality, initial, engine.module, splits[split])
        try:
            scores[split] = evaluate(
                run, engine, modality, weights, splits[split], seen=features or (lambda _: None)
            )
        finally:
            if features:
                features.close()
        if features:
            found |= features.compared()
    found |= {f"{split}_loss": score.loss for split, score in scores.items()}
    if plan.train_scored and asked:
        name = "gap" if asked[-1] == "test" else "val_gap"
        found[name] = found[f"{asked[-1]}_loss"] - found["train_loss"]
    found["distance_from_init"] = distance(engine, initial.encoder, run.ranks)
    found["per_class_accuracy"] = {
        split: per_class(score, splits["train"].classes) for split, score in scores.items()
    }
    return {split: scores[split] for split in asked}, found


def spread(samples: int, most: int, ranks: Ranks, batch: int) -> list[tuple[int, int]] | None:
    """Evenly spread blocks of a split, this rank's share of them.

    Which samples they hold does not depend on the number of ranks. Ranks that would have fewer
    batches than others, which under ZeRO-3 wait for them, meet a sample again, which is counted
    once.

    Args:
        samples: Of the split.
        most: So many at most.
        ranks: This process.
        batch: Samples of a batch of a rank.

    Returns:
        Ids [first, last); None where the whole split is meant.
    """
    if samples <= most:
        return None
    blocks = min(BLOCKS, most)
    size = most // blocks
    every = [(i * samples // blocks, i * samples // blocks + size) for i in range(blocks)]
    mine = every[ranks.rank :: ranks.world]
    wanted = -(-blocks // ranks.world) * -(-size // batch)
    missing = wanted - len(mine) * -(-size // batch)
    return mine + [(0, 1)] * missing


class Features:
    """CLS vectors of the encoder that is being scored beside those of the initial one.

    Called after each batch's forward pass, in which a hook kept what the encoder gave: under ZeRO-3
    it can run in the engine's own pass alone.
    """

    def __init__(
        self, run: Run, modality: Modality, initial: Any, objective: Any, manifest: Manifest
    ) -> None:
        self.run, self.modality = run, modality
        self.initial = frozen(modality.encoder(initial), run.ranks.device, run.dtype)
        last = manifest.samples - 1
        chosen = np.linspace(0, last, min(COMPARED, manifest.samples)).astype(np.int64)
        self.chosen = torch.from_numpy(np.unique(chosen))
        self.sums = torch.zeros(3, dtype=torch.float64, device=run.ranks.device)
        self.tokens: Tensor | None = None
        self.hook = objective.model.encoder.register_forward_hook(self._keep)
        # A step that was compiled before the hook was there would pass it by.
        self.objective, self.compiled = objective, objective._compiled_call_impl
        objective._compiled_call_impl = None

    def _keep(self, _: nn.Module, __: Any, output: Any) -> None:
        tokens = output if isinstance(output, Tensor) else output.last_hidden_state
        self.tokens = tokens.detach()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> None:
        """Compares the vectors of those samples of a loader's batch that were chosen."""
        rows = (torch.isin(batch["ids"], self.chosen) & batch["valid"]).nonzero()[:, 0]
        if not len(rows):
            return
        assert self.tokens is not None
        device, places = self.run.ranks.device, sent(rows, self.run.ranks.device)
        fine_tuned = self.tokens[:, 0]
        if "packed_to" in batch and self.tokens.shape[1] > 1:  # several texts in a row
            fine_tuned = self.tokens.flatten(0, 1)[sent(batch["packed_to"][:, 0], device)]
        some = self.modality.some(batch, rows)
        with autocast(device, self.run.dtype):
            tokens, _ = self.initial.encode(cls_only=True, **view(some, self.modality.full, device))
        before, after = tokens[:, 0].float(), fine_tuned[places].float()
        square = (after - before).pow(2).sum(-1).double().sum()
        cosine = F.cosine_similarity(after, before, dim=-1).double().sum()
        self.sums += torch.stack([square, cosine, torch.full_like(cosine, len(rows))])

    def close(self) -> None:
        """Leaves the objective as it was."""
        self.hook.remove()
        self.objective._compiled_call_impl = self.compiled

    def compared(self) -> dict[str, float]:
        """The means over all ranks' samples. Every rank calls it."""
        square, cosine, count = total(self.sums).tolist()
        if not count:
            return {}
        return {"feature_drift": square / count, "feature_cosine": cosine / count}


@torch.no_grad()
def distance(engine: Any, reference: Mapping[str, Tensor], ranks: Ranks) -> float:
    """L2 distance of the encoder's weights (fp32 masters) from theta_init, summed in float64.

    Every rank calls it; names that the reference lacks (a fresh pooler) are left out.
    """
    how = training_state.layout(engine, ranks.rank)
    square = 0.0
    for name, parameter in engine.module.model.encoder.named_parameters():
        if name not in reference:
            continue
        if parameter.requires_grad:
            square += _square(how.get(parameter, training_state.WEIGHT), reference[name])
        else:
            with gathered(parameter) as whole:
                square += _square(whole, reference[name])
    return math.sqrt(square)


def _square(value: Tensor, reference: Tensor) -> float:
    difference = value.detach().double().flatten() - reference.to(value.device).double().flatten()
    return float(difference.pow(2).sum())


def per_class(scores: Scores | SetScores, classes: list[str]) -> dict[str, float | None]:
    """Share of each class's samples that are right; None where there is none.

    Args:
        scores: of a split.
        classes: C names.
    """
    if isinstance(scores, SetScores):
        return {
            name: None if np.isnan(recall) else float(recall)
            for name, recall in zip(classes, scores.recalls, strict=True)
        }
    confusion = scores.confusion
    return {
        name: float(row[number] / row.sum()) if row.sum() else None
        for number, (name, row) in enumerate(zip(classes, confusion, strict=True))
    }
