"""A process that does one job after another: `experiments.run --in_process`.

`Worker` is such a process as the sweep sees it, `main` what happens in it. Each job is a call of
what `engine/run.py` itself calls, with the job's words, and into the job's log. What a launch finds
in a new process and leaves behind is put back, or the process ends with the job.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import IO, Any

from selfdistill.engine.runtime import preemption

if __name__ == "__main__":
    preemption.listen()  # before anything slow, as engine/run.py does
    # For its jobs; the sweep, which knows `Worker` alone, is spared seconds.
    import numpy as np
    import torch
    from torch.nn import functional

    from selfdistill.engine import run as engine

from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration

ROOT = Path(__file__).resolve().parent.parent

#: Exit codes of a launch that went as it can go: done, a mistake of the user's.
_KNOWN = (0, 2)

#: Bytes of tensors that a job may leave behind, in caches of small tables.
_LEFT = 2**20

#: Seconds for threads that have been told to end, as the watchdog's.
_MOMENT = 10.0

#: Seconds that a worker has to end, having nothing to do.
_PATIENCE = 30.0


def settings(words: list[str]) -> tuple[object, ...] | None:
    """What jobs that one process does have in common; None where one needs a process of its own.

    DeepSpeed remembers for the rest of a process that there was autocast, and of ZeRO-3 hooks and
    another linear function; CUDA reads the variables of `--deterministic` once; torch.compile
    counts how often a function was compiled, and gives up.

    Args:
        words: of engine/run.py.
    """
    from selfdistill.engine.runtime import zero  # late: it imports torch

    config = configuration.load(configuration.parse(words))
    try:
        content = zero.read(config.zero)
    except UserError:
        return None  # the launch says it
    sharded = zero.stage_of(content) == 3 or config.teacher.mode == "sharded"
    if sharded or zero.offloads(content) or config.compile:
        return None
    return config.zero, config.precision, config.deterministic


class Worker:
    """A process that does jobs.

    Args:
        settings: those of its jobs, see `settings`.
        log: of its first job, in which stands what goes wrong before.
        options: of `subprocess.Popen`.
    """

    def __init__(self, settings: tuple[object, ...], log: IO[bytes], **options: Any) -> None:
        self.settings = settings
        self.connection, theirs = Pipe()
        number = theirs.fileno()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "selfdistill.experiments.worker", str(number)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=(number,),
            **options,
        )
        theirs.close()
        self.over = False

    def serves(self, settings: tuple[object, ...]) -> bool:
        """Whether it can do a job of these settings."""
        return not self.over and self.settings == settings and self.process.poll() is None

    def give(self, words: list[str], log: Path) -> None:
        """Has it do a job.

        Args:
            words: of engine/run.py.
            log: the job's, to which it appends.
        """
        with suppress(OSError):  # it is gone: `poll` tells
            self.connection.send((words, str(log)))

    def poll(self) -> int | None:
        """The exit code of the job's launch; None before its end."""
        ended = self.process.poll()  # first: what it said before its end is there then
        with suppress(EOFError, OSError):
            if self.connection.poll():
                code, self.over = self.connection.recv()
                return int(code)
        self.over = self.over or ended is not None
        return ended

    def send_signal(self, number: int) -> None:
        """As to a launch."""
        self.process.send_signal(number)

    def close(self) -> None:
        """Ends it, once it has nothing to do."""
        self.connection.close()
        try:
            self.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main(number: int) -> None:
    """Does the jobs that come over a connection, until it is closed or a job has left its traces.

    Args:
        number: of the connection's file.
    """
    os.set_inheritable(number, False)
    parent, modules, before = Connection(number), 0, _traces()
    while True:
        try:
            words, log = parent.recv()
        except EOFError:
            break
        _write_to(log)
        code = _launch(words)
        _write_to(os.devnull)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # a job that failed has given back nothing
        if len(sys.modules) > modules:
            gc.freeze()  # what was imported stays: to look through it takes longer than a tiny job
            modules = len(sys.modules)
        over = code not in _KNOWN or preemption.asked() is not None
        over = over or not _clean(before)
        parent.send((code, over))
        if over:
            break
    engine.leave(0)


def _write_to(log: str) -> None:
    """From now on the program's own lines, and what reaches stderr, go to the end of a file."""
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def _launch(words: list[str]) -> int:
    """One launch, as in a new process."""
    sys.argv = [str(ROOT / "engine" / "run.py"), *words]  # which results name
    # No launch knows with which numbers its process begins.
    random.seed()
    np.random.seed()  # noqa: NPY002
    torch.seed()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return engine.launch(words)


def _clean(before: tuple[object, ...]) -> bool:
    """Whether a launch has left the process as it was; threads told to end have a moment for it."""
    end = time.monotonic() + _MOMENT
    while _traces() != before:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return _bytes() <= _LEFT


def _traces() -> tuple[object, ...]:
    """What a launch that has ended well leaves as it was."""
    return (
        threading.enumerate(),
        multiprocessing.active_children(),
        functional.linear,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        os.getcwd(),
    )


def _bytes() -> int:
    """Memory of tensors that something still refers to."""
    found = (one for one in gc.get_objects() if isinstance(one, torch.Tensor))
    return sum(one.untyped_storage().nbytes() for one in found)


if __name__ == "__main__":
    main(int(sys.argv[1]))
