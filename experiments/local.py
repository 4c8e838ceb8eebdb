"""A sweep's jobs on this machine: several at a time, in launches of their own or in workers."""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from selfdistill.data.errors import UserError
from selfdistill.engine.runtime.preemption import AGAIN
from selfdistill.engine.runtime.rendezvous import free_port
from selfdistill.experiments import state, worker
from selfdistill.experiments.jobs import Job
from selfdistill.experiments.plan import Plan
from selfdistill.experiments.worker import Worker
from selfdistill.launcher.train import GPUS

ROOT = Path(__file__).resolve().parent.parent

#: What engine/run.py says of a folder that another launch has.
IN_USE = "is in use by another launch"

#: Launches of one job that ended with the code that asks for another.
_AGAIN = 5


def gpus() -> int:
    """GPUs that torch finds on this machine; without any, torch is not imported, for seconds."""
    if not any(map(os.path.exists, GPUS)):
        return 0
    import torch

    return torch.cuda.device_count()


@dataclass
class Running:
    """A job under way."""

    job: Job
    process: subprocess.Popen[bytes] | Worker
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
        in_process: whether a slot's jobs are done one after another by one process.
    """

    def __init__(
        self,
        root: Path,
        plan: Plan,
        ranks: int,
        slots: int,
        hours: float,
        *,
        in_process: bool = False,
    ) -> None:
        self.root, self.plan, self.ranks, self.slots = root, plan, ranks, slots
        self.until = time.monotonic() + 3600 * hours if hours else float("inf")
        self.devices = gpus()
        self.in_process = in_process
        self.workers: dict[int, Worker] = {}
        self.running: list[Running] = []
        self.tries: dict[str, int] = {}
        self.asked_to_stop = False
        self.console = Console(emoji=False, markup=False, highlight=False)
        self.took: dict[str, list[float]] = {}

    def run(self, jobs: list[Job]) -> int:
        """Runs what is open among some jobs, and what failed before; returns how many failed."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, self._stop)
        try:
            return self._run(jobs)
        finally:
            for worker in self.workers.values():
                worker.close()

    def _run(self, jobs: list[Job]) -> int:
        remaining = state.wanted(self.root, self.plan)
        open_ones = {job.name for job in remaining}
        ends: dict[str, state.Status] = {
            job.name: "done" for job in jobs if job.name not in open_ones
        }
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
                    if job.lost(self.root):
                        ends[job.name] = "done"
                        remaining.remove(job)
                        better = job.dropped(self.root)
                        why = "others did better" if better else "what it starts from diverged"
                        self.console.print(f"{job.name}: dropped, {why}", soft_wrap=True)
                        continue
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
            # A launch's end is seen when it is looked for, a worker's tells itself.
            doing = [one.process for one in self.running if isinstance(one.process, Worker)]
            connection.wait([one.connection for one in doing], 0.2)
        return sum(end != "done" for end in ends.values())

    def _stop(self, number: int, _: object) -> None:
        """Passes a signal on: the jobs save, and the next call goes on."""
        self.asked_to_stop = True
        for one in self.running:
            one.process.send_signal(signal.SIGTERM)

    def _start(self, job: Job, ends: dict[str, state.Status]) -> None:
        try:
            words = job.command(self.root, self.plan.data_root)
            words = state.begin(self.root, job, words, self.plan.data_root, self.plan.models)
        except UserError as error:
            self.console.print(f"{job.name}: failed: {error}", style="red", soft_wrap=True)
            ends[job.name] = "failed"
            return
        slot = min(set(range(self.slots)) - {one.slot for one in self.running})
        path = log_of(self.root, job)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            log.write(f"{state.LAUNCH}{shlex.join(words)}\n".encode())
            log.flush()
            process = self._process(slot, words, path, log)
        self.running.append(Running(job, process, slot, time.monotonic()))
        if self.asked_to_stop:  # while it was being started, so that it was not told
            process.send_signal(signal.SIGTERM)
        self.console.print(f"{job.name}: started, log: {path}", soft_wrap=True)

    def _process(
        self, slot: int, words: list[str], path: Path, log: IO[bytes]
    ) -> subprocess.Popen[bytes] | Worker:
        """What does a job: a launch, or the slot's worker, a new one where need be."""
        options: dict[str, Any] = {
            "cwd": ROOT,
            "env": os.environ | self._environment(slot),
            "preexec_fn": _end_with_parent,
        }
        settings = worker.settings(words) if self.in_process else None
        mine = self.workers.get(slot)
        if mine is not None and (settings is None or not mine.serves(settings)):
            self.workers.pop(slot).close()
            mine = None
        if settings is None:
            return subprocess.Popen(
                [*self._launcher(slot), str(ROOT / "engine" / "run.py"), *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                **options,
            )
        if mine is None:
            mine = self.workers[slot] = Worker(settings, log, **options)
        mine.give(words, path)
        return mine

    def _launcher(self, slot: int) -> list[str]:
        if self.ranks == 1:
            return [sys.executable]
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        port = ["--master_port", str(free_port())]  # other sweeps may run here
        if self.devices:
            first = slot * self.ranks % self.devices
            chosen = ",".join(self._device(first + k) for k in range(self.ranks))
            return [deepspeed, "--include", f"localhost:{chosen}", *port]
        return [deepspeed, "--num_gpus", str(self.ranks), *port]

    def _device(self, number: int) -> str:
        """A GPU by the name that it has on this host: not all may be ours."""
        number %= self.devices
        given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return given[number].strip() if given else str(number)

    def _environment(self, slot: int) -> dict[str, str]:
        environment = {"PYTHONUNBUFFERED": "1"}
        if self.devices and self.ranks == 1:
            environment["CUDA_VISIBLE_DEVICES"] = self._device(slot)
        if not self.devices and "OMP_NUM_THREADS" not in os.environ:
            cores = len(os.sched_getaffinity(0))
            environment["OMP_NUM_THREADS"] = str(max(1, cores // (self.slots * self.ranks)))
        return environment

    def _collect(self, ends: dict[str, state.Status], remaining: list[Job], total: int) -> None:
        """Takes in the jobs that have ended."""
        for one in list(self.running):
            code = one.process.poll()
            if code is None:
                continue
            self.running.remove(one)
            job, seconds = one.job, time.monotonic() - one.began
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
                if job.stage == "decoder":
                    message = "its model has a decoder: take decoder = true out of the profile"
            state.end(self.root, job, code, message)
            diverged = job.diverged(self.root)
            ends[job.name] = "failed" if code and not diverged else "done"
            self.took.setdefault(job.stage, []).append(seconds)
            ended = sum(end == "done" for end in ends.values())
            outcome = f"failed ({message}), log: {log_of(self.root, job)}" if code else "done"
            outcome += "; it loses the search" if diverged else ""
            outcome += f" in {seconds:.0f} s{self._time_left(remaining)}"
            style = "red" if code else None
            self.console.print(
                f"[{ended}/{total}] {job.name}: {outcome}", style=style, soft_wrap=True
            )

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
