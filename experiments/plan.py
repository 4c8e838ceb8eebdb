"""From specs to jobs: which launches a set of tables needs, and what they share.

A job is one launch of engine/run.py. Jobs that would do the same are one: a further pre-training
serves every method, table and seed that needs it. Its folder's name says what it does, so that
it is the same one in every table and in every later call.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from selfdistill.data.errors import UserError
from selfdistill.data.shards import manifest
from selfdistill.engine.config import options as configuration
from selfdistill.engine.config.stages import FinetuneSection
from selfdistill.experiments.jobs import LATER, SEARCH_SEED, Choice, Job, Stage, Trial, typed
from selfdistill.experiments.spec import Dataset, Method, Options, Profile, Row, Specs, Table


@dataclass(frozen=True)
class Cell:
    """One place of a table: a row on a data set."""

    table: Table
    row: Row
    method: Method
    dataset: Dataset
    job: Job

    @property
    def title(self) -> str:
        """The row's name."""
        return self.row.title or self.method.title


class Plan:
    """All jobs of some tables.

    Args:
        specs: where the specs are.
        profile: the size.
        data_root: folder of packed data sets.
        done: a sweep's folder: data sets that have results there need not be in `data_root`.
        halving: of a search's candidates one in so many goes on to so many times the length; 0: all
            are tried at the whole length.
        models: folder of models, in which the recipes' are looked for by the last part of the name.
    """

    def __init__(
        self,
        specs: Specs,
        profile: Profile,
        data_root: Path,
        done: Path | None = None,
        halving: int = 0,
        models: Path | None = None,
    ) -> None:
        self.specs, self.profile, self.data_root = specs, profile, data_root
        self.done, self.halving, self.models = done, halving, models
        self.jobs: dict[str, Job] = {}
        self.cells: list[Cell] = []
        self.absent: dict[str, Dataset] = {}
        self.unsearchable: dict[str, Dataset] = {}
        self.named: set[str] = set()

    def add(self, table: Table, only: Iterable[str] = (), seeds: int | None = None) -> None:
        """Plans a table.

        Args:
            table: which.
            only: names of data sets, of methods, or DATASET/METHOD; nothing stands for all.
            seeds: in place of the table's.
        """
        wanted = list(only)
        datasets = [self.specs.load(Dataset, name) for name in table.datasets]
        # Data sets outermost: those that come first are complete first.
        for dataset, row in itertools.product(datasets, table.rows):
            names = {dataset.name, row.method, f"{dataset.name}/{row.method}"}
            self.named |= names
            if wanted and not names & set(wanted):
                continue
            known = self.done is not None and (self.done / dataset.name).is_dir()
            if not known and not (self.place(dataset) / "train" / manifest.FILE).exists():
                self.absent[dataset.name] = dataset
                continue
            method = self.specs.load(Method, row.method)
            chooses = known or (self.place(dataset) / "val" / manifest.FILE).exists()
            if not chooses and self._searches(dataset, method):
                self.unsearchable[dataset.name] = dataset
                continue
            job = self._final(dataset, method, row, seeds or table.seeds)
            self.cells.append(Cell(table, row, method, dataset, job))

    def _searches(self, dataset: Dataset, method: Method) -> bool:
        """Whether validation data decide anything for a method."""
        scale = self.profile.of(dataset.kind)
        return bool(scale.search or method.search or scale.tuning(method.name).search)

    def place(self, dataset: Dataset) -> Path:
        """Folder of a packed data set."""
        return self.data_root / (dataset.folder or dataset.name)

    def ordered(self) -> list[Job]:
        """All jobs, each after those that it waits for."""
        found: dict[str, Job] = {}

        def visit(job: Job) -> None:
            if job.name not in found:
                for one in job.before:
                    visit(one)
                found[job.name] = job

        for cell in self.cells:
            visit(cell.job)
        return list(found.values())

    def levels(self) -> list[list[Job]]:
        """Jobs by the number of others that they wait for in a row."""
        depth: dict[str, int] = {}
        for job in self.ordered():
            depth[job.name] = 1 + max((depth[one.name] for one in job.before), default=-1)
        return [
            [job for job in self.ordered() if depth[job.name] == level]
            for level in range(1 + max(depth.values(), default=-1))
        ]

    # --- jobs

    def _final(self, dataset: Dataset, method: Method, row: Row, seeds: int) -> Job:
        """The fine-tuning that a cell shows, with all that it needs."""
        own = self._own(dataset, method, row)
        name = self._name(dataset, "finetune", method, own, row)
        if name not in self.jobs:
            job = self._finetune(name, dataset, method, row, seeds, {})
            # A row takes over its method's choices, but for what it says itself.
            job.said = frozenset(row.options)
            job.choices = [
                choice
                for choice in self._choices(dataset, method)
                if not job.said.issuperset(choice.candidates[0][0])
            ]
            self.jobs[name] = job
        # Tables that ask for more seeds of a cell get them for all.
        self.jobs[name].seeds = max(seeds, self.jobs[name].seeds)
        return self.jobs[name]

    def _choices(self, dataset: Dataset, method: Method) -> list[Choice]:
        """What validation decides for a method: the profile's grid first, then the method's own.

        What the method or the data set says itself is not searched.
        """
        scale, tuned = self.profile.of(dataset.kind), self._tuned(method)
        fixed = tuned.of(dataset.kind) | method.of(dataset.kind) | dataset.options
        special = tuned.search | scale.tuning(tuned.name).search
        mine = method.search | scale.tuning(method.name).search
        common = {k: v for k, v in scale.search.items() if k not in special | mine}
        choices: list[Choice] = []
        for who, grid in ((tuned, common), (method, mine)):
            free = {k: v for k, v in grid.items() if k not in fixed}
            if free:
                choices.append(self._choice(dataset, who, free, list(choices)))
        return choices

    def _tuned(self, method: Method) -> Method:
        """The method whose choice from the profile's grid is taken.

        Raises:
            UserError: that one takes over another's.
        """
        if method.tuned_as is None:
            return method
        other = self.specs.load(Method, method.tuned_as)
        if other.tuned_as is not None:
            raise UserError(
                f"method {method.name}: tuned_as {other.name}, which is itself tuned as"
                f" {other.tuned_as}: name that one"
            )
        return other

    def _choice(
        self, dataset: Dataset, method: Method, grid: dict[str, list[Any]], given: list[Choice]
    ) -> Choice:
        """One fine-tuning, without test data, for each point of a grid, with what it waits for."""
        row = Row(method=method.name)
        candidates = []
        for values in itertools.product(*grid.values()):
            tried: Options = dict(zip(grid, values, strict=True))
            slug = ",".join(f"{k.rpartition('.')[2]}={typed(v)}" for k, v in tried.items())
            name = f"{dataset.name}/search/{method.name}/{slug}"
            if name not in self.jobs:
                overrides = tried | {"finetune.test": False, "finetune.train_scored": 0}
                job = self._finetune(name, dataset, method, row, 1, overrides)
                job.words["seed"] = SEARCH_SEED
                job.choices = list(given)
                self.jobs[name] = job
            candidates.append((tried, self.jobs[name]))
        if self.halving:
            self._halve([job for _, job in candidates])
        return Choice(f"{dataset.name}/{method.name}", candidates)

    def _halve(self, whole: list[Job]) -> None:
        """Lets candidates be tried at smaller lengths first, and only the best of them go on.

        Of n candidates there are k shorter lengths, for the largest k with halving^k <= n. RecAdam,
        whose options count steps, is another method at another length: it is tried whole.
        """
        plans = [configuration.load(job.words).finetune for job in whole]
        if any(job.trial for job in whole) or any(p.regularizer == "recadam" for p in plans):
            return
        rungs = 0
        while self.halving ** (rungs + 1) <= len(whole):
            rungs += 1
        shorter: list[Job] = []
        for rung in range(rungs, -1, -1):  # from the smallest length to the whole one
            jobs = whole
            if rung:
                part = self.halving**rung
                jobs = [self._part(job, plan, part) for job, plan in zip(whole, plans, strict=True)]
            if shorter:
                trial = Trial(shorter, math.ceil(len(whole) / self.halving ** (rungs - rung)))
                for job, before in zip(jobs, shorter, strict=True):
                    job.shorter, job.trial = before, trial
            shorter = jobs

    def _part(self, job: Job, plan: FinetuneSection, part: int) -> Job:
        """A candidate at one of so many parts of its length, with as much less warm-up."""
        shorter = plan.warmup // part if plan.warmup >= 1 else plan.warmup
        words: Options = {"finetune.warmup": shorter}
        if plan.steps is not None:
            words["finetune.steps"] = max(1, round(plan.steps / part))
        elif plan.epochs is not None:
            words["finetune.epochs"] = plan.epochs / part
        name = f"{job.name},part={part}"
        self.jobs[name] = replace(job, name=name, words=job.words | words)
        return self.jobs[name]

    def _finetune(
        self, name: str, dataset: Dataset, method: Method, row: Row, seeds: int, more: Options
    ) -> Job:
        words = self._words(dataset, method, row, "finetune") | more
        if method.start == "model":
            return Job(name, dataset, "finetune", words, seeds=seeds)
        if method.start == "pretrain":
            source = self._pretrain(dataset, method, row)
        else:
            source = self._distill(dataset, method, row, row.rounds or method.rounds)
        start = f"{source.leaves}/export"
        return Job(name, dataset, "finetune", words, [source], start, seeds=seeds)

    def _pretrain(self, dataset: Dataset, method: Method, row: Row) -> Job:
        own = self._own(dataset, method, row)
        name = self._name(dataset, "pretrain", method, own, row)
        if name not in self.jobs:
            words = self._words(dataset, method, row, "pretrain")
            self.jobs[name] = Job(name, dataset, "pretrain", words)
            if self.profile.of(dataset.kind).decoder:
                decoder = self._decoder(dataset, method, row)
                self.jobs[name].needs = [decoder]
                self.jobs[name].base = f"{decoder.leaves}/export"
        return self.jobs[name]

    def _decoder(self, dataset: Dataset, method: Method, row: Row) -> Job:
        """Stage 0, once for all that further pre-trains on a data set."""
        name = self._name(dataset, "decoder", method, self._own(dataset, method, row), row)
        if name not in self.jobs:
            words = self._words(dataset, method, row, "decoder")
            self.jobs[name] = Job(name, dataset, "decoder", words)
        return self.jobs[name]

    def _distill(self, dataset: Dataset, method: Method, row: Row, rounds: int) -> Job:
        """The last of some rounds. Each is a job, all in one folder: fewer rounds are shared."""
        own = self._own(dataset, method, row)
        teacher = self._pretrain(dataset, method, row)
        folder = self._name(dataset, "distill", method, own, row)
        before = [teacher]
        for number in range(1, rounds + 1):
            key = folder if number == 1 else f"{folder}#{number}"
            if key not in self.jobs:
                words = self._words(dataset, method, row, "distill")
                start = f"{teacher.leaves}/export"
                self.jobs[key] = Job(key, dataset, "distill", words, list(before), start)
                self.jobs[key].rounds, self.jobs[key].base = number, teacher.base
            before = [self.jobs[key]]
        return before[0]

    def _words(self, dataset: Dataset, method: Method, row: Row, stage: Stage) -> Options:
        """Options of a stage: profile < data set < method < row."""
        options = self._usual(dataset) | self._own(dataset, method, row)
        return {k: v for k, v in options.items() if k.partition(".")[0] not in LATER[stage]}

    def _usual(self, dataset: Dataset) -> Options:
        """The profile's and the data set's options.

        Raises:
            UserError: `models` does not hold the model that they name.
        """
        scale = self.profile.of(dataset.kind)
        options: Options = {"recipe": scale.recipe, **scale.options, **dataset.options}
        named = configuration.load(options).model.path
        if self.models is None or named is None or Path(named).is_dir():
            return options
        here = self.models / named.rpartition("/")[2]
        if self.done is None and not here.is_dir():
            raise UserError(
                f"--models {self.models}: it holds no folder {here.name}, for {named} of recipe"
                f" {scale.recipe}: put the model's files there"
            )
        return options | {"model.path": str(here)}

    def _own(self, dataset: Dataset, method: Method, row: Row) -> Options:
        """What tells a row from the profile's defaults."""
        scale = self.profile.of(dataset.kind)
        own = scale.tuning(method.name).options | method.of(dataset.kind) | row.options
        usual = configuration.load({"recipe": scale.recipe, **scale.options, **dataset.options})
        for stage, factor in (method.lengthen | row.lengthen).items():
            plan = getattr(usual, stage)
            if plan.steps is not None:
                own[f"{stage}.steps"] = max(1, round(factor * plan.steps))
            else:
                own[f"{stage}.epochs"] = factor * plan.epochs
        return own

    def _name(self, dataset: Dataset, stage: Stage, method: Method, own: Options, row: Row) -> str:
        """A job's folder: data set, stage, and what is not as usual."""
        mine = {k: v for k, v in own.items() if k.partition(".")[0] not in LATER[stage]}
        if stage == "finetune":
            # What a method stands for need not be told again.
            usual = self._own(dataset, method, Row(method=method.name))
            mine = {k: v for k, v in mine.items() if usual.get(k) != v}
            rounds = row.rounds or method.rounds
            head = method.name + (f",rounds={rounds}" if rounds != method.rounds else "")
        else:
            head = stage
        parts = [head, *(f"{k.removeprefix(stage + '.')}={typed(v)}" for k, v in mine.items())]
        whole = ",".join(parts)
        slug = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", whole)[:120]
        if slug != whole:  # two that differ in such signs alone are two
            slug += "-" + hashlib.sha256(whole.encode()).hexdigest()[:8]
        return f"{dataset.name}/{slug}"
