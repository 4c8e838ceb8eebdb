"""From specs to jobs: which launches a set of tables needs, and what they share.

A job is one launch of engine/run.py. Jobs that would do the same are one: a further pre-training
serves every method, table and seed that needs it. Its folder's name says what it does, so that
it is the same one in every table and in every later call.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data import manifest
from data.errors import UserError
from engine import config as configuration
from experiments.spec import Dataset, Method, Options, Profile, Row, Specs, Table

Stage = Literal["pretrain", "distill", "finetune"]

#: Sections of the configuration that only later stages look at.
_LATER: dict[Stage, tuple[str, ...]] = {
    "pretrain": ("distill", "teacher", "finetune", "recadam", "mars", "r3f"),
    "distill": ("finetune", "recadam", "mars", "r3f"),
    "finetune": (),
}

#: How engine/run.py's error begins where a loss is not finite.
DIVERGED = "the loss is not finite"

#: Seed of the runs that choose hyper-parameters: none of those that are reported.
SEARCH_SEED = 1000


@dataclass
class Choice:
    """Options to be chosen by validation score.

    Attributes:
        name: of the job whose options are chosen.
        candidates: jobs, each with the options that it tries.
    """

    name: str
    candidates: list[tuple[Options, Job]]

    def scores(self, root: Path) -> list[tuple[Options, float | None]]:
        """Validation score of each candidate; None where it has none yet."""
        return [(options, job.validation(root)) for options, job in self.candidates]

    def best(self, root: Path) -> Options:
        """The candidate of the highest score, the first of equals; one that diverged loses.

        Raises:
            UserError: one has no score yet, or none will have any.
        """
        scored = self.scores(root)
        left = [
            job.name
            for (_, job), (_, score) in zip(self.candidates, scored, strict=True)
            if score is None and not job.diverged(root)
        ]
        if left:
            raise UserError(f"{self.name} waits for {left[0]}, which has no validation score")
        known = [(options, score) for options, score in scored if score is not None]
        if not known:
            raise UserError(f"{self.name}: every candidate of its search diverged: give others")
        return max(known, key=lambda pair: pair[1])[0]


@dataclass
class Job:
    """One launch of engine/run.py.

    Attributes:
        name: its own; up to a # its folder below the sweep's.
        dataset: what it learns from.
        stage: what it does.
        words: options of engine/run.py without those of `choices`, --data and --output.
        needs: jobs whose exports it starts from.
        start: the export that it starts from, below the sweep's folder; None: the model.
        choices: options that validation scores decide, before it starts.
        seeds: fine-tunings in this launch.
        rounds: of self-distillation up to which it goes.
        said: options that no choice changes.
    """

    name: str
    dataset: Dataset
    stage: Stage
    words: Options
    needs: list[Job] = field(default_factory=list)
    start: str | None = None
    choices: list[Choice] = field(default_factory=list)
    seeds: int = 1
    rounds: int = 1
    said: frozenset[str] = frozenset()

    @property
    def folder(self) -> str:
        """Its run folder, below the sweep's; rounds of self-distillation share one."""
        return self.name.partition("#")[0]

    @property
    def before(self) -> list[Job]:
        """Jobs that must be complete before it starts."""
        tried = [job for choice in self.choices for _, job in choice.candidates]
        return [*self.needs, *tried]

    @property
    def leaves(self) -> str:
        """Folder of the stage that it completes, below the sweep's."""
        last = {"pretrain": "pretrain", "distill": f"distill-{self.rounds}"}
        return f"{self.folder}/{last.get(self.stage, self._finetuning)}"

    @property
    def _finetuning(self) -> str:
        return "finetune-model" if self.start is None else "finetune"

    def result(self, root: Path) -> dict[str, Any] | None:
        """What it left; None before it is complete."""
        found = _json(root / self.leaves / "result.json")
        if found is None or self.stage != "finetune":
            return found
        return found if int(found.get("n", 1)) >= self.seeds else None

    def record(self, root: Path) -> Path:
        """File of what is known of its launches (`experiments.state`)."""
        mark = self.name.removeprefix(self.folder).replace("#", "-")
        return root / self.folder / f"job{mark}.json"

    def diverged(self, root: Path) -> bool:
        """Whether it is a search's candidate whose loss was not finite, and would not be again."""
        if "/search/" not in self.name or self.result(root) is not None:
            return False
        told = _json(self.record(root)) or {}
        return told.get("status") == "failed" and str(told.get("message")).startswith(DIVERGED)

    def validation(self, root: Path) -> float | None:
        """Its validation score."""
        found = self.result(root)
        if found is None:
            return None
        return float(found["metrics"][f"val_{found['metric']}"])

    def possible(self) -> Iterator[Options]:
        """Its options with each combination of what may be chosen."""
        tried = ([options for options, _ in choice.candidates] for choice in self.choices)
        for combination in itertools.product(*tried):
            yield self._with(combination)

    def _with(self, chosen: Iterable[Options]) -> Options:
        found = {k: v for options in chosen for k, v in options.items() if k not in self.said}
        return self.words | found

    def options(self, root: Path) -> Options:
        """All its options, those that validation chose with them.

        Raises:
            UserError: a candidate is not complete.
        """
        return self._with(choice.best(root) for choice in self.choices)

    def command(self, root: Path, data_root: Path) -> list[str]:
        """Words of engine/run.py."""
        told: Options = {
            "stage": self.stage,
            **self.options(root),
            "data": str(data_root / (self.dataset.folder or self.dataset.name)),
            "output": str(root / self.folder),
        }
        if self.stage == "distill":
            told |= {"teacher": str(root / str(self.start)), "rounds": self.rounds}
        if self.stage == "finetune":
            told["finetune.seeds"] = self.seeds
            if self.start is None:
                told["finetune.start"] = "model"
            else:
                told["finetune.weights"] = str(root / self.start)
        return [word for key, value in told.items() for word in (f"--{key}", typed(value))]


