"""A page for each claim: the sentence, its verdict, figure, table, power, what would change it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from selfdistill.experiments.report.analysis import QUANTITIES
from selfdistill.experiments.report.blocks import (
    Block,
    Code,
    Entry,
    Grid,
    Line,
    Section,
    Style,
    Text,
    notes,
)
from selfdistill.experiments.report.claims.evidence import published, tables_of
from selfdistill.experiments.report.claims.statistics import ALPHA
from selfdistill.experiments.report.claims.verdict import Judged, Verdict, Word, cure, sentence
from selfdistill.experiments.report.figures import Branch, curve, forest
from selfdistill.experiments.report.numbers import (
    NONE,
    TIED,
    decimals,
    interval,
    plain,
    signed,
    spread,
)
from selfdistill.experiments.report.sweep import Contents
from selfdistill.experiments.report.tables import OTHER_SET
from selfdistill.experiments.results import Sample
from selfdistill.experiments.spec import Contrast, Quantity
from selfdistill.experiments.state import Asked

HOW = (
    "Each claim is tested on the cells of its tables. Cells with the same repetitions are compared"
    " repetition by repetition (paired t-test), others by Welch's. Intervals are of 95%, each by"
    " itself; verdicts use Holm's correction over all comparisons of a claim, those with it that"
    " are not run yet. A difference is there where 0 is ruled out; it is ruled out where the"
    " smallest difference that matters, named before, is; where neither is, nobody can tell. One"
    " comparison that speaks against a claim is enough, and all must support it."
)
STYLES: dict[Word, Style] = {
    "supported": "up",
    "not supported": "down",
    "can't tell": "",
    "not run": "missing",
}
FOREST = (
    "Points: differences; lines: their 95% intervals, before Holm's correction; grey band: less"
    " than what matters. Filled and blue: above 0; filled and orange: below 0; hollow: the interval"
    " contains 0."
)


def section(contents: Contents, verdicts: Sequence[Verdict]) -> list[Section]:
    """One section, with a part for each claim."""
    if not verdicts:
        return []
    parts = [_page(contents, verdict) for verdict in verdicts]
    return [Section("claims", "Claims", [Text([HOW])], parts, listed=True)]


def _page(contents: Contents, verdict: Verdict) -> Section:
    claim = verdict.claim
    facts = {"verdict": sentence(verdict), "the paper": claim.paper}
    if claim.note:
        facts["note"] = claim.note
    facts["repetitions"] = _repetitions(verdict)
    facts["said beforehand"] = _power(verdict)
    facts["what would change it"] = " ".join(cure(verdict)) if verdict.ran else "To run it:"
    lines = [
        Line([Entry(name), Entry(text, style=_style(name, verdict))])
        for name, text in facts.items()
        if text
    ]
    blocks: list[Block] = [Grid([Entry("what is said"), Entry("")], lines, labels=2)]
    if len(verdict.ran) < max(1, len(verdict.each)):
        blocks.append(Code(_commands(contents, verdict)))
    blocks += _figures(contents, verdict)
    for test in claim.tests:
        mine = [one for one in verdict.each if one.finding.test is test]
        if mine and (verdict.ran or any(o.finding.estimate for o in mine)):
            blocks += _table(contents, test, mine)
    return Section(f"claim-{claim.name.replace('_', '-')}", claim.title, blocks)


def _style(name: str, verdict: Verdict) -> Style:
    return STYLES[verdict.word] if name == "verdict" else ""


def _commands(contents: Contents, verdict: Verdict) -> list[str]:
    known = [replace(t.asked, only=()) for t in tables_of(contents, verdict.claim)]
    asked = known or [Asked(name) for name in verdict.claim.tables]
    return list(dict.fromkeys(contents.wanting(one) for one in asked))


def _repetitions(verdict: Verdict) -> str:
    """What was repeated, and what the intervals therefore speak of."""
    counts = sorted({one.finding.planned for one in verdict.each})
    if not verdict.ran:
        return ""
    many = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    if verdict.single:
        return (
            f"{many} fine-tunings of each cell, all from one further pre-training and one"
            " distillation: the spread is that of fine-tuning alone."
        )
    return (
        f"{many} pipelines, each with a further pre-training and a distillation of its own: the"
        " spread is that of their means. What starts from the model differs by fine-tuning alone."
    )


def _power(verdict: Verdict) -> str:
    """What the design would see, from the number of repetitions and the baseline's spread alone."""
    known = [one for one in verdict.each if math.isfinite(one.detects)]
    if not known:
        planned = any(not one.finding.test.against for one in verdict.ran)
        return "Nothing yet: the spread of the baseline is not known." if planned else ""
    texts = []
    for test in verdict.claim.tests:
        mine = [one.detects for one in known if one.finding.test is test]
        if mine:
            ends = dict.fromkeys(_number(x, test) for x in (min(mine), max(mine)))
            unit = unit_of(test)
            texts.append(
                f"{' to '.join(ends)} {unit} (what matters: {_number(test.matters, test)})"
            )
    family = len(verdict.each)
    share = f" at {ALPHA:g}/{family}, for {family} comparisons" if family > 1 else f" at {ALPHA:g}"
    listed = "; ".join(dict.fromkeys(texts))
    flattered = " The baseline has no stage 1, and may spread less than what it is compared with."
    return (
        "With these repetitions and the baseline's spread the smallest difference that is seen with"
        f" 80% power{share}: {listed}." + flattered * any(one.finding.flattered for one in known)
    )


