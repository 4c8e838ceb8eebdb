"""Runs the paper's experiments: `python -m experiments.run table1 table2 --data_root shards`.

What is complete is not done again; what several tables need is done once; one failure stops only
what depends on it. After an interruption the same command continues.
"""

import contextlib
import ctypes
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.config import options as configuration
from selfdistill.engine.config.schema import Config
from selfdistill.engine.regularizers import mars, recadam
from selfdistill.engine.runtime.preemption import AGAIN
from selfdistill.experiments import state
from selfdistill.experiments.jobs import Job, typed
from selfdistill.experiments.plan import Plan
from selfdistill.experiments.spec import Specs, Table
from selfdistill.experiments.state import Asked, Sweep

ROOT = Path(__file__).resolve().parent.parent

#: What engine/run.py says of a folder that another launch has.
IN_USE = "is in use by another launch"

#: Launches of one job that ended with the code that asks for another.
_AGAIN = 5


@dataclass
class Running:
    """A job under way."""

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    slot: int
    began: float


class Local:
    """Runs jobs on this machine, several at a time.

    Args:
        root: the sweep's folder.
        plan: its jobs.
        ranks: processes of each job.
        slots: jobs at a time.
        hours: after which no job is started any more; 0: no limit.
    """

    def __init__(self, root: Path, plan: Plan, ranks: int, slots: int, hours: float) -> None:
        import torch

        self.root, self.plan, self.ranks, self.slots = root, plan, ranks, slots
        self.until = time.monotonic() + 3600 * hours if hours else float("inf")
        self.devices = torch.cuda.device_count()
        self.running: list[Running] = []
        self.tries: dict[str, int] = {}
        self.asked_to_stop = False
        self.console = Console(emoji=False, markup=False, highlight=False)
        self.took: dict[str, list[float]] = {}

    def run(self, jobs: list[Job]) -> int:
        """Runs what is open among some jobs, and what failed before; returns how many failed."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._stop)
        ends: dict[str, state.Status] = {
            job.name: "done" for job in jobs if state.status(self.root, job) == "done"
        }
        remaining = [job for job in jobs if job.name not in ends]
        self.console.print(f"{len(jobs)} jobs, {len(ends)} of them complete")
        while remaining or self.running:
            self._collect(ends, remaining, len(jobs))
            if self.asked_to_stop and not self.running:
                self.console.print("interrupted: the jobs have saved; the same command goes on")
                raise SystemExit(AGAIN)
            for job in list(remaining):
                if self.asked_to_stop or len(self.running) >= self.slots:
                    break
                if any(ends.get(one.name) in ("failed", "blocked") for one in job.before):
                    ends[job.name] = "blocked"
                    remaining.remove(job)
                elif all(ends.get(one.name) == "done" for one in job.before):
                    if time.monotonic() > self.until:
                        continue
                    remaining.remove(job)
                    # Rounds share a folder: one of them at a time.
                    self._start(job, ends)
            if time.monotonic() > self.until and not self.running:
                self.console.print(
                    f"the time is up: {len(remaining)} jobs are left for another call"
                )
                break
            time.sleep(0.2)
        return sum(end != "done" for end in ends.values())

    def _stop(self, number: int, _: object) -> None:
        """Passes a signal on: the jobs save, and the next call goes on."""
        self.asked_to_stop = True
        for one in self.running:
            one.process.send_signal(signal.SIGTERM)

    def _start(self, job: Job, ends: dict[str, state.Status]) -> None:
        try:
            words = job.command(self.root, self.plan.data_root)
            state.begin(self.root, job, words, self.plan.data_root)
        except UserError as error:
            self.console.print(f"{job.name}: failed: {error}", style="red")
            ends[job.name] = "failed"
            return
        slot = min(set(range(self.slots)) - {one.slot for one in self.running})
        path = log_of(self.root, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
        log.write(f"{state.LAUNCH}{shlex.join(words)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [*self._launcher(slot), str(ROOT / "engine" / "run.py"), *words],
            cwd=ROOT,
            env=os.environ | self._environment(slot),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        self.running.append(Running(job, process, log, slot, time.monotonic()))
        self.console.print(f"{job.name}: started, log: {path}", soft_wrap=True)

    def _launcher(self, slot: int) -> list[str]:
        if self.ranks == 1:
            return [sys.executable]
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        port = ["--master_port", str(29600 + slot)]
        if self.devices:
            first = slot * self.ranks % self.devices
            chosen = ",".join(str((first + k) % self.devices) for k in range(self.ranks))
            return [deepspeed, "--include", f"localhost:{chosen}", *port]
        return [deepspeed, "--num_gpus", str(self.ranks), *port]

    def _environment(self, slot: int) -> dict[str, str]:
        environment = {"PYTHONUNBUFFERED": "1"}
        if self.devices and self.ranks == 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % self.devices)
        if not self.devices and "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            environment["OMP_NUM_THREADS"] = str(max(1, cores // (self.slots * self.ranks)))
        return environment

    def _collect(self, ends: dict[str, state.Status], remaining: list[Job], total: int) -> None:
        """Takes in the jobs that have ended."""
        for one in [r for r in self.running if r.process.poll() is not None]:
            self.running.remove(one)
            one.log.close()
            job, code, seconds = one.job, one.process.returncode, time.monotonic() - one.began
            message = state.error_of(log_of(self.root, job), code) if code else ""
            # A child of a call that was killed may still be saving.
            busy = code == 2 and IN_USE in message
            if code == AGAIN or busy or (code and self.asked_to_stop):
                self.tries[job.name] = self.tries.get(job.name, 0) + 1
                if self.asked_to_stop or self.tries[job.name] < _AGAIN:
                    remaining.insert(0, job)
                    continue
            if not code and job.result(self.root) is None:
                code, message = 1, "it ended well and left no result"
            state.end(self.root, job, code, message)
            diverged = job.diverged(self.root)
            ends[job.name] = "failed" if code and not diverged else "done"
            self.took.setdefault(job.stage, []).append(seconds)
            ended = sum(end == "done" for end in ends.values())
            outcome = f"failed ({message}), log: {log_of(self.root, job)}" if code else "done"
            outcome += "; it loses the search" if diverged else ""
            outcome += f" in {seconds:.0f} s{self._time_left(remaining)}"
            style = "red" if code else None
            self.console.print(f"[{ended}/{total}] {job.name}: {outcome}", style=style)

    def _time_left(self, remaining: list[Job]) -> str:
        """An estimate from the jobs that ran in this call."""
        means = {stage: sum(t) / len(t) for stage, t in self.took.items()}
        if not remaining or not means:
            return ""
        usual = sum(means.values()) / len(means)
        seconds = sum(means.get(job.stage, usual) for job in remaining) / self.slots
        return f"; {len(remaining)} left, about {seconds / 3600:.1f} h"


def _end_with_parent() -> None:
    """In a child, before its program: SIGTERM, upon which it saves, when this process is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def log_of(root: Path, job: Job) -> Path:
    """A job's log."""
    return root / "logs" / f"{job.name.replace('/', '-')}.log"


