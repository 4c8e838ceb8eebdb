"""The figure of the theory check: bounds beside the exact norms, over rounds of distillation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from selfdistill.experiments.theory.checks import ROUNDING, Case
from selfdistill.experiments.theory.problems import LABELS, STARTS, TIMES, Array

# Okabe and Ito's colours, which the colour-blind can tell apart; markers differ as well.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
#: T of the panels over t: fine-tuning half done, where start and labels both count.
_TIME = 1.0


def _band(axes: Axes, rows: Array, label: str, colour: str, marker: str) -> None:
    """Draws median and quartiles over problems (rows: problems×rounds) against t."""
    t = np.arange(rows.shape[1])
    low, middle, high = np.quantile(rows, [0.25, 0.5, 0.75], axis=0)
    axes.fill_between(t, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(t, middle, color=colour, marker=marker, label=label, linewidth=1.8)


def _over_rounds(axes: Axes, title: str, scale: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("round of self-distillation t")
    axes.set_ylabel(f"divided by {scale}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)


def draw(cases: Sequence[Case], title: str, path: Path) -> None:
    """Writes the figure as a PNG.

    Args:
        cases: of all starts, labels and times.
        title: what they are, above the panels.
        path: where it goes.
    """
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    figure.suptitle(
        f"{title}. Lines: medians, bands: quartiles over problems;\n"
        f"over t: fine-tuning for T = {_TIME:g} / mean(s²)"
    )
    (top_left, top_right), (low_left, low_right) = figure.subplots(2, 2)

    def rows(name: str, scale: str, start: str, labels: str) -> Array:
        chosen = [c for c in cases if (c.start, c.labels, c.time) == (start, labels, _TIME)]
        return np.stack([c.values[name] / c.values[scale][0] for c in chosen])

    for axes, scale, curves, heading in (
        (
            top_left,
            "norm_printed",
            (
                ("zeta", "ζ(t), a bound (our derivation)"),
                ("norm_printed", "√(G₁+ψ₁+1{t=0}B), printed"),
                ("norm", "exact ‖w(t,T)‖"),
            ),
            "Norm of w(t,T); labels aligned with the teacher",
        ),
        (
            top_right,
            "psi",
            (
                ("psi_mended", "ζ(t) + G₂, a bound (ours)"),
                ("psi", "ψ(t), printed"),
                ("distance", "exact ‖w_init − w(t,T)‖"),
            ),
            "Distance from w_init; start near, labels aligned",
        ),
    ):
        styles = ((_GREEN, "s"), (_BLUE, "o"), (_ORANGE, "^"))
        start = "independent" if scale == "norm_printed" else "near"
        for (name, label), (colour, marker) in zip(curves, styles, strict=True):
            _band(axes, rows(name, scale, start, "aligned"), label, colour, marker)
        unit = "the printed form at t = 0" if scale == "norm_printed" else "ψ(0)"
        _over_rounds(axes, heading, unit)
        axes.set_ylim(bottom=0)

    for start, colour, marker in zip(STARTS, (_BLUE, _ORANGE, _GREEN), "o^s", strict=True):
        found = rows("distance", "distance", start, "independent")
        _band(low_left, found, f"start {start}", colour, marker)
        for labels, dashes in zip(LABELS, ("--", "-"), strict=True):
            shares = []
            for time in TIMES:
                these = [c for c in cases if (c.start, c.labels, c.time) == (start, labels, time)]
                broken = sum(c.excess("distance", "psi") > 1 + ROUNDING for c in these)
                shares.append(100 * broken / len(these))
            label = f"{start}, {labels}"
            low_right.plot(TIMES, shares, dashes, color=colour, marker=marker, label=label)
    _over_rounds(low_left, "Exact distance from w_init; labels independent", "its value at t = 0")
    low_left.axhline(1, color="0.6", linewidth=0.8, zorder=0)
    low_right.set_title("Printed ψ(t) under the exact distance, at some t")
    low_right.set_xscale("log")
    low_right.set_xlabel("fine-tuning time T · mean(s²)")
    low_right.set_ylabel("% of problems")
    low_right.set_ylim(-4, 152)  # room for the legend, as lines may run along 100
    low_right.set_yticks(range(0, 101, 20))
    low_right.legend(frameon=False, ncols=2, loc="upper center", title="start, labels")
    figure.savefig(path, dpi=120)
