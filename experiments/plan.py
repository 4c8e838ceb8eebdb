"""From specs to jobs: which launches a set of tables needs, and what they share.

A job is one launch of engine/run.py. Jobs that would do the same are one: a further pre-training
serves every method, table and seed that needs it. Its folder's name says what it does, so that
it is the same one in every table and in every later call.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from selfdistill.data.errors import UserError
from selfdistill.data.shards import manifest
from selfdistill.engine.config import options as configuration
from selfdistill.engine.config.stages import FinetuneSection
from selfdistill.experiments.jobs import LATER, SEARCH_SEED, Choice, Job, Trial, typed
from selfdistill.experiments.spec import (
    SEARCHED,
    Dataset,
    Grid,
    Method,
    Options,
    Profile,
    Row,
    Specs,
    Table,
)
from selfdistill.experiments.words import Variant, Words


@dataclass(frozen=True)
class Cell:
    """One place of a table: a row on a data set.

    Attributes:
        table: which.
        row: of the table.
        method: of the row.
        dataset: its column.
        jobs: its fine-tunings, one launch for each pipeline.
    """

    table: Table
    row: Row
    method: Method
    dataset: Dataset
    jobs: tuple[Job, ...]

    @property
    def job(self) -> Job:
        """The fine-tunings of the first pipeline, which stands for all."""
        return self.jobs[0]

    @property
    def seeds(self) -> int:
        """Fine-tunings in all."""
        return sum(job.seeds for job in self.jobs)

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
        self.words = Words(profile, models, here=done is None)
        self.jobs: dict[str, Job] = {}
        self.cells: list[Cell] = []
        self.absent: dict[str, Dataset] = {}
        self.unsearchable: dict[str, Dataset] = {}
        self.named: set[str] = set()

    def add(
        self,
        table: Table,
        only: Iterable[str] = (),
        seeds: int | None = None,
        pipelines: int | None = None,
    ) -> None:
        """Plans a table.

        Args:
            table: which.
            only: names of data sets, of methods, or DATASET/METHOD; nothing stands for all.
            seeds: in place of the table's.
            pipelines: in place of the table's.
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
            jobs = tuple(
                self._final(Variant(dataset, method, row, number), seeds or table.seeds)
                for number in range(pipelines or table.pipelines)
            )
            self.cells.append(Cell(table, row, method, dataset, jobs))

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
            for job in cell.jobs:
                visit(job)
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

    def _final(self, variant: Variant, seeds: int) -> Job:
        """The fine-tuning that a cell shows, with all that it needs."""
        name = self.words.name(variant, "finetune")
        if name not in self.jobs:
            job = self._finetune(name, variant, seeds, {})
            self._choose(job, variant, self._choices(variant.dataset, variant.method))
            self.jobs[name] = job
        # Tables that ask for more seeds of a cell get them for all.
        self.jobs[name].seeds = max(seeds, self.jobs[name].seeds)
        return self.jobs[name]

    def _choose(self, job: Job, variant: Variant, choices: list[Choice]) -> None:
        """Has a row take over its method's choices, but for what it says itself."""
        job.said = frozenset(variant.row.options)
        job.choices = [one for one in choices if not job.said.issuperset(one.candidates[0][0])]

    def _choices(self, dataset: Dataset, method: Method) -> list[Choice]:
        """What validation decides for a method: the profile's grid first, then the method's own.

        What the method or the data set says itself is not searched. A method that is tuned as
        another takes over its choices, from either grid, but for those that it searches itself.
        """
        scale, tuned = self.profile.of(dataset.kind), self._tuned(method)
        special = tuned.search | scale.tuning(tuned.name).search
        mine = method.search | scale.tuning(method.name).search
        said = tuned.of(dataset.kind) | method.of(dataset.kind)
        # What a method both says and searches is where its search begins.
        fixed = {k for k in said if k not in special | mine} | dataset.options.keys()
        common = {
            k: v
            for k, v in scale.search.items()
            if k.partition(".")[0] in SEARCHED and k not in special | mine
        }
        choices: list[Choice] = []
        others = {k: v for k, v in special.items() if k not in mine}  # none of its own
        for who, grid in ((tuned, common), (tuned, others), (method, mine)):
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

    def _choice(self, dataset: Dataset, method: Method, grid: Grid, given: list[Choice]) -> Choice:
        """One fine-tuning, without test data, for each point of a grid, with what it waits for."""
        variant = Variant(dataset, method, Row(method=method.name))
        candidates = []
        for slug, tried in _points(grid):
            name = f"{dataset.name}/search/{method.name}/{slug}"
            if name not in self.jobs:
                job = self._finetune(name, variant, 1, tried | _SCORED)
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

    def _stage_choices(
        self, variant: Variant, stage: Literal["pretrain", "distill"]
    ) -> list[Choice]:
        """What validation decides for stage 1 or 2: one choice for all methods that share it.

        A candidate is the stage with these options and the search's seed, and one fine-tuning from
        it as the profile has it. Stage 2 is tried with the teacher that stage 1's choice leaves.
        """
        dataset, tuned = variant.dataset, self._tuned(variant.method)
        scale = self.profile.of(dataset.kind)
        fixed = tuned.of(dataset.kind) | variant.method.of(dataset.kind) | dataset.options
        grid = {
            k: v for k, v in scale.search.items() if k.partition(".")[0] == stage and k not in fixed
        }
        if not grid:
            return []
        base = Variant(dataset, tuned, Row(method=tuned.name))
        key = self.words.name(base, stage).partition("/")[2]
        own = self.words.own(base).items()
        words = self.words.usual(dataset) | {
            k: v for k, v in own if k.partition(".")[0] not in LATER[stage]
        }
        candidates = []
        for slug, tried in _points(grid):
            name = f"{dataset.name}/search/{key}/{slug}"
            if name not in self.jobs:
                made = self._stage(name, base, stage)
                made.words |= tried | {"seed": SEARCH_SEED}
                scored = Job(f"{name},scored", dataset, "finetune", words | tried | _SCORED, [made])
                scored.start = f"{made.leaves}/export"
                self.jobs |= {name: made, scored.name: scored}
            candidates.append((tried, self.jobs[f"{name},scored"]))
        return [Choice(f"{dataset.name}/{key}", candidates)]

    def _finetune(self, name: str, variant: Variant, seeds: int, more: Options) -> Job:
        words = self.words.of(variant, "finetune") | more
        method = variant.method
        if method.start == "model":
            return Job(name, variant.dataset, "finetune", words, seeds=seeds)
        if method.start == "pretrain":
            source = self._pretrain(variant)
        else:
            source = self._distill(variant, variant.row.rounds or method.rounds)
        start = f"{source.leaves}/export"
        return Job(name, variant.dataset, "finetune", words, [source], start, seeds=seeds)

    def _stage(self, name: str, variant: Variant, stage: Literal["pretrain", "distill"]) -> Job:
        """Stage 1, or the first round of stage 2, with what it needs."""
        job = Job(name, variant.dataset, stage, self.words.of(variant, stage))
        if stage == "distill":
            teacher = self._pretrain(variant)
            job.needs, job.base = [teacher], teacher.base
            job.start = f"{teacher.leaves}/export"
        elif self.profile.of(variant.dataset.kind).decoder and job.words.get("decoder.auto", True):
            decoder = self._decoder(variant)
            job.needs, job.base = [decoder], f"{decoder.leaves}/export"
        return job

    def _pretrain(self, variant: Variant) -> Job:
        name = self.words.name(variant, "pretrain")
        if name not in self.jobs:
            job = self._stage(name, variant, "pretrain")
            self._choose(job, variant, self._stage_choices(variant, "pretrain"))
            self.jobs[name] = job
        return self.jobs[name]

    def _decoder(self, variant: Variant) -> Job:
        """Stage 0, once for all that further pre-trains on a data set."""
        name = self.words.name(variant, "decoder")
        if name not in self.jobs:
            words = self.words.of(variant, "decoder")
            self.jobs[name] = Job(name, variant.dataset, "decoder", words)
        return self.jobs[name]

    def _distill(self, variant: Variant, rounds: int) -> Job:
        """The last of some rounds. Each is a job, all in one folder: fewer rounds are shared."""
        folder = self.words.name(variant, "distill")
        before: list[Job] = []
        for number in range(1, rounds + 1):
            key = folder if number == 1 else f"{folder}#{number}"
            if key not in self.jobs:
                job = self._stage(key, variant, "distill")
                job.needs, job.rounds = before or job.needs, number
                self._choose(job, variant, self._stage_choices(variant, "distill"))
                self.jobs[key] = job
            before = [self.jobs[key]]
        return before[0]


#: What a search's fine-tunings have of their own.
_SCORED: Options = {
    "finetune.test": False,
    "finetune.train_scored": 0,
    "seed": SEARCH_SEED,
}


def _points(grid: Grid) -> Iterator[tuple[str, Options]]:
    """Each point of a grid, with a name for its folder."""
    for values in itertools.product(*grid.values()):
        tried: Options = dict(zip(grid, values, strict=True))
        yield ",".join(f"{k.rpartition('.')[2]}={typed(v)}" for k, v in tried.items()), tried
