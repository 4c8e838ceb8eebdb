"""MLflow: a run for each stage, at `MLFLOW_TRACKING_URI` or where MLflow itself has its place."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping

from selfdistill.engine.monitoring.loggers.base import PROJECT, Flat, Picture, Place, rows_last

#: What a parameter may hold, and how many go in one call.
_LONGEST, _MOST = 6000, 100


class Mlflow:
    """See `Logger`."""

    def __init__(self, place: Place) -> None:
        from mlflow import MlflowClient

        self.client = MlflowClient()
        known = place.known("mlflow")
        if known is not None:
            self.client.update_run(known, status="RUNNING")
            self.run = known
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        run = self.client.create_run(
            experiment,
            run_name=f"{place.run}/{place.stage}",
            tags={"run": place.run, "stage": place.stage},
        )
        self.run = place.keep("mlflow", run.info.run_id)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        finite = {k: v for k, v in values.items() if math.isfinite(v)}  # databases know no NaN
        self.client.log_batch(self.run, [Metric(k, v, now, step) for k, v in finite.items()])

    def image(self, step: int, tag: str, picture: Picture) -> None:
        """See `Logger`."""
        self.client.log_image(self.run, rows_last(picture), f"{tag}/{step:09d}.png")

    def text(self, step: int, tag: str, markdown: str) -> None:
        """See `Logger`."""
        self.client.log_text(self.run, markdown, f"{tag}/{step:09d}.md")

    def hparams(self, step: int, config: Flat, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        from mlflow.entities import Param

        params = [Param(name, str(value)[:_LONGEST]) for name, value in config.items()]
        for at in range(0, len(params), _MOST):
            self.client.log_batch(self.run, params=params[at : at + _MOST])
        self.scalars(step, metrics)

    def close(self) -> None:
        """See `Logger`."""
        self.client.set_terminated(self.run)
