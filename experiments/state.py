"""What is known of a sweep's jobs: each has a small JSON record beside what it left."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.errors import UserError
from engine.files import write_text
from experiments.plan import Job, Plan
from experiments.spec import Profile, Specs, Table

SWEEP = "sweep.json"

Status = Literal["done", "failed", "blocked", "open"]


@dataclass(frozen=True)
class Asked:
    """One call of experiments.run: a table, restricted as it was."""

    table: str
    datasets: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    seeds: int | None = None


@dataclass
class Sweep:
    """A folder of experiments: what was asked for, and of what size.

    Attributes:
        root: the folder.
        profile: name of the profile.
        data_root: folder of the packed data sets.
        specs: folder of the user's own specs, or None.
        asked: the tables, in order.
    """

    root: Path
    profile: str
    data_root: Path
    specs: Path | None
    asked: list[Asked]

    @classmethod
    def open(cls, root: Path) -> Sweep:
        """Reads a sweep.

        Raises:
            UserError: there is none.
        """
        path = root / SWEEP
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{root} holds no experiments ({SWEEP} is missing): run experiments.run first"
            ) from None
        except ValueError as error:
            raise UserError(
                f"{path}: not valid JSON ({error}): run experiments.run again"
            ) from None
        asked = [
            Asked(a["table"], tuple(a["datasets"]), tuple(a["only"]), a["seeds"])
            for a in told["asked"]
        ]
        specs = None if told["specs"] is None else Path(told["specs"])
        return cls(root, told["profile"], Path(told["data_root"]), specs, asked)

    def save(self) -> None:
        """Writes it."""
        self.root.mkdir(parents=True, exist_ok=True)
        told = {
            "profile": self.profile,
            "data_root": str(self.data_root.resolve()),
            "specs": None if self.specs is None else str(self.specs.resolve()),
            "asked": [vars(one) for one in self.asked],
        }
        write_text(self.root / SWEEP, json.dumps(told, indent=1) + "\n")

    def ask(self, new: list[Asked]) -> None:
        """Adds tables; one that is asked for again, on the same data sets, joins the one before."""
        for one in new:
            same = [a for a in self.asked if (a.table, a.datasets) == (one.table, one.datasets)]
            self.asked = [a for a in self.asked if a not in same]
            parts = [*(a.only for a in same), one.only]
            # Asked for whole once, it is whole.
            only = tuple(dict.fromkeys(w for part in parts for w in part)) if all(parts) else ()
            self.asked.append(Asked(one.table, one.datasets, only, one.seeds))

    def plan(self, asked: list[Asked] | None = None) -> Plan:
        """The jobs of its tables, or of some.

        Raises:
            UserError: a spec is missing or wrong.
        """
        specs = Specs(self.specs)
        made = Plan(specs, specs.load(Profile, self.profile), self.data_root)
        for one in self.asked if asked is None else asked:
            table = specs.load(Table, one.table)
            if one.datasets:
                table = table.model_copy(update={"datasets": list(one.datasets)})
            made.add(table, one.only, one.seeds)
        return made


def record(root: Path, job: Job) -> Path:
    """The file of a job's record."""
    return root / job.folder / f"job{job.name.removeprefix(job.folder).replace('#', '-')}.json"


def read(root: Path, job: Job) -> dict[str, Any]:
    """A job's record; empty where it has none."""
    try:
        return dict(json.loads(record(root, job).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def check(root: Path, job: Job, command: list[str]) -> None:
    """Refuses what another command made; data and output may have moved.

    Raises:
        UserError: names the options that differ.
    """
    before = read(root, job).get("command")
    if before is None or not (root / job.leaves).exists():
        return
    then, now = (
        {k: v for k, v in _pairs(words).items() if k not in _PLACES} for words in (before, command)
    )
    differing = sorted(k for k in then | now if then.get(k) != now.get(k))
    if differing:
        first = differing[0]
        raise UserError(
            f"{root / job.folder} was made with {first} {then.get(first)}, now it is"
            f" {now.get(first)}: move it away, or take another --output"
        )


#: Options that name places, or how many there are: what is done is the same.
_PLACES = ("--data", "--output", "--teacher", "--finetune.weights", "--finetune.seeds")


def _pairs(words: list[str]) -> dict[str, str]:
    return dict(zip(words[::2], words[1::2], strict=True))


def begin(root: Path, job: Job, command: list[str]) -> None:
    """Notes that a job starts.

    Raises:
        UserError: another command made what is there.
    """
    check(root, job, command)
    path = record(root, job)
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"command": command, "began": time.time(), "status": "running"}
    write_text(path, json.dumps(told, indent=1) + "\n")


def end(root: Path, job: Job, code: int, message: str) -> None:
    """Notes how a job ended.

    Args:
        root: the sweep's folder.
        job: which.
        code: its exit code.
        message: its last error, on one line.
    """
    told = read(root, job)
    told |= {"status": "failed" if code else "done", "code": code, "message": message}
    told["seconds"] = round(time.time() - told.get("began", time.time()), 1)
    write_text(record(root, job), json.dumps(told, indent=1) + "\n")


def status(root: Path, job: Job) -> Status:
    """Where a job stands."""
    if job.result(root) is not None:
        return "done"
    if read(root, job).get("status") == "failed":
        return "failed"
    if any(status(root, one) in ("failed", "blocked") for one in job.before):
        return "blocked"
    return "open"


def error_of(log: Path) -> str:
    """The last line of a log that says what went wrong."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line for line in lines if line.startswith(("error:", "srun: error"))]
    told = errors or [line for line in lines if line.strip()]
    return told[-1].removeprefix("error: ")[:500] if told else ""