def unit_of(test: Contrast) -> str:
    """The unit of a test's number."""
    if test.log:
        return "%"
    unit = "points" if test.key == "score" else "of the quantity"
    if test.against:
        return "for each unit"
    return unit + ("" if test.along is None or test.per == "unit" else f" a {test.per}")


def _number(value: float, test: Contrast) -> str:
    if test.key == "score" or test.log:
        return plain(value, 1)
    return plain(value, min(3, decimals(value)))


# --- figures


def _figures(contents: Contents, verdict: Verdict) -> list[Block]:
    """Differences as a forest, test by test; curves as what the table varies."""
    name = f"claim-{verdict.claim.name.replace('_', '-')}"
    blocks: list[Block] = []
    curves = any(t.along or t.against or t.weights for t in verdict.claim.tests)
    if curves:
        keys = dict.fromkeys(k for t in verdict.claim.tests for k in (t.key, t.against) if k)
        for table in tables_of(contents, verdict.claim):
            for key in keys:
                shown = Quantity(key=key, title=QUANTITIES.get(key, ""))
                drawn = curve(table, shown, f"{name}-curve-{len(blocks) + 1}")
                blocks += [drawn] if drawn is not None and verdict.ran else []
    # Tests whose numbers are of one kind share a figure.
    kinds: dict[tuple[str, float], dict[str, list[Branch]]] = {}
    for one in verdict.ran:
        test, estimate = one.finding.test, one.finding.estimate
        if estimate is not None and not test.along and not test.against:
            groups = kinds.setdefault((unit_of(test), test.matters), {})
            groups.setdefault(_heading(one), []).append(Branch(one.finding.label, estimate))
    for number, ((unit, matters), groups) in enumerate(kinds.items()):
        own = f"{name}-{'abcdefgh'[number]}"
        blocks += forest(groups, own, f"difference, {unit}", matters, FOREST)
    return blocks


def _heading(one: Judged) -> str:
    """What a figure calls a test; it has no room for long ones."""
    test, parts = one.finding.test, one.finding.parts
    text = f"minus {parts[-1].title}" if test.b else test.says
    return textwrap.shorten(text, 38, placeholder=" …")


# --- tables


def _probability(p: float) -> str:
    """Three digits, or more where they would hide on which side of 0.05 it lies."""
    if math.isnan(p) or p < 0.001:
        return NONE if math.isnan(p) else "<0.001"
    return plain(p, 3 if abs(p - ALPHA) >= 0.0005 else 6)


def _table(contents: Contents, test: Contrast, mine: Sequence[Judged]) -> list[Block]:
    pair = bool(test.b) and test.along is None
    titles = [part.title for part in mine[0].finding.parts]
    number = "slope" if test.along or test.against else "difference"
    head = [Entry("on"), *([Entry(t) for t in titles] if pair else [])]
    head += [Entry(number, unit_of(test)), Entry("p", "Holm"), Entry("sees from", "80% power")]
    head += [Entry("verdict")]
    lines = []
    for one in mine:
        e = one.finding.estimate
        row = [Entry(one.finding.label)]
        if pair:
            row += [_cell(one, n) for n in (0, 1)]
        if e is None:
            row += [Entry(NONE), Entry(NONE)]
        else:
            many = "" if one.finding.single else " pipelines"
            digits = 2 if test.key == "score" else decimals(max(abs(e.mean), e.error))
            kind = f" ({e.n}{many}, {'paired' if e.paired else 'Welch'})"
            row.append(Entry(signed(e.mean, digits), interval(e, digits) + kind))
            row.append(Entry(_probability(one.p)))
        row.append(Entry(NONE if math.isnan(one.detects) else _number(one.detects, test)))
        row.append(Entry(one.word, f"({one.reason})", STYLES[one.word]))
        lines.append(Line(row))
        papers = published(contents, one.finding) if pair else []
        if papers:
            rest = [Entry("")] * (len(head) - 4)
            first, second = (float(p.text.partition(" ")[0]) for p in papers)
            marked = [Entry(f"{p.text}{TIED}{p.more}".rstrip(TIED)) for p in papers]
            lines.append(
                Line([Entry("the paper"), *marked, Entry(signed(first - second)), *rest], True)
            )
    grid = Grid(head, lines, test.says, labels=1, stacked=True)
    marks = any(e.text.endswith(OTHER_SET) for line in lines if line.paper for e in line.entries)
    return [grid, *notes(f"{OTHER_SET} another set than the paper's: not comparable." * marks)]


def _cell(one: Judged, number: int) -> Entry:
    part = one.finding.parts[number]
    sample = part.outcome.sample(one.finding.test.key) if part.outcome is not None else Sample()
    if part.state or not sample.n:
        return Entry(part.state or NONE, style="missing")
    # What pipelines have within stands below, or the table is too wide.
    text, _, within = spread(sample, one.finding.test.key).partition(", ")
    return Entry(text.replace(" ", TIED), f"{within} ({sample.count})".strip())
