"""A sweep's folder, read for a report: every cell of every table that was asked for."""

from __future__ import annotations

import functools
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selfdistill.data.errors import UserError
from selfdistill.experiments import results, state
from selfdistill.experiments.jobs import Choice, Job
from selfdistill.experiments.plan import Cell
from selfdistill.experiments.results import Outcome
from selfdistill.experiments.spec import Dataset, Method, Profile, Specs, Table, paper_figures
from selfdistill.experiments.state import Asked, Status, Sweep


@dataclass(frozen=True)
class Reported:
    """A table and what its cells came out as.

    Attributes:
        asked: the call that asked for it.
        table: its spec, with the data sets that it was asked for with.
        datasets: its columns, those that are missing with them.
        absent: names of the data sets that are not in data_root.
        cells: (number of the row, data set) -> outcome.
        wanted: places that --only left.
    """

    asked: Asked
    table: Table
    datasets: list[Dataset]
    absent: set[str]
    cells: dict[tuple[int, str], Outcome]
    wanted: set[tuple[int, str]]

    @property
    def present(self) -> list[Dataset]:
        """Data sets that are there."""
        return [d for d in self.datasets if d.name not in self.absent]

    def title(self, number: int) -> str:
        """Name of a row."""
        row = self.table.rows[number]
        known = next((o.cell.title for (n, _), o in self.cells.items() if n == number), None)
        return known or row.title or row.method


@dataclass
class Contents:
    """All that a report is made from.

    Attributes:
        sweep: what was asked for.
        specs: where the specs are.
        profile: the size.
        tables: in the order in which they were asked for.
        jobs: those that the sweep asks for, each after those that it waits for.
        status: where each stands, by name.
        paper: the paper's figures.
        others: tables that were not asked for, and what is known of their cells (`unasked`).
    """

    sweep: Sweep
    specs: Specs
    profile: Profile
    tables: list[Reported] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    status: dict[str, Status] = field(default_factory=dict)
    paper: dict[str, Any] = field(default_factory=paper_figures)
    others: dict[str, Reported | None] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The sweep's folder."""
        return self.sweep.root

    @functools.cached_property
    def outcomes(self) -> list[Outcome]:
        """Each fine-tuning once, of the most pipelines, then seeds, that any table has complete.

        A table of more that is under way takes nothing from one of fewer.
        """

        def rank(one: Outcome) -> tuple[bool, int, int]:
            return one.status == "done", len(one.cell.jobs), one.cell.seeds

        found: dict[str, Outcome] = {}
        for table in self.tables:
            for one in table.cells.values():
                known = found.get(one.cell.job.name)
                if known is None or rank(one) > rank(known):
                    found[one.cell.job.name] = one
        return list(found.values())

    @functools.cached_property
    def datasets(self) -> dict[str, Dataset]:
        """All data sets, by name."""
        return {d.name: d for table in self.tables for d in table.datasets}

    @property
    def absent(self) -> list[Dataset]:
        """Data sets that are not in data_root."""
        names = {name for table in self.tables for name in table.absent}
        return [d for name, d in self.datasets.items() if name in names]

    @functools.cached_property
    def methods(self) -> dict[str, Method]:
        """All methods, by name."""
        names = dict.fromkeys(row.method for table in self.tables for row in table.table.rows)
        return {name: self.specs.load(Method, name) for name in names}

    @functools.cached_property
    def choices(self) -> dict[str, Choice]:
        """Every search for hyper-parameters, by name and options."""
        found: dict[str, Choice] = {}
        for job in self.jobs:
            for choice in job.choices:
                found[f"{choice.name} {','.join(choice.candidates[0][0])}"] = choice
        return found

    def stands(self, job: Job) -> str:
        """Where a job stands, in words."""
        status = self.status.get(job.name, "open")
        if status != "open":
            return status
        begun = state.read(self.root, job).get("status") == "running"
        return "under way" if begun else "not run"

    def wanting(self, asked: Asked) -> str:
        """The command that runs what is missing of a table."""
        entry: dict[str, object] = {
            "data_root": self.sweep.data_root,
            "output": self.root,
            "profile": self.sweep.profile,
            "models": self.sweep.models,
            "specs": self.sweep.specs,
            "datasets": ",".join(asked.datasets) or None,
            "only": ",".join(asked.only) or None,
            "seeds": asked.seeds,
            "pipelines": asked.pipelines,
            "halving": self.sweep.halving or None,
            "search": None if self.sweep.search else "false",
            "precision": self.sweep.precision,
        }
        words = [w for k, v in entry.items() if v is not None for w in (f"--{k}", str(v))]
        return shlex.join(["python", "-m", "experiments.run", asked.table, *words])