def check(root: Path, plan: Plan) -> None:
    """Refuses options that engine/run.py refuses, and a folder made with others, before any start.

    Raises:
        UserError: names the job.
    """
    lengths: dict[str, int] = {}
    for job in plan.ordered():
        try:
            for options in job.possible():
                words = [word for k, v in options.items() for word in (f"--{k}", typed(v))]
                config = configuration.load(configuration.parse([*words, "--stage", job.stage]))
                if job.stage == "finetune" and config.finetune.regularizer in _CHECKS:
                    place = str(plan.place(job.dataset))
                    if place not in lengths:
                        lengths[place] = Manifest.load_split(place, "train").samples
                    steps = config.finetune.length(lengths[place])
                    _CHECKS[config.finetune.regularizer](config, steps)
        except UserError as error:
            raise UserError(f"{job.name}: {error}") from error
        tried = [one for choice in job.choices for _, one in choice.candidates]
        known = all(one.result(root) or one.diverged(root) for one in tried)
        if job.result(root) is not None and known:
            state.check(root, job, job.command(root, plan.data_root), plan.data_root)


#: What a regularizer refuses before it starts.
_CHECKS: dict[str, Callable[[Config, int], None]] = {
    "recadam": recadam.check,
    "mars": lambda config, _: mars.check(config),
}


def show(root: Path, plan: Plan, console: Console) -> None:
    """Prints the jobs, where they stand, and what they wait for."""
    for job in plan.ordered():
        waits = [one.name for one in job.before]
        after = (
            f"  (after {waits[0] if len(waits) == 1 else f'{len(waits)} others'})" if waits else ""
        )
        console.print(f"{state.status(root, job):8s}{job.name}{after}", soft_wrap=True)


