"""The tables that a sweep was asked for, the paper's figures under ours."""

from __future__ import annotations

from typing import Any

from selfdistill.experiments.report.blocks import (
    Block,
    Code,
    Entry,
    Grid,
    Line,
    Section,
    Text,
    notes,
)
from selfdistill.experiments.report.figures import curve
from selfdistill.experiments.report.numbers import BETTER, TIED, setting, spread
from selfdistill.experiments.report.sweep import Contents, Reported
from selfdistill.experiments.results import Outcome
from selfdistill.experiments.spec import Dataset, Method, Quantity

#: What marks a figure of the paper that is not of this data set.
OTHER_SET = "†"

#: Quantities of which the paper's figures are, where a table shows several.
_PAPERS = ("score", "analysis.test_loss", "seconds")

STATES = {
    "failed": "failed: it ended with the error below the table",
    "blocked": "blocked: something that it starts from failed",
    "under way": "under way: begun, and running or interrupted when this report was made",
    "not run": "not run: its turn has not come",
    "not asked": "not asked: left out by --only",
    "no data": "no data: the set is not in data_root",
}


def sections(contents: Contents) -> list[Section]:
    """A section for each table."""
    seen: dict[str, int] = {}
    made = []
    for table in contents.tables:
        name = table.table.name
        seen[name] = seen.get(name, 0) + 1
        # One table may be asked for twice, with other data sets.
        key = name if seen[name] == 1 else f"{name}-{seen[name]}"
        made.append(Section(key, table.table.title, _blocks(contents, table, key)))
    return made


def _blocks(contents: Contents, table: Reported, key: str) -> list[Block]:
    blocks: list[Block] = []
    if table.table.note:
        blocks.append(Text([table.table.note]))
    states: dict[str, None] = {}
    marked = papers = False
    compared = table.table.shape == "table" and any(
        sum(one.status == "done" for (_, name), one in table.cells.items() if name == d.name) > 1
        for d in table.present
    )
    compared = compared and any(q.key in BETTER for q in table.table.shows)
    for number, quantity in enumerate(table.table.shows):
        if table.table.shape == "curve":
            name = key if number == 0 else f"{key}-{number + 1}"
            drawing = curve(table, quantity, name)
            if drawing is not None:
                blocks.append(drawing)
        grid, found = _grid(contents, table, quantity)
        marked |= any(e.more == OTHER_SET for line in grid.lines for e in line.entries)
        papers |= any(line.paper for line in grid.lines)
        states |= dict.fromkeys(found)
        blocks.append(grid)
    blocks += _notes(contents, table, states, marked, papers, compared)
    return blocks


def _grid(contents: Contents, table: Reported, quantity: Quantity) -> tuple[Grid, list[str]]:
    on_rows = all(row.x is not None for row in table.table.rows)
    head = [Entry("method")] + ([Entry("x")] if on_rows else [])
    head += [Entry(d.title, _unit(table, d, quantity)) for d in table.datasets]
    best = _best(table, quantity.key) if table.table.shape == "table" else {}
    lines, states = [], []
    for number, row in enumerate(table.table.rows):
        label = [Entry(table.title(number))]
        if on_rows:
            label.append(Entry(setting(row.x)))
        entries = []
        for dataset in table.datasets:
            state = state_of(table, number, dataset)
            if state:
                states.append(state)
            one = table.cells.get((number, dataset.name))
            bold = best.get(dataset.name) == number
            entries.append(cell(one, quantity.key, state, bold))
        lines.append(Line(label + entries))
        papers = published(contents, table, number, quantity)
        if any(e.text for e in papers):
            lines.append(
                Line([Entry("the paper"), *([Entry("")] if on_rows else []), *papers], True)
            )
    caption = quantity.title or ("score on test" if quantity.key == "score" else quantity.key)
    if on_rows:
        caption += f" over x, {table.table.x}" if table.table.x else " over x"
    more = ", mean ± standard deviation (number of seeds)"
    if any(len(one.cell.jobs) > 1 for one in table.cells.values()):
        more = (
            ", mean ± standard deviation of the pipelines' means, within: that of the fine-tunings"
            " of one pipeline (pipelines × seeds of each)"
        )
    return Grid(head, lines, caption + more, labels=2 if on_rows else 1), states


def state_of(table: Reported, number: int, dataset: Dataset) -> str:
    """Why a cell has no number, or not all of them; "" for one that is complete."""
    if dataset.name in table.absent:
        return "no data"
    one = table.cells.get((number, dataset.name))
    if one is not None and one.status == "done":
        return ""
    if one is not None and one.status in ("failed", "blocked"):
        return one.status
    if one is not None and (one.begun or one.results):
        return "under way"
    return "not run" if (number, dataset.name) in table.wanted else "not asked"


