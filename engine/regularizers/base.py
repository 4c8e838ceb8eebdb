"""What a regularizer may change in a fine-tuning; this one changes nothing."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from selfdistill.data.loading.datasets import Keyed
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.training.modalities.base import Batch
from selfdistill.engine.training.objectives import ClassifyObjective, ClassLoss


class Regularizer:
    """Plain fine-tuning. A subclass overrides what it does otherwise.

    Attributes:
        section: its section of the configuration; "" for none.
        counted: whether a step costs what one of plain fine-tuning does.

    Args:
        run: the launch.
        weights: that the fine-tuning starts from.
    """

    section = ""
    counted = True

    def __init__(self, run: Run, weights: Any) -> None:
        self.run, self.config, self.weights = run, run.config, weights

    def check(self, steps: int) -> None:
        """Refuses settings that cannot work.

        Args:
            steps: of the fine-tuning.

        Raises:
            UserError: says why, and the cure.
        """

    def record(self) -> dict[str, Any]:
        """Its settings, which must be equal at resume."""
        if not self.section:
            return {}
        settings = getattr(self.config, self.section).model_dump(mode="json")
        # JSON has no infinity.
        return {
            f"{self.section}.{k}": str(v) if isinstance(v, float) and math.isinf(v) else v
            for k, v in settings.items()
        }

    def objective(self, model: Any, loss: ClassLoss | None = None) -> nn.Module:
        """The objective of a classifier (`objectives.Classifies`, `.encoder`), with its loss."""
        return ClassifyObjective(model, loss)

    def optimizer(self, objective: nn.Module) -> Any | None:
        """An optimiser of its own; None: AdamW."""
        return None

    def start(self, engine: Any) -> None:
        """Called once, when the engine is ready for its next step."""

    def keyed(self, view: Keyed | None, seed: int) -> Keyed | None:
        """The random numbers of a sample, keyed by position.

        Args:
            view: those of the fine-tuning's view.
            seed: of the fine-tuning.
        """
        return view

    def entries(self, batch: Batch) -> Batch:
        """Entries of a batch that its objective takes beside the classifier's."""
        return {}

    def after_update(self) -> None:
        """Called after each update of the weights."""
