"""A run as an object: its figures, curves and exports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.results import RESULT, read_result
from selfdistill.launcher import compare
from selfdistill.launcher.api.inputs import place_of
from selfdistill.launcher.api.mistakes import told
from selfdistill.launcher.api.tables import table

if TYPE_CHECKING:
    import pandas

#: Of each run, as engine.checkpoints.folder has it, which would import torch for seconds.
_CONFIG = "config.toml"
#: Of each stage; it holds what TensorBoard's events hold.
_METRICS = "metrics.jsonl"


class Run:
    """What a training left in its folder. Everything is read when it is asked for.

    Attributes:
        folder: of the run.

    Args:
        folder: of a run, done or on its way.

    Raises:
        UserError: there is no such folder, or it is none of a training.
    """

    @told
    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(place_of(folder, "folder")).expanduser()
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder: name the output of a training")
        if not (self.folder / _CONFIG).is_file() and not any(self.folder.glob(f"*/{RESULT}")):
            raise UserError(f"{self.folder} holds no training: name the output of sd.train")

    def __repr__(self) -> str:
        done = ", ".join(self.results) or "nothing yet"
        return f"<Run {str(self.folder)!r}: {done}>"

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Each complete stage's result.json, by the stage's folder."""
        return {
            str(path.parent.relative_to(self.folder)): read_result(path)
            for path in sorted(self.folder.rglob(RESULT), key=_age)
        }

    @property
    def metrics(self) -> dict[str, float]:
        """Scores of the fine-tuning, shares in 0..1: means over the seeds where there are several.

        Of the self-distilled model if it was fine-tuned, else of the one that was; empty where none
        was.
        """
        for _, stage, _ in reversed(compare.METHODS):
            path = self.folder / stage / RESULT
            if path.is_file():
                metrics: dict[str, float] = read_result(path)["metrics"]
                return metrics
        return {}

    @property
    def curves(self) -> pandas.DataFrame:
        """All scalars of all stages: columns stage, step, tag and value, in the order of training.

        `run.curves.query("tag == 'loss/loss'")` is a loss; steps count finished ones, from 1. The
        values are those of TensorBoard, in double precision.
        """
        rows = [
            {"stage": str(path.parent.relative_to(self.folder)), "step": line["step"]}
            | {"tag": tag, "value": value}
            for path in sorted(self.folder.rglob(_METRICS), key=_begun)
            for line in records.read_lines(path)
            for tag, value in line.items()
            if tag not in ("step", "time")
        ]
        return table(rows, ["stage", "step", "tag", "value"])

    @property
    def exports(self) -> dict[str, Path]:
        """The folders that transformers and timm load, by the stage that wrote them."""
        found = sorted(self.folder.rglob("export/config.json"), key=_age)
        return {
            str(path.parents[1].relative_to(self.folder)): path.parent
            for path in found
            if (path.parents[1] / RESULT).is_file()
        }

    @told
    def compare(self, metric: str | None = None) -> pandas.DataFrame:
        """The methods side by side, as `launcher.compare` prints them.

        Args:
            metric: a key of `metrics`, or several with commas; by default that by which the set is
                scored, on test.

        Returns:
            Columns method, metric, mean, std, n and seconds; shares in 0..1.

        Raises:
            UserError: there is no complete fine-tuning, or it lacks the metric.
        """
        names = ["method", "metric", "mean", "std", "n", "seconds"]
        keys = [None] if metric is None else compare.chosen(self.folder, metric)
        rows = [row for key in keys for row in compare.rows(self.folder, key)]
        return table([{name: getattr(row, name) for name in names} for row in rows], names)


def _age(path: Path) -> tuple[float, str]:
    return path.stat().st_mtime, str(path)


def _begun(path: Path) -> tuple[float, str]:
    """When the first line of a stage's figures was written."""
    for line in records.read_lines(path):
        time = line.get("time")
        return (float(time) if isinstance(time, int | float) else 0.0), str(path)
    return float("inf"), str(path)