def cell(one: Outcome | None, key: str, state: str, bold: bool = False) -> Entry:
    """A cell: its figure, what is known so far, or why there is none."""
    sample = one.sample(key) if one is not None else None
    if sample is None or not sample.n:
        return Entry(state or "–", style="missing" if state else "")
    text = spread(sample, key)
    if not state:
        return Entry(text, f"({sample.count})", "best" if bold else "")
    assert one is not None
    return Entry(state, f"{text} ({sample.n} of {one.cell.seeds})", "missing")


def _unit(table: Reported, dataset: Dataset, quantity: Quantity) -> str:
    """What a column's scores are."""
    if quantity.key != "score":
        return ""
    known = (o for (_, name), o in table.cells.items() if name == dataset.name and o.results)
    one = next(known, None)
    return "%" if one is None else f"{one.metric.replace('_', ' ').replace('f1', 'F1')}, %"


def _best(table: Reported, key: str) -> dict[str, int]:
    """Data set -> the row whose mean is best, where it is told from the second by its interval."""
    if key not in BETTER:
        return {}
    found: dict[str, int] = {}
    for dataset in table.present:
        samples = {
            number: one.sample(key)
            for (number, name), one in table.cells.items()
            if name == dataset.name and one.status == "done" and one.sample(key).n
        }
        ranked = sorted(samples, key=lambda n: -BETTER[key] * samples[n].mean)
        if len(ranked) > 1:
            first, second = (samples[n] for n in ranked[:2])
            if first.minus(second).sign == BETTER[key]:
                found[dataset.name] = ranked[0]
    return found


def published(contents: Contents, table: Reported, number: int, quantity: Quantity) -> list[Entry]:
    """The paper's figures of a row."""
    shown = [q.key for q in table.table.shows]
    of = next((key for key in _PAPERS if key in shown), None)
    section: dict[str, Any] = contents.paper.get(table.table.paper or table.table.name, {})
    row = table.table.rows[number]
    # A claim's table need not be one that was asked for.
    method = contents.methods.get(row.method) or contents.specs.load(Method, row.method)
    figures = section.get(row.paper or method.paper or "", {})
    entries = []
    for dataset in table.datasets:
        published = figures.get(dataset.paper or "") if of == quantity.key else None
        # Without data there is nothing of ours that it could be mistaken to be comparable with.
        mark = "" if dataset.same else OTHER_SET
        entries.append(
            Entry("") if published is None else Entry(published.replace("±", f" ±{TIED}"), mark)
        )
    return entries


def _notes(
    contents: Contents,
    table: Reported,
    states: dict[str, None],
    marked: bool,
    papers: bool,
    compared: bool,
) -> list[Block]:
    remarks: list[str] = []
    if compared:
        remarks.append(
            "Bold: the best mean of a column, where the 95% interval of its paired difference from"
            " the second best does not contain 0. In a column without bold the first two are not"
            " told apart."
        )
    if marked:
        others = [d for d in table.datasets if not d.same and d.paper]
        text = "; ".join(
            f"{d.title}: {(d.note or 'divided anew, or made in another way').rstrip('.')}"
            for d in others
        )
        remarks.append(f"{OTHER_SET} another set than the paper's: not comparable. {text}.")
    reasons: dict[str, None] = {}
    for (number, _), one in table.cells.items():
        if one.status in ("failed", "blocked"):
            place = f"{table.title(number)} on {one.cell.dataset.title}"
            reasons[f"{place}, {one.status}: {one.message or 'no reason is known'}"] = None
    if papers and contents.profile.name != "paper":
        remarks.append(
            "The paper's figures are those of ViT-B/16 and RoBERTa-base with its own schedules"
            f" (profile paper); ours are those of profile {contents.profile.name}:"
            f" {contents.profile.title}."
        )
    remarks = [
        *reasons,
        "; ".join(STATES[state] for state in STATES if state in states),
        *remarks,
    ]
    used = dict.fromkeys(row.method for row in table.table.rows)
    remarks += [f"{m.title}: {m.note}" for m in (contents.methods[n] for n in used) if m.note]
    blocks = notes(*remarks)
    packs = [d.pack or f"(no command is known that packs {d.name})" for d in table.datasets
             if d.name in table.absent]  # fmt: skip
    if packs:
        blocks += [Text(["Data sets that are not in data_root are packed by:"]), Code(packs)]
    return blocks
