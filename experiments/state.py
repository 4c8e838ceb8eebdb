"""What is known of a sweep's jobs: each has a small JSON record beside what it left."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import FILE, Manifest
from selfdistill.data.splits import UNLABELLED
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.checkpoints.results import RESULT, read_result
from selfdistill.experiments.jobs import Job
from selfdistill.experiments.plan import Plan
from selfdistill.experiments.spec import Profile, Specs

SWEEP = "sweep.json"

Status = Literal["done", "failed", "blocked", "open"]
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Asked:
    """One call of experiments.run: a table, restricted as it was."""

    table: str
    datasets: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seeds: int | None = None
    pipelines: int | None = None


class _Asked(records.Record):
    table: str
    datasets: list[str]
    only: list[str]
    seeds: records.Count | None
    pipelines: records.Count | None = None


class _Written(records.Record):
    """`Sweep` as its file has it."""

    profile: str
    data_root: str
    specs: str | None
    asked: list[_Asked]
    halving: records.Count = 0
    models: str | None = None
    search: bool = True
    precision: Precision | None = None


@dataclass
class Sweep:
    """A folder of experiments: what was asked for, and of what size.

    Attributes:
        root: the folder.
        profile: name of the profile.
        data_root: folder of the packed data sets.
        specs: folder of the user's own specs, or None.
        asked: the tables, in order.
        halving: see `Plan`.
        models: see `Plan`.
        search: whether validation chooses options, as profile and methods say.
        precision: in place of the profile's; None: as it says.
    """

    root: Path
    profile: str
    data_root: Path
    specs: Path | None
    asked: list[Asked]
    halving: int = 0
    models: Path | None = None
    search: bool = True
    precision: Precision | None = None

    @classmethod
    def open(cls, root: Path) -> Sweep:
        """Reads a sweep.

        Raises:
            UserError: there is none.
        """
        path = root / SWEEP
        cure = (
            "this is not what experiments.run wrote: remove it, and run the tables again; what is"
            " complete stays so"
        )
        try:
            written: _Written = records.checked(_Written, records.read_json(path, cure), path, cure)
        except FileNotFoundError:
            raise UserError(
                f"{root} holds no experiments ({SWEEP} is missing): run experiments.run first"
            ) from None
        asked = [
            Asked(a.table, tuple(a.datasets), tuple(a.only), a.seeds, a.pipelines)
            for a in written.asked
        ]
        specs = None if written.specs is None else Path(written.specs)
        models = None if written.models is None else Path(written.models)
        data_root = Path(written.data_root)
        return cls(
            *(root, written.profile, data_root, specs, asked),
            *(written.halving, models, written.search, written.precision),
        )

    def save(self) -> None:
        """Writes it."""
        self.root.mkdir(parents=True, exist_ok=True)
        content = {
            "profile": self.profile,
            "data_root": str(self.data_root.resolve()),
            "specs": None if self.specs is None else str(self.specs.resolve()),
            "asked": [vars(one) for one in self.asked],
            "halving": self.halving,
            "models": None if self.models is None else str(self.models.resolve()),
            "search": self.search,
            "precision": self.precision,
        }
        write_text(self.root / SWEEP, json.dumps(content, indent=1) + "\n")

    def ask(self, new: list[Asked]) -> None:
        """Adds tables; one that is asked for again joins the one before, where that is possible.

        On the same data sets, methods join; of the same methods and seeds, data sets do. More seeds
        of some methods are a table of their own: they say nothing of the others.
        """
        for one in new:
            joined = one
            for old in [a for a in self.asked if a.table == one.table]:
                more = joined.seeds or old.seeds, joined.pipelines or old.pipelines
                alike = more == (old.seeds, old.pipelines)
                whole = not joined.only or bool(old.only and set(old.only) <= set(joined.only))
                if old.datasets == joined.datasets and (alike or whole):
                    # Asked for whole once, it is whole.
                    only = _joined(old.only, joined.only) if old.only and joined.only else ()
                    joined = replace(
                        joined,
                        only=only,
                        seeds=more[0],
                        pipelines=more[1],
                    )
                elif (
                    old.datasets
                    and joined.datasets
                    and (old.only, old.seeds, old.pipelines)
                    == (joined.only, joined.seeds, joined.pipelines)
                ):
                    joined = replace(joined, datasets=_joined(old.datasets, joined.datasets))
                else:
                    continue
                self.asked.remove(old)
            self.asked.append(joined)

    def size(self, specs: Specs) -> Profile:
        """Its profile, in its precision.

        Raises:
            UserError: the profile's file is wrong.
        """
        profile = specs.load(Profile, self.profile)
        return profile if self.precision is None else profile.computed_in(self.precision)

    def plan(self, asked: list[Asked] | None = None, *, results: bool = False) -> Plan:
        """The jobs of its tables, or of some.

        Args:
            asked: which; None: all.
            results: also where the data are gone and results are there, as a report has it.

        Raises:
            UserError: a spec is missing or wrong.
        """
        specs = Specs(self.specs, searched=self.search)
        done = self.root if results else None
        profile = self.size(specs)
        made = Plan(specs, profile, self.data_root, done, self.halving, self.models)
        for one in self.asked if asked is None else asked:
            table = specs.table(one.table)
            if one.datasets:
                table = table.model_copy(update={"datasets": list(one.datasets)})
            made.add(table, one.only, one.seeds, one.pipelines)
        return made


def _joined(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))


def record(root: Path, job: Job) -> Path:
    """The file of a job's record."""
    return job.record(root)