def missing(plan: Plan, only: Sequence[str]) -> None:
    """Says which data sets are not there; refuses when none is.

    Raises:
        UserError: nothing can be run, or --only names what no table has.
    """
    if strange := [word for word in only if word not in plan.named]:
        near = cli.nearest(strange[0], sorted(plan.named), "")
        raise UserError(f"--only {strange[0]}: none of these tables has it.{near}")
    absent = [f"{d.name} ({d.pack})" if d.pack else d.name for d in plan.absent.values()]
    absent += [
        f"{d.name} has no val split to choose by (pack it with --val_fraction 0.1)"
        for d in plan.unsearchable.values()
    ]
    if not plan.cells:
        raise UserError(
            f"none of its data sets can be taken from {plan.data_root}: {'; '.join(absent)}"
        )
    for one in absent:
        print(f"not in {plan.data_root}, left out: {one}", file=sys.stderr)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds a sweep's folder, so that two calls do not start the same jobs.

    Raises:
        UserError: another call has it.
    """
    with (root / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{root}: another call of experiments.run is at work there: wait for it, or name"
                " all tables in one call"
            ) from None
        yield


def main(
    *tables: str,
    data_root: str | None = None,
    output: str = "runs/experiments",
    profile: str = "small",
    specs: str | None = None,
    datasets: str | None = None,
    only: str | None = None,
    seeds: int | None = None,
    ranks: int = 1,
    jobs: int = 0,
    hours: float = 0.0,
    slurm: bool = False,
    dry_run: bool = False,
) -> None:
    """Runs tables and figures of the paper, or what is missing of them.

    Args:
        tables: which, in this order, such as table1 figure4; none lists what there is.
        data_root: folder of packed data sets, each in a folder of its name.
        output: the sweep's folder.
        profile: size of models and schedules: small, or paper (Table 9).
        specs: folder with methods/, datasets/, tables/ or profiles/ of your own.
        datasets: in place of the tables' own, such as flowers_64,scierc.
        only: data sets, methods, or DATASET/METHOD, between commas; the rest is left for later.
        seeds: fine-tunings of each cell, in place of the tables' own.
        ranks: processes of one job.
        jobs: at a time; 0 takes one for each GPU, or core.
        hours: after which nothing new is started.
        slurm: submit arrays of SLURM jobs instead; options of sbatch come from SBATCH_ variables,
            so ranks, jobs and hours may not be given.
        dry_run: list the jobs and where they stand.
    """
    known = Specs(Path(specs) if specs else None)
    if not tables:
        for name in known.names(Table):
            print(f"{name:12s}{known.load(Table, name).title}")
        raise UserError("no table is named: python -m experiments.run table1 --data_root shards")
    for name, value, least in (("ranks", ranks, 1), ("jobs", jobs, 0), ("hours", hours, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: give {least} or more")
    if seeds is not None and seeds < 2:
        raise UserError(f"--seeds {seeds}: give 2 or more; a cell has a spread over its seeds")
    if slurm and (ranks, jobs, hours) != (1, 0, 0):
        raise UserError(
            "--slurm with --ranks, --jobs or --hours: SLURM decides these: give sbatch's options in"
            " its variables, such as SBATCH_TIMELIMIT, or leave --slurm out"
        )
    if data_root is None:
        raise UserError("--data_root is missing: the folder of packed data sets")
    if not Path(data_root).is_dir():
        raise UserError(f"--data_root {data_root}: there is no such folder")
    root = Path(output).absolute()
    if root.exists() and not root.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    if (root / state.SWEEP).exists():
        sweep = Sweep.open(root)
        if sweep.profile != profile:
            raise UserError(
                f"{root} holds experiments of profile {sweep.profile}: take another --output"
            )
        sweep.data_root = Path(data_root).resolve()
        sweep.specs = Path(specs).resolve() if specs else sweep.specs
    else:
        own = Path(specs).resolve() if specs else None
        sweep = Sweep(root, profile, Path(data_root).resolve(), own, [])
    asked = [Asked(name, _listed(datasets), _listed(only), seeds) for name in tables]
    plan = sweep.plan(asked)
    missing(plan, _listed(only))
    check(root, plan)
    if dry_run:
        show(root, plan, Console(emoji=False, markup=False, highlight=False))
        return
    root.mkdir(parents=True, exist_ok=True)
    with alone(root):
        sweep.ask(asked)
        sweep.save()
        if slurm:
            from selfdistill.experiments import arrays

            arrays.submit(root, plan)
            return
        import torch

        devices = torch.cuda.device_count() or len(os.sched_getaffinity(0))
        slots = jobs or max(1, devices // ranks)
        failed = Local(root, plan, ranks, slots, hours).run(plan.ordered())
    print(f"report: python -m experiments.report {output}")
    if failed:
        raise UserError(
            f"{failed} of the jobs failed, or wait for one that did: the report says why; mend it,"
            " and the same command tries them again"
        )


def _listed(words: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names between commas, which Fire may have made a tuple of already."""
    if words is None:
        return ()
    parts = words.split(",") if isinstance(words, str) else words
    return tuple(str(part).strip() for part in parts if str(part).strip())


if __name__ == "__main__":
    cli.run(main)
