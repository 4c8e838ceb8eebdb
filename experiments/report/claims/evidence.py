"""From a claim and a sweep to numbers: which cells are compared, and what is known of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError
from selfdistill.experiments.jobs import PIPELINE
from selfdistill.experiments.report import sweep as report_sweep
from selfdistill.experiments.report import tables as report_tables
from selfdistill.experiments.report.blocks import Entry
from selfdistill.experiments.report.claims.statistics import (
    Design,
    Estimate,
    Units,
    contrast,
    slope_weights,
    slopes,
)
from selfdistill.experiments.report.sweep import Contents, Reported
from selfdistill.experiments.results import Outcome
from selfdistill.experiments.spec import Claim, Contrast, Dataset, Quantity, Table

Key = TypeVar("Key", int, str)


@dataclass(frozen=True)
class Part:
    """A cell with its weight in a contrast.

    Attributes:
        table: in which it stands.
        row: number of its row.
        dataset: its column.
        weight: with which its mean counts.
    """

    table: Reported
    row: int
    dataset: Dataset
    weight: float

    @property
    def outcome(self) -> Outcome | None:
        """What is known of it."""
        return self.table.cells.get((self.row, self.dataset.name))

    @property
    def state(self) -> str:
        """Why it has no figures, or not all; "" where it is complete."""
        return report_tables.state_of(self.table, self.row, self.dataset)

    @property
    def title(self) -> str:
        """Its row's name."""
        return self.table.title(self.row)


