"""A job: one launch of engine/run.py, its folder, its command and what it waits for."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.results import RESULT, read_result
from selfdistill.experiments.spec import Dataset, Options

Stage = Literal["decoder", "pretrain", "distill", "finetune"]

#: Sections of the configuration that only later stages look at.
LATER: dict[Stage, tuple[str, ...]] = {
    "decoder": (
        *("adapt", "lora", "probe", "supcon", "diet", "pretrain"),
        *("distill", "teacher", "finetune", "recadam", "mars", "r3f"),
    ),
    "pretrain": ("distill", "teacher", "finetune", "recadam", "mars", "r3f"),
    "distill": ("finetune", "recadam", "mars", "r3f"),
    "finetune": (),
}

#: How engine/run.py's error begins where a loss is not finite.
DIVERGED = "the loss is not finite"

#: Seed of the runs that choose hyper-parameters: none of those that are reported.
SEARCH_SEED = 1000

#: Seeds of a pipeline begin at so many times its number.
PIPELINE = 100


@dataclass
class Trial:
    """Shorter fine-tunings of a search's candidates, of which the best go on.

    Attributes:
        jobs: all of them, in the order of the search.
        keep: how many go on.
    """

    jobs: list[Job]
    keep: int

    def best(self, root: Path) -> list[str] | None:
        """Names of those that go on, the first of equals before others; None before it is known."""
        if any(job.result(root) is None and not job.lost(root) for job in self.jobs):
            return None
        scored = [(job.validation(root), job.name) for job in self.jobs]
        known = [(score, name) for score, name in scored if score is not None]
        ranked = sorted(known, key=lambda pair: pair[0], reverse=True)  # stable
        return [name for _, name in ranked[: self.keep]]


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
        """The candidate of the highest score, the first of equals; what was lost has none.

        Raises:
            UserError: one has no score yet, or none will have any.
        """
        scored = self.scores(root)
        candidates = [
            job.name
            for (_, job), (_, score) in zip(self.candidates, scored, strict=True)
            if score is None and not job.lost(root)
        ]
        if candidates:
            raise UserError(f"{self.name} waits for {candidates[0]}, which has no validation score")
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
        base: the export of stage 0, which then stands for the model in stages 1 and 2.
        choices: options that validation scores decide, before it starts.
        seeds: fine-tunings in this launch.
        rounds: of self-distillation up to which it goes.
        said: options that no choice changes.
        shorter: the same candidate of a search at a smaller length, if it must do well there first.
        trial: in which `shorter` is compared with others.
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
    shorter: Job | None = None
    trial: Trial | None = None
    base: str | None = None

    @property
    def folder(self) -> str:
        """Its run folder, below the sweep's; rounds of self-distillation share one."""
        return self.name.partition("#")[0]

    @property
    def before(self) -> list[Job]:
        """Jobs that must be complete before it starts."""
        tried = [job for choice in self.choices for _, job in choice.candidates]
        return [*self.needs, *tried, *(self.trial.jobs if self.trial else ())]

    @property
    def leaves(self) -> str:
        """Folder of the stage that it completes, below the sweep's."""
        last = {"distill": f"distill-{self.rounds}", "finetune": self._finetuning}
        return f"{self.folder}/{last.get(self.stage, self.stage)}"

    @property
    def _finetuning(self) -> str:
        return "finetune-model" if self.start is None else "finetune"

    def result(self, root: Path) -> dict[str, Any] | None:
        """What it left; None before it is complete."""
        leaves = root / self.leaves
        places = [leaves / RESULT]
        if self.stage == "finetune" and self.seeds == 1:  # the first of several that are under way
            places.append(leaves / f"seed-{self.words.get('seed', 0)}" / RESULT)
        for path in places:
            with suppress(FileNotFoundError, UserError):
                found = read_result(path)
                if self.stage != "finetune" or (found.get("n") or 1) >= self.seeds:
                    return found
        return None

    def usable(self, root: Path) -> bool:
        """Whether it is complete, and what others start from is there: a record has no weights."""
        if self.result(root) is None:
            return False
        return self.stage == "finetune" or (root / self.leaves / "export").exists()

    def told(self, root: Path) -> dict[str, Any]:
        """What it, or its first seed that is complete, tells of what it learnt from; {} if none."""
        leaves = root / self.leaves
        for path in (leaves / RESULT, *sorted(leaves.glob(f"seed-*/{RESULT}"))):
            with suppress(FileNotFoundError, UserError):
                found = read_result(path)
                if found.get("manifest") is not None:
                    return found
        return {}

    def record(self, root: Path) -> Path:
        """File of what is known of its launches (`experiments.state`)."""
        mark = self.name.removeprefix(self.folder).replace("#", "-")
        return root / self.folder / f"job{mark}.json"

    def diverged(self, root: Path) -> bool:
        """Whether it is a search's candidate whose loss was not finite, and would not be again."""
        if "/search/" not in self.name or self.result(root) is not None:
            return False
        record = _json(self.record(root)) or {}
        return record.get("status") == "failed" and str(record.get("message")).startswith(DIVERGED)

    def dropped(self, root: Path) -> bool:
        """Whether it is a candidate that did not do well enough at a smaller length."""
        if self.trial is None or self.shorter is None or self.result(root) is not None:
            return False
        best = self.trial.best(root)
        return best is not None and self.shorter.name not in best

    def lost(self, root: Path) -> bool:
        """Whether it is a search's candidate, or of one, that will have no score."""
        if self.diverged(root) or self.dropped(root):
            return True
        searched = "/search/" in self.name and self.result(root) is None
        return searched and any(one.lost(root) for one in self.needs)

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
        options: Options = {
            "stage": self.stage,
            **self.options(root),
            "data": str(data_root / (self.dataset.folder or self.dataset.name)),
            "output": str(root / self.folder),
        }
        if self.base is not None:
            options["model.path"] = str(root / self.base)
        if self.stage == "distill":
            options |= {"teacher": str(root / str(self.start)), "rounds": self.rounds}
        if self.stage == "finetune":
            options["finetune.seeds"] = self.seeds
            if self.start is None:
                options["finetune.start"] = "model"
            else:
                options["finetune.weights"] = str(root / self.start)
        return [word for key, value in options.items() for word in (f"--{key}", typed(value))]


def typed(value: object) -> str:
    """A value as a command line has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json(path: Path) -> dict[str, Any] | None:
    try:
        return records.read_object(path)
    except (FileNotFoundError, UserError):
        return None
