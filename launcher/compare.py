"""The methods of one run side by side: `python -m launcher.compare runs/NAME`.

A run made with `--stage all --compare true` holds three fine-tunings: from the pre-trained model,
from the further pre-trained one, and from the self-distilled one.
"""

import contextlib
from dataclasses import dataclass, replace
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
_MACRO = "test_macro_f1"
#: Metrics of which less is better.
_LOWER = ("_loss", "_ece")


@dataclass(frozen=True)
class Row:
    """One method's figures: shares in 0..1, seconds of all its stages (one fine-tuning).

    `each` has those of its seeds, in the order of `seeds`; both are empty where they are not known.
    """

    method: str
    metric: str
    mean: float
    std: float | None
    n: int
    seconds: float
    each: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()


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
            hint = cli.nearest(metric, result["metrics"], "")
            raise UserError(f"{path} has no {metric!r}.{hint} It has {known or 'no metrics'}")
        n = result.get("n") or 1
        seconds = float(result["seconds"]) / n
        for pattern in before:
            results = map(read_result, run.glob(f"{pattern}/{RESULT}"))
            seconds += sum(float(one["seconds"]) for one in results)
        std = result.get("std", {}).get(metric)
        each = tuple(result.get("each", {}).get(metric, ()))
        row = Row(method, metric, float(result["metrics"][metric]), std, n, seconds)
        found.append(replace(row, each=each, seeds=tuple(result.get("seeds", ()))))
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


def chosen(run: Path, metric: str | None) -> list[str]:
    """The metrics of the table, keys of result.json.

    Args:
        run: a run folder.
        metric: one, or several with commas; by default that by which the set is scored, on test,
            and macro F1 beside it where it differs by a point or more.

    Raises:
        UserError: there is no complete fine-tuning, or it lacks one of them.
    """
    if metric is not None:
        names = [name.strip() for name in metric.split(",") if name.strip()]
        if not names:
            raise UserError("--metric is empty: give one, such as test_accuracy")
        return list(dict.fromkeys(names))
    found = rows(run)
    names = [found[0].metric]
    with contextlib.suppress(UserError):  # a run of other scores
        beside = rows(run, _MACRO)
        if any(abs(a.mean - b.mean) >= 0.01 for a, b in zip(found, beside, strict=True)):
            names.append(_MACRO)
    return list(dict.fromkeys(names))


def verdicts(found: list[Row]) -> list[str]:
    """In words, how the best method stands to each of the others.

    Only a difference that Student's t tells from chance counts as one, after Bonferroni's
    correction for all pairs of methods: which one is the best is known from the same scores.

    Args:
        found: one metric of each method.
    """
    if len(found) < 2:
        return []
    name = found[0].metric
    lower = name.endswith(_LOWER)
    best = (min if lower else max)(found, key=lambda row: row.mean)
    said = []
    for row in found:
        if row is best:
            continue
        apart = (
            f"{best.method} is {_amount(best, row)} {'below' if lower else 'above'} {row.method}"
        )
        if row.mean == best.mean:
            said.append(f"{best.method} and {row.method} are equal")
        elif row.std is None or best.std is None:
            said.append(f"{apart}, with one seed: that may be chance (--finetune.seeds 5)")
        else:
            p = min(1.0, _chance(best, row) * len(found) * (len(found) - 1) / 2)
            shown = f"{p:.2f}" if p >= 0.1 else f"{p:.1g}"
            if p < 0.05:
                said.append(f"{apart}, more than the seeds' spread explains (p = {shown})")
            else:
                said.append(
                    f"{apart}: within the spread of the seeds, which is no difference (p = {shown})"
                )
    return [f"{_title(name)}: {'; '.join(said)}"]


def _chance(one: Row, other: Row) -> float:
    """p-value of a difference: paired t-test over the seeds, or Welch's where they differ.

    1 where it does not vary: scores are counts, of which two or three are easily equal.
    """
    from scipy import stats  # half a second to import

    if one.each and one.seeds == other.seeds and len(one.each) == len(other.each) == one.n:
        apart = [a - b for a, b in zip(one.each, other.each, strict=True)]
        if max(apart) - min(apart) <= 1e-9:
            return 1.0
        return float(stats.ttest_1samp(apart, 0.0).pvalue)
    if not one.std and not other.std:
        return 1.0
    told = ((row.mean, row.std or 0.0, row.n) for row in (one, other))
    (a, s, n), (b, t, m) = told
    return float(stats.ttest_ind_from_stats(a, s, n, b, t, m, equal_var=False).pvalue)


def _title(metric: str) -> str:
    return metric.replace("_", " ").replace(" f1", " F1").replace("auroc", "AUROC")


def _amount(one: Row, other: Row) -> str:
    apart = abs(one.mean - other.mean)
    return f"{apart:.4f}" if one.metric.endswith("_loss") else f"{100 * apart:.2f} points"


def _shown(row: Row) -> str:
    scale, digits = (1, 4) if row.metric.endswith("_loss") else (100, 2)
    spread = "" if row.std is None else f" ± {scale * row.std:.{digits}f}"
    return f"{scale * row.mean:.{digits}f}{spread} (n = {row.n})"


def show(run: Path, metric: str | None = None, title: str | None = None) -> None:
    """Prints the table: method, mean ± sample standard deviation over the seeds, wall time."""
    columns = [rows(run, name) for name in chosen(run, metric)]
    found = columns[0]
    table = Table(title=title or str(run))
    table.add_column("method")
    for column in columns:
        name = column[0].metric
        unit = "nats" if name.endswith("_loss") else "%"
        table.add_column(f"{_title(name)}, {unit} (mean ± std, n)", justify="right")
    # One unit for the column, so that its rows can be compared at a glance.
    hours = max(row.seconds for row in found) >= 3600
    table.add_column("wall time (h:m:s)" if hours else "wall time (m:s)", justify="right")
    for methods in zip(*columns, strict=True):
        row = methods[0]
        table.add_row(row.method, *map(_shown, methods), _clock(row.seconds, hours))
    console = Console(emoji=False, markup=False)  # ":m:" is no emoji, a path in [] no style
    console.print(table)
    console.print("wall time: all stages of the method, with one fine-tuning", style="dim")
    for column in columns:
        for line in verdicts(column):
            console.print(line, highlight=False, soft_wrap=True)


def main(run: str, metric: str | None = None) -> None:
    """Prints the table of a run.

    Args:
        run: run folder.
        metric: a key of result.json's metrics, such as val_accuracy or test_macro_f1, or several
            with commas between them; by default that by which the set is scored, on its test split,
            and macro F1 where it differs.
    """
    show(Path(run).expanduser(), metric)


if __name__ == "__main__":
    cli.run(main)
