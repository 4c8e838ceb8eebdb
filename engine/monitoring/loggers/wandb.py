"""Weights & Biases: a run for each stage, grouped by the run's folder; `WANDB_*` as its docs say.

`WANDB_MODE=offline` writes below the stage's folder, for `wandb sync`.
"""

from __future__ import annotations

import html
import os
from collections.abc import Mapping

from selfdistill.engine.monitoring.loggers.base import PROJECT, Flat, Picture, Place, rows_last


class Wandb:
    """See `Logger`."""

    def __init__(self, place: Place) -> None:
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=place.run,
            name=f"{place.run}/{place.stage}",
            id=place.id_of("wandb"),
            resume="allow",
            dir=str(place.folder),
            settings=wandb.Settings(console="off"),  # the terminal is ours
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self.run.log(dict(values), step=step)

    def image(self, step: int, tag: str, picture: Picture) -> None:
        """See `Logger`."""
        self.run.log({tag: self.wandb.Image(rows_last(picture))}, step=step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """See `Logger`."""
        page = f"<pre>{html.escape(markdown)}</pre>"
        self.run.log({tag: self.wandb.Html(page, inject=False)}, step=step)

    def hparams(self, step: int, config: Flat, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        self.run.config.update(dict(config), allow_val_change=True)
        self.run.summary.update(dict(metrics))

    def close(self) -> None:
        """See `Logger`."""
        self.run.finish()