def typed(value: object) -> str:
    """A value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


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
    """

    def __init__(
        self, specs: Specs, profile: Profile, data_root: Path, done: Path | None = None
    ) -> None:
        self.specs, self.profile, self.data_root = specs, profile, data_root
        self.done = done
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
        said = tuned.of(dataset.kind) | method.of(dataset.kind) | dataset.options
        special = tuned.search | scale.tuning(tuned.name).search
        mine = method.search | scale.tuning(method.name).search
        common = {k: v for k, v in scale.search.items() if k not in special | mine}
        choices: list[Choice] = []
        for who, grid in ((tuned, common), (method, mine)):
            free = {k: v for k, v in grid.items() if k not in said}
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
        """One fine-tuning, without test data, for each point of a grid."""
        row = Row(method=method.name)
        candidates = []
        for values in itertools.product(*grid.values()):
            tried: Options = dict(zip(grid, values, strict=True))
            slug = ",".join(f"{k.rpartition('.')[2]}={typed(v)}" for k, v in tried.items())
            name = f"{dataset.name}/search/{method.name}/{slug}"
            if name not in self.jobs:
                more = tried | {"finetune.test": False, "finetune.train_scored": 0}
                job = self._finetune(name, dataset, method, row, 1, more)
                job.words["seed"] = SEARCH_SEED
                job.choices = list(given)
                self.jobs[name] = job
            candidates.append((tried, self.jobs[name]))
        return Choice(f"{dataset.name}/{method.name}", candidates)

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
                self.jobs[key].rounds = number
            before = [self.jobs[key]]
        return before[0]

    def _words(self, dataset: Dataset, method: Method, row: Row, stage: Stage) -> Options:
        """Options of a stage: profile < data set < method < row."""
        scale = self.profile.of(dataset.kind)
        told: Options = {"recipe": scale.recipe, **scale.options, **dataset.options}
        told |= self._own(dataset, method, row)
        return {k: v for k, v in told.items() if k.partition(".")[0] not in _LATER[stage]}

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
        mine = {k: v for k, v in own.items() if k.partition(".")[0] not in _LATER[stage]}
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
