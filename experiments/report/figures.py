"""Figures of a report as SVG: curves, and a forest of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from selfdistill.experiments.report.blocks import Drawing
from selfdistill.experiments.report.numbers import Interval, setting
from selfdistill.experiments.report.sweep import Reported
from selfdistill.experiments.results import Sample
from selfdistill.experiments.spec import Quantity
from selfdistill.launcher.pages.drawing import BLUE, GREY, INK, STYLE, VERMILION, svg

# Markers differ as colours do.
COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Width of a figure in inches: 720 CSS pixels.
WIDTH = 7.5
#: Lines of a forest that still fit a printed page.
TALLEST = 38


# --- curves


def curve(table: Reported, quantity: Quantity, name: str) -> Drawing | None:
    """A quantity over what the table varies; None where no cell is complete."""
    lines = _lines(table, quantity.key)
    if not lines:
        return None
    ylabel = quantity.title or ("score on test, %" if quantity.key == "score" else quantity.key)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        axes = figure.subplots()
        every: set[float] = set()
        for number, (label, points) in enumerate(lines.items()):
            at = sorted(points)
            every |= set(at)
            axes.errorbar(
                at,
                [points[x].mean for x in at],
                # One seed has no spread: no bar.
                yerr=[points[x].std if points[x].n > 1 else 0.0 for x in at],
                label=label,
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
                capsize=3,
                elinewidth=1.1,
            )
        _scale(axes, table, quantity, every)
        axes.set_xlabel(table.table.x)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        columns = min(3, len(lines))
        figure.legend(loc="outside upper left", ncols=columns, frameon=False)
        drawn = svg(figure)
    description = f"{table.table.title}: {ylabel} over {table.table.x}, for {', '.join(lines)}"
    several = any(len(p.pipelines) > 1 for points in lines.values() for p in points.values())
    over = "the pipelines' means" if several else "seeds"
    return Drawing(name, drawn, description, f"Error bars: standard deviation over {over}.")


def _lines(table: Reported, key: str) -> dict[str, dict[float, Sample]]:
    """Name of a line -> x -> figures, of the cells that are complete."""
    on_rows = all(row.x is not None for row in table.table.rows)
    places = [row.x for row in table.table.rows]
    # Rows at one place are of several lines.
    methods = on_rows and len(set(places)) < len(places)
    families = {d.family for d in table.present if d.name in table.table.at}
    found: dict[str, dict[float, Sample]] = {}
    for (number, name), one in sorted(table.cells.items(), key=lambda item: item[0][0]):
        x = table.table.rows[number].x if on_rows else table.table.at.get(name)
        sample = one.sample(key)
        if one.status == "done" and sample.n and x is not None:
            label = one.cell.dataset.title if on_rows else table.title(number)
            if not on_rows and len(families) > 1:
                label += f", {one.cell.dataset.family.replace('_', ' ')}"
            if methods:
                several = f", {label}" if len(table.present) > 1 else ""
                label = f"{one.cell.method.title}{several}"
            found.setdefault(label, {})[x] = sample
    return found


def _scale(axes: Axes, table: Reported, quantity: Quantity, every: set[float]) -> None:
    if quantity.log:
        axes.set_yscale("log")
    if table.table.log_x and min(every) > 0:
        axes.set_xscale("log")
        places = _apart(sorted(every))
        axes.set_xticks(places, [f"{x:,g}" for x in places])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(min(every) / 1.15, max(every) * 1.15)
    elif all(float(x).is_integer() for x in every):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        axes.set_xticks(sorted(every), [setting(x) for x in sorted(every)])


def _apart(places: Sequence[float]) -> list[float]:
    """Places on a log axis whose labels do not touch: each a quarter above the one before."""
    kept: list[float] = []
    span = places[-1] / places[0]
    least = max(1.25, span ** (1 / 14))
    for x in reversed(places):
        if not kept or kept[-1] / x >= least:
            kept.append(x)
    return kept[::-1]


# --- paired differences

FOREST = (
    "Points: mean paired differences; lines: their 95% intervals; diamonds: pooled over data sets."
    " Filled and blue: above 0; filled and orange: below 0; hollow and grey: the interval contains"
    " 0. A point without a line has no interval: too few seeds, or all differ by the same."
)


@dataclass(frozen=True)
class Branch:
    """A line of a forest plot.

    Attributes:
        label: at its left.
        sample: differences, or what was estimated from them.
        pooled: whether it sums up those above it.
    """

    label: str
    sample: Interval
    pooled: bool = False


def forest(
    groups: dict[str, list[Branch]],
    name: str,
    xlabel: str,
    matters: float = 0.0,
    caption: str = FOREST,
) -> list[Drawing]:
    """Differences with their intervals, group by group; several figures where one is too tall.

    Args:
        groups: heading -> lines.
        name: of the file.
        xlabel: what the differences are.
        matters: the smallest difference that does: a band on either side of 0 is shaded.
        caption: below the last of them.
    """
    samples = [branch.sample for branches in groups.values() for branch in branches]
    ends = [end for s in samples for end in (s.mean, *s.interval()) if math.isfinite(end)]
    low, high = min([*ends, -matters]), max([*ends, matters])
    margin = 0.04 * (high - low) or 1.0
    parts: list[dict[str, list[Branch]]] = [{}]
    for heading, branches in groups.items():
        tall = sum(2 + len(known) for known in parts[-1].values())
        if parts[-1] and tall + len(branches) > TALLEST:
            parts.append({})
        parts[-1][heading] = branches
    drawings = []
    for number, part in enumerate(parts):
        own = name if number == 0 else f"{name}-{number + 1}"
        drawn = _forest(part, xlabel, (low - margin, high + margin), _room(groups), matters)
        description = f"Forest plot: {xlabel}, for {', '.join(part)}"
        drawings.append(
            Drawing(own, drawn, description, caption if number + 1 == len(parts) else "")
        )
    return drawings


def _room(groups: dict[str, list[Branch]]) -> float:
    """Inches that the longest label takes: one place for the axis of all parts of a figure."""
    plain = max(len(branch.label) for branches in groups.values() for branch in branches)
    return 0.2 + max(0.08 * plain, 0.093 * max(map(len, groups)))


def _forest(
    groups: dict[str, list[Branch]],
    xlabel: str,
    span: tuple[float, float],
    room: float,
    matters: float,
) -> str:
    labels: list[str] = []
    places: list[float] = []
    y = 0.0
    with matplotlib.rc_context(STYLE):
        # Its size depends on how many lines there are.
        axes = (figure := Figure()).subplots()
        axes.axvline(0, color=INK, linewidth=1.0, zorder=1)
        if matters:
            axes.axvspan(-matters, matters, color="#eceef0", zorder=0)
        for heading, branches in groups.items():
            y += 0.5 if labels else 0.0
            labels.append(heading)
            places.append(y)
            for branch in branches:
                y += 1
                labels.append(branch.label)
                places.append(y)
                _branch(axes, y, branch)
            y += 1
        tall = 0.65 + 0.235 * (y + 0.6)
        figure.set_size_inches(WIDTH, tall)
        left = min(0.5, room / WIDTH)
        figure.subplots_adjust(left, 0.55 / tall, 0.985, 1 - 0.1 / tall)
        axes.set_xlim(span)
        axes.set_ylim(y - 0.1, -0.7)
        axes.set_yticks(places, labels)
        for text in axes.get_yticklabels():
            text.set_fontweight("bold" if text.get_text() in groups else "normal")
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        # From the right, so that there is room for it under the labels.
        axes.set_xlabel(xlabel, loc="right")
        return svg(figure)


def _branch(axes: Axes, y: float, row: Branch) -> None:
    colour = {1: BLUE, -1: VERMILION, 0: GREY}[row.sample.sign]
    if row.sample.n > 1:
        axes.plot(row.sample.interval(), [y, y], color=colour, linewidth=2.0, zorder=2)
    axes.plot(
        [row.sample.mean],
        [y],
        marker="D" if row.pooled else "o",
        markersize=7.5 if row.pooled else 6,
        color=colour,
        markerfacecolor=colour if row.sample.sign else "white",
        markeredgewidth=1.6,
        zorder=3,
    )