def read(root: Path, job: Job) -> dict[str, Any]:
    """A job's record; empty where it has none."""
    try:
        return records.read_object(record(root, job))
    except (FileNotFoundError, UserError):
        return {}


def check(
    root: Path, job: Job, command: list[str], data_root: Path, models: Path | None = None
) -> None:
    """Refuses to take what was made otherwise for what is asked for; the folders may have moved.

    Args:
        root: the sweep's folder.
        job: which.
        command: what it would be launched with.
        data_root: folder of the packed data sets.
        models: folder of models, by which those of `command` are named.

    Raises:
        UserError: names what differs: an option, the data, or what it started from.
    """
    before = read(root, job)
    leaves = root / job.leaves
    # A launch that was refused leaves a folder, and nothing in it that was learnt.
    if "command" not in before or not any(
        True for name in ("result.json", "state.json") for _ in leaves.rglob(name)
    ):
        return
    place = f"{root / job.folder}"
    cure = "move it away, or take another --output"
    then = _told(before["command"], before.get("root"), before.get("models"))
    now = _told(command, str(root), None if models is None else str(models))
    for name in sorted(k for k in then | now if then.get(k) != now.get(k)):
        raise UserError(
            f"{place} was made with {name} {then.get(name)}, now it is {now.get(name)}: {cure}"
        )
    found = job.told(root)
    made, data = found.get("manifest"), data_root / (job.dataset.folder or job.dataset.name)
    for split in ("val", "test"):
        scored = (found.get("record") or {}).get(f"{split} split")
        if scored is not None and scored != Manifest.load_split(str(data), split).hash:
            raise UserError(
                f"{place} was scored on another {split} split than {data} holds: {cure}"
            )
    if made is not None and not (job.stage == "decoder" and "--decoder.data" in command):
        splits = ["train"] if job.stage == "finetune" else ["train", UNLABELLED]
        there = [s for s in splits if (data / s / FILE).exists()]
        if made not in [Manifest.load_split(str(data), s).hash for s in there]:
            raise UserError(f"{place} learnt from other data than {data} holds: {cure}")
    for one in job.needs:
        if float(read(root, one).get("began", 0.0)) > float(before["began"]):
            raise UserError(
                f"{place} started from what {root / one.folder} was before it was made anew: {cure}"
            )