def read(root: Path, data_root: Path | None = None) -> Contents:
    """Reads a sweep, complete or not.

    Args:
        root: its folder.
        data_root: where the packed data sets are now, in place of where they were.

    Raises:
        UserError: it is none, or its specs are wrong.
    """
    sweep = Sweep.open(root)
    sweep.data_root = data_root or sweep.data_root
    specs = Specs(sweep.specs, searched=sweep.search)
    found = Contents(sweep, specs, sweep.size(specs))
    known: dict[tuple[str, int, int], Outcome] = {}
    for asked in sweep.asked:
        found.tables.append(_table(sweep, specs, asked, known))
    found.jobs = sweep.plan(results=True).ordered()
    found.status = {job.name: state.status(root, job) for job in found.jobs}
    return found


def unasked(contents: Contents, name: str) -> Reported | None:
    """A table that was not asked for, with what the sweep's other tables have of its cells.

    Its columns are the sweep's data sets; None where there are none that it could have.
    """
    if name not in contents.others:
        table = contents.specs.table(name)
        points = {d for t in contents.tables for d in t.table.at}
        datasets = [
            d for d in contents.datasets if (d in table.at if table.at else d not in points)
        ]
        seeds = [t.asked.seeds for t in contents.tables if t.asked.seeds]
        pipelines = [t.asked.pipelines for t in contents.tables if t.asked.pipelines]
        least = min(seeds, default=None), min(pipelines, default=None)
        asked = Asked(name, tuple(datasets), (), least[0], least[1])
        made = _table(contents.sweep, contents.specs, asked, {}) if datasets else None
        contents.others[name] = made
    return contents.others[name]


def _table(
    sweep: Sweep, specs: Specs, asked: Asked, known: dict[tuple[str, int, int], Outcome]
) -> Reported:
    table = specs.table(asked.table)
    if asked.datasets:
        table = table.model_copy(update={"datasets": list(asked.datasets)})
    wanted = sweep.plan([asked], results=True)
    plan = wanted
    if asked.only:
        # What --only leaves out may be complete from an earlier call.
        try:
            plan = sweep.plan([replace(asked, only=())], results=True)
        except UserError:
            plan = wanted
    cells: dict[tuple[int, str], Outcome] = {}
    for cell in plan.cells:
        key = (cell.job.name, len(cell.jobs), cell.seeds)
        if key not in known:
            known[key] = results.outcome(sweep.root, cell)
        cells[_place(table, cell)] = _moved(known[key], cell)
    return Reported(
        asked=asked,
        table=table,
        datasets=[specs.load(Dataset, name) for name in table.datasets],
        absent=set(plan.absent),
        cells=cells,
        wanted={_place(table, cell) for cell in wanted.cells},
    )


def _place(table: Table, cell: Cell) -> tuple[int, str]:
    return table.rows.index(cell.row), cell.dataset.name


def _moved(one: Outcome, cell: Cell) -> Outcome:
    """The same fine-tuning in another table, where its row may have another name."""
    return Outcome(cell, one.status, one.results, one.message, one.before, one.begun)
