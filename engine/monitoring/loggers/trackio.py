"""Trackio: a run for each stage, in its local database (`TRACKIO_DIR`)."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

from selfdistill.engine.monitoring.loggers.base import PROJECT, Flat, Picture, Place, rows_last


class Trackio:
    """See `Logger`."""

    def __init__(self, place: Place) -> None:
        import trackio

        self.trackio = trackio
        # Runs are known by their names: two folders of one name must not share one.
        name = f"{place.run}/{place.stage} {place.id_of('trackio')[:6]}"
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            group=place.run,
            name=name,
            resume="allow",
            embed=False,
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        self.trackio.log({k: v for k, v in values.items() if math.isfinite(v)}, step=step)

    def image(self, step: int, tag: str, picture: Picture) -> None:
        """See `Logger`."""
        self.trackio.log({tag: self.trackio.Image(rows_last(picture))}, step=step)

    def text(self, step: int, tag: str, markdown: str) -> None:
        """See `Logger`."""
        self.trackio.log({tag: self.trackio.Markdown(markdown)}, step=step)

    def hparams(self, step: int, config: Flat, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        self.run.config.update(dict(config))
        self.scalars(step, metrics)

    def close(self) -> None:
        """See `Logger`."""
        self.trackio.finish()
