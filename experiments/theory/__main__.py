"""Checks the paper's theory numerically: `python -m experiments.theory`.

Draws random problems of the simplified model, compares Lemma 1 and the fine-tuning flow with
numerical solutions, and counts where Theorems 1 and 2 hold: as printed, exactly, and with a bound
that the left-out cross term does not break. docs/theory.md tells what came out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.experiments.theory import checks
from selfdistill.experiments.theory import figure as theory_figure
from selfdistill.experiments.theory.problems import LABELS, STARTS, TIMES, Sizes

#: Closed forms must be this near to the numerical solutions, relative to their norm.
TOLERANCE = 1e-8

_COMPARED = {
    "lemma_1": "Lemma 1: w(t,0) against ridge regressions",
    "flow_exponential": "flow: c(t,T) against the matrix exponential",
    "flow_steps": "flow: c(t,T) against small steps",
}


def verdicts(record: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """The statements that must hold, what was found, and whether they did.

    Args:
        record: of :func:`check`.

    Returns:
        (statement, figure, holds), the printed forms' shortcomings not among them.
    """
    all_cases, found = record["all"], []
    for name, statement in _COMPARED.items():
        errors = record["errors"][name]
        figure = f"relative error at most {errors['max']:.1e} ({errors['comparisons']} comparisons)"
        found.append((statement, figure, errors["max"] <= TOLERANCE))
    n = all_cases["cases"]
    for name, statement in (
        ("zeta_decreases", "Theorem 1: zeta(t), as we derive it, strictly decreases"),
        ("psi_decreases", "Theorem 2: psi(t) strictly decreases"),
        ("psi_drops_most_at_1", "Theorem 2: psi(t) drops most at t = 1"),
    ):
        found.append((statement, f"{all_cases[name]} of {n} cases", all_cases[name] == n))
    fails = all_cases["zeta_fails_to_bound_norm"]
    found.append(("zeta(t) bounds ||w(t,T)||", f"{n - fails} of {n} cases", fails == 0))
    return found


#: Columns of the counts: heading, its two lines in a terminal of 80 columns, the tally's figure.
_COLUMNS = (
    ("cases", "cases", "cases"),
    ("psi < dist.", "psi <\ndist.", "psi_fails_to_bound_distance"),
    ("norm falls", "norm\nfalls", "norm_decreases"),
    ("dist. falls", "dist.\nfalls", "distance_decreases"),
    ("dist. rises at 1", "rises\nat 1", "distance_grows_at_1"),
    ("dist. drops most at 1", "most\nat 1", "distance_drops_most_at_1"),
)
_HEADINGS = (
    "",
    *(heading for heading, *_ in _COLUMNS),
    "dist. / psi, median [quartiles]",
    "its largest",
)
_LEGEND = (
    "Rows: start, labels. psi < dist.: the printed psi(t) fails to bound the exact distance "
    "||w_init − w(t,T)|| at some t. Norm: the exact ||w(t,T)||. Falls: strictly, at every t. "
    "Rises, drops most at 1: the distance, from t = 0 to t = 1. Dist. / psi: largest over t."
)


def _rows(groups: dict[str, Any]) -> list[list[str]]:
    """A line of text cells for each tally, under _HEADINGS."""
    found = []
    for name, tally in groups.items():
        ratio = tally["distance_over_psi"]
        spread = f"{ratio['median']:.2f} [{ratio['q1']:.2f}, {ratio['q3']:.2f}]"
        counts = [str(tally[key]) for *_, key in _COLUMNS]
        found.append([name, *counts, spread, f"{ratio['max']:.3f}"])
    return found


def show(record: dict[str, Any]) -> None:
    """Prints the verdicts and, by start and labels, where printed and exact forms part."""
    console = Console(emoji=False, markup=False, highlight=False)
    table = Table(show_header=False)
    for statement, figure, holds in verdicts(record):
        table.add_row("ok" if holds else "FAILED", statement, figure)
    console.print(table)
    # Narrow, for 80 columns.
    counts = Table(
        title="where the printed form and the exact one part", box=box.SIMPLE, padding=(0, 0, 0, 1)
    )
    # The spread is left to theory.md.
    for heading in ("", *(lines for _, lines, _ in _COLUMNS), "dist.\n/ psi"):
        counts.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in _rows({**record["by_start_and_labels"], "all": record["all"]}):
        counts.add_row(*row[:-2], row[-1])
    console.print(counts)
    console.print(_LEGEND, style="dim")


def markdown(record: dict[str, Any]) -> str:
    """The record as Markdown: settings, verdicts, counts, counter-examples."""
    settings = ", ".join(f"{k} {v}" for k, v in record["settings"].items() if v is not None)
    lines = ["# Theory check", "", settings, "", "| statement | found | holds |", "|---|---|---|"]
    for statement, figure, holds in verdicts(record):
        lines.append(
            f"| {statement.replace('|', chr(92) + '|')} | {figure} | {'yes' if holds else 'NO'} |"
        )
    lines += ["", "| " + " | ".join(_HEADINGS) + " |", "|---" * len(_HEADINGS) + "|"]
    groups = {**record["by_start_and_labels"], **record["by_time"], "all": record["all"]}
    lines += ["| " + " | ".join(row) + " |" for row in _rows(groups)]
    lines += ["", _LEGEND]
    lines += ["", "## Worst case against each statement that does not always hold"]
    for statement, case in record["counter_examples"].items():
        lines += ["", f"### {statement}", ""]
        lines.append(
            f"problem {case['index']}, start {case['start']}, labels {case['labels']}: "
            f"n {case['n']}, d {case['d']}, p {case['p']}, n·lambda/mean(s²) {case['ridge']:.4g}, "
            f"T·mean(s²) {case['time']:g}"
        )
        for name, values in case["values"].items():
            lines.append(f"- {name}: " + ", ".join(f"{v:.6g}" for v in values))
    return "\n".join([*lines, ""])


def check(
    problems: int, seed: int, rounds: int, sizes: Sizes
) -> tuple[dict[str, Any], list[checks.Case]]:
    """Draws the problems and makes all figures.

    Args:
        problems: how many.
        seed: of all of them.
        rounds: the last t.
        sizes: of the problems.

    Returns:
        The record, plain values for JSON; and the cases it counts, for the figure.
    """
    cases = checks.cases(seed, problems, rounds, sizes)
    record = {
        "settings": {
            "problems": problems,
            "seed": seed,
            "rounds": rounds,
            "n": sizes.n,
            "d": sizes.d,
            "p": sizes.p,
        },
        "errors": checks.errors(seed, problems, rounds, sizes),
        "all": checks.tally(cases),
        "by_start_and_labels": {
            f"{start}, {labels}": checks.tally(
                [c for c in cases if (c.start, c.labels) == (start, labels)]
            )
            for start in STARTS
            for labels in LABELS
        },
        "by_time": {
            f"T·mean(s²) {time:g}": checks.tally([c for c in cases if c.time == time])
            for time in TIMES
        },
        "counter_examples": checks.counter_examples(cases),
    }
    return record, cases


def _refuse_other_record(path: Path, settings: dict[str, Any]) -> None:
    """A record of the same settings may be made again; another one is not overwritten.

    Raises:
        UserError: there is another record, or something that is none.
    """
    if not path.exists():
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        there = None
    if there != settings:
        raise UserError(f"{path} holds other figures than these: choose another --output")


def main(
    problems: int = 100,
    seed: int = 0,
    output: str = "runs/theory",
    rounds: int = 4,
    n: int | None = None,
    d: int | None = None,
    p: int | None = None,
) -> None:
    """Checks the theory on random problems; exit code 1 if a statement that must hold fails.

    Args:
        problems: random problems, each with all starts, labels and times of fine-tuning.
        seed: of the problems; the same seed gives the same figures.
        output: a folder for theory.json, theory.md and theory.png.
        rounds: rounds of self-distillation, the last t.
        n: samples of every problem; by default drawn, 2 to 6.
        d: features, more than n; by default drawn, n + 1 to n + 6.
        p: outputs; by default drawn, 1 to 3.
    """
    for name, value, least in (("problems", problems, 1), ("seed", seed, 0), ("rounds", rounds, 2)):
        if value < least:
            raise UserError(f"option --{name} must be at least {least}, not {value}")
    folder, sizes = Path(output), Sizes(n, d, p)
    settings = {"problems": problems, "seed": seed, "rounds": rounds, "n": n, "d": d, "p": p}
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is no folder: choose another --output")
    _refuse_other_record(folder / "theory.json", settings)
    folder.mkdir(parents=True, exist_ok=True)
    record, cases = check(problems, seed, rounds, sizes)
    show(record)
    title = f"{problems} random problems, seed {seed}"
    theory_figure.draw(cases, title, folder / "theory.png")
    write_text(folder / "theory.md", markdown(record))
    # The record last: where it lies, the rest does, too.
    write_text(folder / "theory.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
    print(f"{folder}: theory.json, theory.md, theory.png")
    if not all(holds for *_, holds in verdicts(record)):
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
