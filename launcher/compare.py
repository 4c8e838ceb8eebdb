"""The methods of one run side by side: `python -m launcher.compare runs/NAME`.

A run made with `--stage all --compare true` holds three fine-tunings: from the pre-trained model,
from the further pre-trained one, and from the self-distilled one.
"""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.results import RESULT, numbered, read_result

#: Method, its fine-tuning, and the stages whose time it needs as well.
METHODS = (
    ("fine-tuning", "finetune-model", ()),
    ("further pre-training", "finetune-pretrain", ("decoder", "pretrain")),
    ("self-distillation", "finetune", ("decoder", "pretrain", "distill-*")),
)


@dataclass(frozen=True)
class Row:
    """One method's figures: shares in 0..1, seconds of all its stages (one fine-tuning)."""

    method: str
    metric: str
    mean: float
    std: float | None
    n: int
    seconds: float


def _methods(run: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """`METHODS`, and between them the earlier rounds of self-distillation, if they were scored."""
    between: list[tuple[str, str, tuple[str, ...]]] = []
    for number, folder in numbered(run, "finetune-distill-").items():
        before = ("decoder", "pretrain", *(f"distill-{k}" for k in range(1, number + 1)))
        between.append((f"self-distillation, round {number}", folder.name, before))
    return [*METHODS[:-1], *between, METHODS[-1]]


def rows(run: Path, metric: str | None = None) -> list[Row]:
    """The methods that a run folder holds complete.

    Args:
        run: a run folder.
        metric: a key of result.json's metrics; by default that by which the set is scored, on test.

    Raises:
        UserError: there is no complete fine-tuning, or it lacks the metric.
    """
    found = []
    for method, stage, before in _methods(run):
        path = run / stage / RESULT
        if not path.is_file():
            continue
        result = read_result(path)
        metric = metric or f"test_{result.get('metric') or 'accuracy'}"
        if metric not in result["metrics"]:
            known = ", ".join(result["metrics"])
            raise UserError(f"{path} has no {metric!r}; it has {known or 'no metrics'}")
        n = result.get("n") or 1
        seconds = float(result["seconds"]) / n
        for pattern in before:
            results = map(read_result, run.glob(f"{pattern}/{RESULT}"))
            seconds += sum(float(one["seconds"]) for one in results)
        std = result.get("std", {}).get(metric)
        found.append(Row(method, metric, float(result["metrics"][metric]), std, n, seconds))
    if not found:
        below = {p.parents[1] for _, stage, _ in METHODS for p in run.glob(f"*/{stage}/{RESULT}")}
        cure = "run engine/run.py --stage all --compare true first"
        if below:
            cure = f"did you mean {' or '.join(map(str, sorted(below)))}?"
        raise UserError(f"{run} holds no complete fine-tuning: {cure}")
    return found


def _clock(seconds: float, hours: bool) -> str:
    """0:09, or with hours 0:00:09."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def show(run: Path, metric: str | None = None, title: str | None = None) -> None:
    """Prints the table: method, mean ± sample standard deviation over the seeds, wall time."""
    found = rows(run, metric)
    table = Table(title=title or str(run))
    table.add_column("method")
    table.add_column(f"{found[0].metric.replace('_', ' ')}, % (mean ± std, n)", justify="right")
    # One unit for the column, so that its rows can be compared at a glance.
    hours = max(row.seconds for row in found) >= 3600
    table.add_column("wall time (h:m:s)" if hours else "wall time (m:s)", justify="right")
    for row in found:
        spread = "" if row.std is None else f" ± {100 * row.std:.2f}"
        table.add_row(
            row.method,
            f"{100 * row.mean:.2f}{spread} (n = {row.n})",
            _clock(row.seconds, hours),
        )
    console = Console(emoji=False, markup=False)  # ":m:" is no emoji, a path in [] no style
    console.print(table)
    console.print("wall time: all stages of the method, with one fine-tuning", style="dim")


def main(run: str, metric: str | None = None) -> None:
    """Prints the table of a run.

    Args:
        run: run folder.
        metric: a key of result.json's metrics, such as val_accuracy or test_macro_f1; by default
            that by which the set is scored, on its test split.
    """
    show(Path(run), metric)


if __name__ == "__main__":
    cli.run(main)