def _told(words: list[str], root: str | None, models: str | None) -> dict[str, str]:
    """Options of a command that say what is done; places below the two folders from there."""
    pairs = dict(zip(words[::2], words[1::2], strict=True))
    kept = {k: v for k, v in pairs.items() if k not in ("--data", "--output", "--finetune.seeds")}
    for folder in sorted((one for one in (root, models) if one), key=len, reverse=True):
        kept = {k: v.removeprefix(f"{folder}/") for k, v in kept.items()}
    return kept


def _first_of_several(root: Path, job: Job) -> None:
    """Puts a fine-tuning that was asked for alone where the first of several is looked for.

    Its result comes last: whatever happens in between, it is complete in one of the two places.
    """
    leaves = root / job.leaves
    if job.stage != "finetune" or job.seeds == 1:
        return
    try:
        found = read_result(leaves / RESULT)
    except (FileNotFoundError, UserError):
        return
    if "n" in found or found.get("seed") is None:
        return
    first = leaves / f"seed-{found['seed']}"
    own = [path for path in leaves.iterdir() if not path.name.startswith("seed-")]
    if any((first / path.name).exists() for path in own):
        return  # the launch says that there are two
    first.mkdir(exist_ok=True)
    for path in sorted(own, key=lambda path: path.name == RESULT):
        path.rename(first / path.name)


def begin(
    root: Path, job: Job, command: list[str], data_root: Path, models: Path | None = None
) -> list[str]:
    """Notes that a job starts; returns the words to launch it with.

    A stage whose result is there and whose weights are not, as in a record that was copied from
    elsewhere, is done again. Arguments are those of `check`.

    Raises:
        UserError: another command made what is there.
    """
    check(root, job, command, data_root, models)
    _first_of_several(root, job)
    path = record(root, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Going on with what it began, it began then.
    began = read(root, job).get("began") if (root / job.leaves).exists() else None
    content = {"command": command, "root": str(root), "began": began or time.time()}
    content["models"] = None if models is None else str(models)
    content |= {"started": time.time(), "status": "running"}
    write_text(path, json.dumps(content, indent=1) + "\n")
    again = job.result(root) is not None and not job.usable(root)
    return [*command, "--overwrite", "true"] if again else command


def end(root: Path, job: Job, code: int, message: str) -> None:
    """Notes how a job ended.

    Args:
        root: the sweep's folder.
        job: which.
        code: its exit code.
        message: its last error, on one line.
    """
    content = read(root, job)
    content |= {"status": "failed" if code else "done", "code": code, "message": message}
    content["seconds"] = round(time.time() - content.get("started", time.time()), 1)
    write_text(record(root, job), json.dumps(content, indent=1) + "\n")


def status(root: Path, job: Job) -> Status:
    """Where a job stands."""
    if job.result(root) is not None or job.lost(root):
        return "done"
    if read(root, job).get("status") == "failed":
        return "failed"
    if any(status(root, one) in ("failed", "blocked") for one in job.before):
        return "blocked"
    return "open"


def wanted(root: Path, plan: Plan) -> list[Job]:
    """Jobs to be done, each after those that it waits for.

    What complete fine-tunings started from is not asked for again.
    """
    found: dict[str, Job] = {}

    def visit(job: Job, *, started_from: bool) -> None:
        there = job.usable(root) if started_from else status(root, job) == "done"
        if there or job.name in found:
            return
        needs = {one.name for one in job.needs}
        for one in job.before:
            visit(one, started_from=one.name in needs)
        found[job.name] = job

    for cell in plan.cells:
        for job in cell.jobs:
            visit(job, started_from=False)
    return list(found.values())


#: What a log's part of one launch begins with.
LAUNCH = "$ engine/run.py "


def error_of(log: Path, code: int) -> str:
    """What the last launch in a log said went wrong, on one line.

    Args:
        log: launches one after another.
        code: exit code; negative, or above 128, for a signal.
    """
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    lines = [line for line in text.rpartition(LAUNCH)[2].splitlines()[1:] if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1][:500]
    number = -code if code < 0 else code - 128
    if number > 0:
        return f"killed by signal {number}"
    return lines[-1][:500] if lines else ""