def units(one: Outcome, key: str, log: bool = False) -> Units:
    """A cell's figures of a quantity; with `log` 100 times their logarithms: differences in %.

    Of several pipelines each gives one figure, the mean of its fine-tunings.
    """
    known = {k: v for k, v in one.sample(key).values.items() if math.isfinite(v)}
    if log:
        known = {k: 100 * math.log(v) for k, v in known.items() if v > 0}
    pipelines: dict[int, list[float]] = {}
    for seed, value in known.items():
        pipelines.setdefault(seed // PIPELINE, []).append(value)
    if len(pipelines) < 2:
        return Units(known)
    return Units({k: float(np.mean(values)) for k, values in pipelines.items()}, "pipeline")


@dataclass(frozen=True)
class Finding:
    """One comparison: a test of a claim on one data set, or along one axis.

    Attributes:
        test: what is asked.
        label: on what.
        parts: the cells, with their weights.
    """

    test: Contrast
    label: str
    parts: Sequence[Part] = field(repr=False)

    @functools.cached_property
    def waits(self) -> list[str]:
        """What is missing, in words."""
        found = [f"{p.title}: {p.state}" for p in self.parts if p.state]
        return list(dict.fromkeys(found))

    @property
    def weighted(self) -> list[tuple[float, Units]]:
        """Weights and figures of the cells that are complete."""
        known = [(p.weight, p.outcome) for p in self.parts if not p.state]
        return [(w, units(o, self.test.key, self.test.log)) for w, o in known if o is not None]

    @functools.cached_property
    def estimate(self) -> Estimate | None:
        """The number that is asked about; None where a cell is missing or was done once."""
        if self.waits:
            return None
        if not self.test.against:
            return contrast(self.weighted)
        outcomes = [p.outcome for p in self.parts if p.outcome is not None]
        points = [(units(o, self.test.against), units(o, self.test.key)) for o in outcomes]
        return contrast([(1.0, slopes(points))])

    @property
    def identical(self) -> bool:
        """Whether two cells have the same runs, to the last digit of all that was measured."""
        if self.waits or len(self.parts) != 2:
            return False
        one, other = (
            {seed: found["metrics"] for seed, found in part.outcome.results.items()}
            for part in self.parts
            if part.outcome is not None
        )
        return one == other and any(len(figures) > 1 for figures in one.values())

    @functools.cached_property
    def design(self) -> Design | None:
        """What was planned, with the baseline's spread; None where that is not known, or 0."""
        if self.test.against:
            return None
        outcomes = [p.outcome for p in self._base if p.outcome is not None and not p.state]
        known = [units(o, self.test.key, self.test.log) for o in outcomes]
        spreads = [u.variance for u in known if u.n > 1]
        if not any(spreads):
            return None
        weights = tuple(p.weight for p in self.parts)
        return Design(weights, self.planned, self.paired, math.sqrt(float(np.mean(spreads))))

    @property
    def _base(self) -> list[Part]:
        """The cells that others are compared with; of a method's own slope its first."""
        less = [p for p in self.parts if p.weight < 0]
        if self.test.b and self.test.along:
            return [p for p in self.parts if self._is_of(p, self.test.b)]
        return less if self.test.b or self.test.weights else [self.parts[0]]

    def _is_of(self, part: Part, name: str) -> bool:
        """Whether a part stands in the row, or one of the rows, of a name."""
        table = part.table.table
        if self.test.along == "datasets":
            return row_of(table, name) == part.row
        return table.rows[part.row].method == name

    @property
    def planned(self) -> int:
        """Repetitions of the cell that has the fewest, as they were asked for."""
        return min(self._asked, default=self.parts[0].table.table.seeds)

    @property
    def paired(self) -> bool:
        """Whether the cells' repetitions are the same ones, as they were asked for."""
        return len(set(self._asked)) <= 1

    @property
    def _asked(self) -> list[int]:
        """Pipelines of each cell, or seeds where there is one pipeline."""
        cells = [p.outcome.cell for p in self.parts if p.outcome is not None]
        return [len(c.jobs) if len(c.jobs) > 1 else c.job.seeds for c in cells]

    @property
    def flattered(self) -> bool:
        """Whether pipelines are compared with a baseline that has no stage 1, and spreads less."""
        cells = [p.outcome.cell for p in self._base if p.outcome is not None]
        return any(c.method.start == "model" and len(c.jobs) > 1 for c in cells)

    @property
    def single(self) -> bool:
        """Whether its spread is of fine-tuning alone: each cell has one stage 1 and one stage 2."""
        return all(u.kind == "seed" for _, u in self.weighted)


def tables_of(contents: Contents, claim: Claim) -> list[Reported]:
    """The claim's tables as they were asked for; where none was, with what others have of them."""
    asked = [t for t in contents.tables if t.table.name in claim.tables]
    return asked or [
        table
        for name in claim.tables
        if (table := report_sweep.unasked(contents, name)) is not None
    ]


def check(contents: Contents, claim: Claim) -> None:
    """Refuses a row that no table of the claim has: it would never be run.

    Raises:
        UserError: names it.
    """
    tables = [contents.specs.table(name) for name in claim.tables]
    for name in dict.fromkeys(name for test in claim.tests for name in test.named):
        if all(row_of(table, name) is None for table in tables):
            rows = [row for table in tables for row in table.rows]
            known = dict.fromkeys(word for row in rows for word in (row.method, row.title) if word)
            raise UserError(
                f"claims/{claim.name}.toml: {name!r} is no row of {', '.join(claim.tables)}:"
                f" correct it.{nearest(name, known, prefix='')}"
            )


def findings(contents: Contents, claim: Claim) -> list[Finding]:
    """All comparisons of a claim that were asked for and have their data, complete or not."""
    found: dict[tuple[object, ...], Finding] = {}
    for number, test in enumerate(claim.tests):
        for table in tables_of(contents, claim):
            for one in _each(table, test):
                if any(part.state == "not asked" for part in one.parts):
                    continue
                # Two tables, or one that was asked for twice, may have the same cells.
                names = [o.cell.job.name if (o := p.outcome) else p.row for p in one.parts]
                key = (number, one.label, *names)
                if key not in found or (found[key].waits and not one.waits):
                    found[key] = one
    return list(found.values())


def _each(table: Reported, test: Contrast) -> Iterator[Finding]:
    if test.along == "datasets":
        yield from _over_datasets(table, test)
        return
    weights = _rows(table.table, test)
    if not weights:
        return
    for dataset in table.present:
        parts = [Part(table, row, dataset, weight) for row, weight in weights.items()]
        yield Finding(test, dataset.title, parts)


def _rows(table: Table, test: Contrast) -> dict[int, float]:
    """Row -> weight; nothing where the table lacks one of them."""
    if test.against:
        return dict.fromkeys(range(len(table.rows)), 1.0) if len(table.rows) > 1 else {}
    if test.along == "rows":
        weights: dict[int, float] = {}
        for name, sign in ((test.a, 1), (test.b, -1)):
            places = {n: row.x for n, row in enumerate(table.rows) if name and row.method == name}
            slope = _slope({n: x for n, x in places.items() if x is not None}, test)
            if name and not slope:
                return {}
            weights |= {n: sign * w for n, w in slope.items()}
        return weights
    named = test.weights or {test.a: 1.0, test.b: -1.0}
    numbers = {name: row_of(table, name) for name in named}
    rows = {n: named[name] for name, n in numbers.items() if n is not None}
    return rows if len(rows) == len(named) else {}


def row_of(table: Table, name: str) -> int | None:
    """The row of a title, of METHOD@X, or of a method as its file has it."""
    method, _, x = name.partition("@")
    rows = list(enumerate(table.rows))
    if titled := [n for n, row in rows if row.title == name]:
        return titled[0]
    mine = [(n, row) for n, row in rows if row.method == method]
    if x:
        with suppress(ValueError):  # no number: no row's
            return next((n for n, row in mine if row.x == float(x)), None)
        return None
    plain = [n for n, row in mine if not (row.options or row.lengthen or row.rounds)]
    return next(iter(plain or [n for n, _ in mine]), None)


def _over_datasets(table: Reported, test: Contrast) -> Iterator[Finding]:
    """One slope for each family of data sets: those that differ in their place alone."""
    families: dict[str, dict[str, float]] = {}
    for dataset in table.present:
        if dataset.name in table.table.at:
            place = table.table.at[dataset.name]
            families.setdefault(dataset.family, {})[dataset.name] = place
    rows = [(row_of(table.table, name), sign) for name, sign in ((test.a, 1), (test.b, -1)) if name]
    if any(row is None for row, _ in rows):
        return
    by = {d.name: d for d in table.present}
    for family, places in families.items():
        slope = _slope(places, test)
        parts = [
            Part(table, row, by[name], sign * weight)
            for name, weight in slope.items()
            for row, sign in rows
            if row is not None
        ]
        if parts:
            ends = f"{min(places.values()):,g} to {max(places.values()):,g}"
            yield Finding(test, f"{family.replace('_', ' ')}, {len(slope)} sizes, {ends}", parts)


def _slope(places: dict[Key, float], test: Contrast) -> dict[Key, float]:
    """Weights of a slope over places; nothing for fewer than two."""
    scale = {"unit": float, "doubling": math.log2, "tenfold": math.log10}[test.per]
    known = {k: scale(x) for k, x in sorted(places.items(), key=lambda item: item[1])
             if x > 0 or test.per == "unit"}  # fmt: skip
    if len(set(known.values())) < 2:
        return {}
    return dict(zip(known, slope_weights(list(known.values())), strict=True))


def published(contents: Contents, finding: Finding) -> list[Entry]:
    """The paper's figures of the two cells of a difference in scores, where it has both."""
    test = finding.test
    if test.key != "score" or test.along or not test.b:
        return []
    entries = []
    for part in finding.parts:
        known = report_tables.published(contents, part.table, part.row, Quantity())
        entries.append(known[[d.name for d in part.table.datasets].index(part.dataset.name)])
    return entries if all(e.text for e in entries) else []
