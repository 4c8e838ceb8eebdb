"""Paired differences between methods, their intervals, and what these say in words."""

from __future__ import annotations

import math

from selfdistill.experiments import results
from selfdistill.experiments.report.blocks import (
    Block,
    Entry,
    Grid,
    Line,
    Section,
    Text,
    notes,
    words,
)
from selfdistill.experiments.report.figures import Branch, forest
from selfdistill.experiments.report.numbers import NONE, TIED, interval, plain, signed
from selfdistill.experiments.report.sweep import Contents
from selfdistill.experiments.results import Comparison, Sample

#: Methods that the others are compared with.
AGAINST = ("fine_tuning", "further_pretraining")

#: Data sets beside each other.
WIDEST = 6

SHARED = (
    "All seeds of a method on a data set start from one further pre-training and one distillation:"
    " the spread and the intervals of a data set are those of fine-tuning alone (head, order of the"
    " data, dropout), and say nothing of how much another further pre-training would change."
)
PIPELINES = (
    "Each pipeline of a method has a further pre-training and a distillation of its own seeds:"
    " spread and intervals over pipelines are those of the whole method, from one model and one"
    " decoder. Fine-tuning and its regularizers start from the model: their pipelines differ by"
    " fine-tuning's seeds alone, in groups of the same number. Intervals of several pipelines are"
    " Student's t over their means, after the pairing by seed."
)
HOW = (
    "Differences are paired by seed: the same seed gives both methods the same order of the data."
    " Intervals: Student's t over seeds (n − 1 degrees of freedom), 95%; pooled: Student's t over"
    " the data sets' mean differences. None is corrected for the number of comparisons: of twenty"
    " intervals of methods that do not differ, one leaves out 0."
)


def shared(contents: Contents) -> str:
    """What the spread is that of."""
    several = any(len(one.cell.jobs) > 1 for one in contents.outcomes)
    return PIPELINES if several else SHARED


def comparisons(contents: Contents, against: str) -> dict[str, Comparison]:
    """Method -> its differences from another, of all methods that have any."""
    over = {d.name for t in contents.tables if t.table.shape == "table" for d in t.present}
    outcomes = [o for o in contents.outcomes if o.status == "done"]
    found = {
        name: results.compare(outcomes, name, against, over=over)
        for name in contents.methods
        if name != against
    }
    return {name: one for name, one in found.items() if one.each}


def sections(contents: Contents) -> list[Section]:
    """One section, with a part for each method that others are compared with."""
    parts = []
    for against in AGAINST:
        if against in contents.methods:
            parts.append(_part(contents, against))
    if not parts:
        return []
    blocks: list[Block] = [Text([HOW]), Text([shared(contents)])]
    return [Section("differences", "Paired differences", blocks, parts)]


def _part(contents: Contents, against: str) -> Section:
    title = f"Against {contents.methods[against].title}"
    key = f"against-{against.replace('_', '-')}"
    found = comparisons(contents, against)
    if not found:
        return Section(key, title, [Text(["No two methods are complete on one data set yet."])])
    blocks: list[Block] = [_told_apart(contents, found)]
    groups: dict[str, list[Branch]] = {}
    for name, one in found.items():
        branches = [Branch(contents.datasets[d].title, sample) for d, sample in one.each.items()]
        if one.pooled.n > 1:
            branches.append(Branch(f"pooled, {one.pooled.n} sets", one.pooled, True))
        groups[contents.methods[name].title] = branches
    xlabel = f"difference from {contents.methods[against].title}, points of the score on test"
    blocks += [*forest(groups, key, xlabel), *_grids(contents, found)]
    blocks += notes(
        "▲ above 0, ▼ below 0; without a sign the interval contains 0, or there is none."
        " In brackets: the 95% interval; in parentheses: seeds, or data sets.",
        _left_out(contents, found),
    )
    return Section(key, title, blocks)


