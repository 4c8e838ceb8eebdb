"""A rank that hangs is found: no sign of life for so long, then the stacks and an end.

A thread a rank looks at the time of the last beat (a step, a batch scored, a file hashed). Each
also leaves its sign of life in the run's folder, so that the ranks which wait for one that works do
wait, and those which wait for a stopped process or a dead host can name it.

Under gloo a rank that waits stands in a collective. Under NCCL it stands wherever the program next
reads the device, which tells nothing; but it has begun more steps than the rank it waits for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from selfdistill.data.files import fresh
from selfdistill.engine.runtime.preemption import AGAIN

#: Waiting in these says that the rank waits for others.
_COLLECTIVE = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/comm/")


#: A rank that waits for its next batch gets so many times the limit.
_DATA_PATIENCE = 3

#: A rank whose sign of life has not changed for so many looks gives none any more.
_LOOKS = 4


class Watchdog:
    """Ends a rank that makes no progress.

    Args:
        folder: of the run; gets `.pulse/rank-00003.json` and, when a rank hangs, `hang-00003.txt`.
        rank: this process.
        world: number of ranks.
        seconds: without a beat until the end; 0 for no watch.
        leave: how to end the process (for tests).
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world: int,
        seconds: float,
        leave: Callable[[int], Any] = os._exit,
    ) -> None:
        self.folder, self.rank, self.world = folder, rank, world
        self.seconds, self.leave = seconds, leave
        self.where = "starting"
        self.begun = 0  # units of work that every rank begins, steps and batches scored
        self._last = time.monotonic()
        # Of each rank: what its clock said in its last sign, and what ours did when that was new.
        self._heard: dict[int, tuple[float, float]] = {}
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def interval(self) -> float:
        """Seconds between two looks: a hang is found at most so much later."""
        return min(30.0, self.seconds / 5)

    def start(self) -> None:
        """Begins to watch."""
        if self.seconds > 0 and self._thread is None:
            self.beat("starting")
            with contextlib.suppress(OSError):
                self._pulse(0, None)
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, where: str | None = None) -> None:
        """A sign of progress; cheap enough for every step.

        Args:
            where: the unit of work that begins, as on every rank; None within one.
        """
        self._last = time.monotonic()
        if where is not None:
            self.where = where
            self.begun += 1

    def stop(self) -> None:
        """Ends the watch, and removes this rank's sign of life."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            self._pulse_file(self.rank).unlink(missing_ok=True)

    def _pulse_file(self, rank: int) -> Path:
        return self.folder / ".pulse" / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        # Apart: the run's file system may be what hangs.
        pulsing = threading.Thread(target=self._pulsing, name="pulse", daemon=True)
        pulsing.start()
        while not self._over.wait(self.interval / 2):
            frame = sys._current_frames().get(self._main or 0)
            # Data may come slowly, and be asked for again and again, before that is an error.
            limit = self.seconds * (_DATA_PATIENCE if _waits_for_data(frame) else 1)
            silent = time.monotonic() - self._last
            # Some looks before the limit, so that by then it is known whose sign still changes.
            early = max(self.interval, limit - (_LOOKS + 1) * self.interval)
            pulses = self._pulses() if silent > early else {}
            waits = self._waits(frame, pulses) and self._someone_works(pulses)
            if silent > limit and not waits:
                self._end(silent, frame)
                return
        pulsing.join(self.interval)  # or what it is about to write would stay after `stop`

    def _pulsing(self) -> None:
        while not self._over.wait(self.interval):
            silent = time.monotonic() - self._last
            with contextlib.suppress(OSError):  # a full disk is told where the run writes
                self._pulse(silent, sys._current_frames().get(self._main or 0))

    def _pulses(self) -> dict[int, dict[str, Any]]:
        """The ranks' signs of life, those that can be read in time."""
        found: dict[int, dict[str, Any]] = {}

        def look() -> None:
            for rank in range(self.world):
                with contextlib.suppress(OSError, ValueError):
                    found[rank] = json.loads(self._pulse_file(rank).read_text(encoding="utf-8"))

        _bounded(look, self.interval)
        pulses, now = dict(found), time.monotonic()
        for rank, pulse in pulses.items():
            if self._heard.get(rank, (None, 0))[0] != pulse["time"]:
                self._heard[rank] = pulse["time"], now
        return pulses

    def _age(self, rank: int) -> float:
        """Seconds since a rank's sign of life was new; hosts' clocks may differ by minutes."""
        return time.monotonic() - self._heard[rank][1]

    def _waits(self, frame: FrameType | None, pulses: dict[int, dict[str, Any]]) -> bool:
        """Whether this rank waits for others: in a collective, or since one is behind it."""
        behind = any(pulse["begun"] < self.begun for pulse in pulses.values())
        return behind or _in_collective(frame)

    def _someone_works(self, pulses: dict[int, dict[str, Any]]) -> bool:
        """Whether another rank makes progress, for which this one waits."""
        return any(
            self._age(rank) < _LOOKS * self.interval
            and pulse["silent"] < self.seconds * (_DATA_PATIENCE if pulse.get("data") else 0.5)
            for rank, pulse in pulses.items()
        )

    def _pulse(self, silent: float, frame: FrameType | None) -> None:
        file = self._pulse_file(self.rank)
        file.parent.mkdir(exist_ok=True)
        draft = file.with_suffix(".tmp")
        content = {
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "silent": round(silent, 1),
            "where": self.where,
            "begun": self.begun,
            "at": _innermost(frame),
            "waits": _in_collective(frame),
            "data": _waits_for_data(frame),
        }
        with fresh(draft) as written:
            json.dump(content, written)
        os.replace(draft, file)

    def _end(self, silent: float, frame: FrameType | None) -> None:
        dump = self.folder / f"hang-{self.rank:05d}.txt"
        lines = [
            f"error: rank {self.rank} on {socket.gethostname()}: no progress for {silent:.0f} s"
            f" (--watchdog {self.seconds:g}) in {self.where}, at {_innermost(frame)}"
        ]
        hung: list[str] = []

        def tell() -> None:
            with fresh(dump) as file:
                file.write(lines[0] + "\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            lines.append(f"all threads' stacks: {dump}")
            if trace := _last_collectives():
                record = dump.with_name(f"hang-{self.rank:05d}-nccl.json")
                with fresh(record, "wb") as written:
                    written.write(trace)
                lines.append(f"NCCL's last collectives: {record}")
            # Others look a little earlier or later: what they have to say must be there, and they
            # must have left theirs before this process's end takes them along.
            time.sleep(2 * self.interval)
            hung.extend(self.suspects())

        if not _bounded(tell, 2 * self.interval + 20):
            lines.append(f"{self.folder} cannot be written either")
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        if self.rank == 0 or not self._waits(frame, self._pulses()):
            lines += [f"{line}: that is where to look" for line in hung]
            print("; ".join(lines), file=sys.stderr, flush=True)
        self.leave(AGAIN)

    def suspects(self) -> list[str]:
        """The ranks that others wait for: stopped, dead, behind the others, or in no collective."""
        found, pulses = [], self._pulses()
        most = max((pulse["begun"] for pulse in pulses.values()), default=0)
        apart = any(pulse["begun"] < most for pulse in pulses.values())
        for rank in range(self.world):
            pulse = pulses.get(rank)
            if pulse is None:
                found.append(f"rank {rank} left no sign of life")
                continue
            name = f"rank {rank} on {pulse['host']} (pid {pulse['pid']})"
            age = self._age(rank)
            if age > _LOOKS * self.interval:
                since = f"for at least {age:.0f} s, in {pulse['where']}"
                found.append(f"{name} has given no sign of life {since}")
            elif pulse["begun"] < most if apart else not pulse["waits"]:
                behind = f", {most - pulse['begun']} behind" if apart else ""
                found.append(f"{name} is at {pulse['at']}, in {pulse['where']}{behind}")
        return found


def _bounded(action: Callable[[], None], seconds: float) -> bool:
    """Does something that a hung file system may never finish; whether it was finished."""
    done: list[bool] = []

    def act() -> None:
        with contextlib.suppress(OSError):
            action()
            done.append(True)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(done)


def _last_collectives() -> bytes | None:
    """What torch's flight recorder has of this process, JSON; None where there is no NCCL."""
    from torch._C import _distributed_c10d as torchs

    dump = getattr(torchs, "_dump_nccl_trace_json", None)
    trace: bytes | None = None
    if dump is not None:
        with contextlib.suppress(RuntimeError):
            trace = dump()
    # Without a collective of NCCL it says no more than its version.
    return trace if trace and b"collective_seq_id" in trace else None


def _waits_for_data(frame: FrameType | None) -> bool:
    return any(f.f_code.co_filename.endswith("data/loading/batches.py") for f in _stack(frame))


def _stack(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _in_collective(frame: FrameType | None) -> bool:
    """Whether the innermost calls wait for other ranks."""
    return any(
        any(part in f.f_code.co_filename for part in _COLLECTIVE)
        or (f.f_code.co_name == "_finish" and f.f_code.co_filename.endswith("preemption.py"))
        for f in _stack(frame)[:6]
    )


def _innermost(frame: FrameType | None) -> str:
    """File, line and function of the innermost call of this project's own code."""
    root = str(Path(__file__).resolve().parents[2])
    for f in _stack(frame):
        name = os.path.realpath(f.f_code.co_filename)
        if name.startswith(root) and "/.venv/" not in name:
            return f"{name[len(root) + 1 :]}:{f.f_lineno} ({f.f_code.co_name})"
    return "no place in this program"