def _grids(contents: Contents, found: dict[str, Comparison]) -> list[Block]:
    """All differences; pooled ones first, and no grid wider than a page."""
    shown = [name for name in contents.datasets if any(name in one.each for one in found.values())]
    over = frozenset().union(*(one.over for one in found.values()))
    sets = [name for name in shown if name in over]
    points = [name for name in shown if name not in over]
    pages = [some[i : i + WIDEST] for some in (sets, points) for i in range(0, len(some), WIDEST)]
    grids: list[Block] = []
    for some in pages:
        pooled = some is pages[0] and bool(sets)
        titles = (contents.datasets[name].title for name in some)
        head = words("method", *(["pooled"] if pooled else []), *titles)
        lines = []
        for method, one in found.items():
            entries = [Entry(contents.methods[method].title)]
            if pooled:
                sample = one.pooled
                entries.append(difference(sample, f"{TIED}sets") if sample.n > 1 else Entry(NONE))
            if any(name in one.each for name in some):
                entries += [difference(one.each.get(name, Sample())) for name in some]
                lines.append(Line(entries))
        caption = "mean paired difference in points of the score, 95% interval"
        grids.append(Grid(head, lines, caption, stacked=True))
    return grids


def difference(sample: Sample, what: str = "") -> Entry:
    """A mean difference with its interval; marked where that does not contain 0."""
    if not sample.n:
        return Entry(NONE)
    range_text = f"{interval(sample)} ({sample.count}{what})".strip()
    mean = signed(sample.mean)
    if sample.sign:
        up = sample.sign > 0
        return Entry(f"{'▲' if up else '▼'}{TIED}{mean}", range_text, "up" if up else "down")
    return Entry(mean, range_text)


def _left_out(contents: Contents, found: dict[str, Comparison]) -> str:
    """Data sets that are not pooled."""
    unpaired = {name for one in found.values() for name in one.each if name not in one.over}
    titles = [contents.datasets[name].title for name in contents.datasets if name in unpaired]
    if not titles:
        return ""
    return (
        f"Not pooled, since they are points of a curve, not sets of their own: {'; '.join(titles)}."
    )


def _told_apart(contents: Contents, found: dict[str, Comparison]) -> Grid:
    """On which data sets the interval lies on either side of 0, or contains it, in words."""
    lines = []
    for name, one in found.items():
        by_sign = [
            [contents.datasets[d].title for d, s in one.each.items() if _sign(s) == sign]
            for sign in (1, 0, -1, None)
        ]
        sets = ("; ".join(titles) or NONE for titles in by_sign)
        lines.append(Line(words(contents.methods[name].title, *sets)))
    places = ("interval above 0", "interval contains 0", "interval below 0", "no interval")
    head = words("method", *places)
    return Grid(head, lines, "data sets by where the 95% interval lies", labels=5)


def _sign(sample: Sample) -> int | None:
    """Its sign; None where there is no interval."""
    return sample.sign if math.isfinite(sample.interval()[0]) else None


def in_short(contents: Contents) -> list[str]:
    """What self-distillation does to the score, in a sentence for each of the two references."""
    lines = []
    for against in AGAINST:
        one = comparisons(contents, against).get("self_distillation")
        if one is None:
            continue
        other = contents.methods[against].title
        pooled = one.pooled
        parts = []
        low, high = pooled.interval()
        if math.isfinite(low):
            row = {
                1: "which lies above 0",
                -1: "which lies below 0",
                0: "which contains 0: the two are not told apart",
            }[pooled.sign]
            parts.append(
                f"Self-distillation minus {other}, pooled over {pooled.n} data sets:"
                f" {signed(pooled.mean)} points, 95% interval {plain(low, 2)} to {plain(high, 2)},"
                f" {row}."
            )
        signs = [_sign(s) for name, s in one.each.items() if name in one.over]
        signs = [sign for sign in signs if sign is not None]
        if signs:
            parts.append(
                f"On single data sets against {other}, the interval lies above 0 on"
                f" {signs.count(1)}, contains 0 on {signs.count(0)}, lies below 0 on"
                f" {signs.count(-1)} of {len(signs)}."
            )
        if parts:
            lines.append(" ".join(parts))
    return lines
