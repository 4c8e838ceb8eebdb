"""Leaving early, in three pieces: a signal sets a flag, the ranks agree on it, the loop saves.

SLURM sends the signal of `--signal=USR2@180` some minutes before the time limit, and SIGTERM when
it preempts, requeues or cancels a job. A terminal's Ctrl-C, or its end, asks for the same; a second
Ctrl-C leaves at once. Whatever asked, the run ends with exit code `AGAIN`, which the sbatch scripts
turn into a requeue; launching again continues.
"""

from __future__ import annotations

import os
import signal
import socket
from types import FrameType
from typing import Any

#: Exit code "interrupted, launch again and it goes on": EX_TEMPFAIL of sysexits.h.
AGAIN = os.EX_TEMPFAIL

_SIGNALS = (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_asked: list[int] = []


class Preempted(Exception):
    """The ranks agreed to leave. Raised at the same place on every rank."""


def listen() -> None:
    """From now on the signals set the flag instead of ending the process.

    Called as early as can be: before it, a signal kills, and the run continues from the checkpoint
    before.
    """
    for number in _SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _note)


def _note(number: int, _: FrameType | None) -> None:
    if number == signal.SIGINT and signal.SIGINT in _asked:
        raise KeyboardInterrupt
    _asked.append(number)


def asked() -> str | None:
    """The name of the first signal that asked this process to leave."""
    return signal.Signals(_asked[0]).name if _asked else None


#: Set where launches begin again in the same job: by SLURM, slurm/common.sh, torchrun.
_RESTARTS = ("SLURM_RESTART_COUNT", "SELFDISTILL_AGAIN", "TORCHELASTIC_RESTART_COUNT")


def restarted() -> bool:
    """Whether this launch goes on with what the same job began."""
    return any(int(os.environ.get(name) or 0) > 0 for name in _RESTARTS)


def job_of() -> str:
    """What launches of the same job have in common; "" where nothing starts them again."""
    if "SLURM_JOB_ID" in os.environ:
        return os.environ["SLURM_JOB_ID"]
    # torchrun's agent starts the ranks again, and stays.
    again = "TORCHELASTIC_RESTART_COUNT" in os.environ
    return f"{socket.gethostname()}-{os.getppid()}" if again else ""


#: Seconds of a hop over TCP, assumed.
HOP = 50e-6


def seconds(world: int) -> float:
    """Of one agreement: gloo's all-reduce goes round a ring, 2 (N - 1) hops."""
    return 2 * (world - 1) * HOP


def interval(world: int) -> int:
    """Steps between two agreements of so many ranks: 1 up to 64 ranks, 16 of a thousand.

    One takes 6 ms of 64 ranks, and 100 ms of a thousand, as long as a step, whose cores it shares:
    every 16 steps it stays at 6 ms a step.
    """
    return -(-world // 64)


class Agreement:
    """Whether any rank was asked to leave, as all ranks see it at the same time.

    One small all-reduce every `every` calls, on the CPU and in a group of its own. `poll` reads the
    result of the one before, so that no step waits for it: the ranks leave `every` steps later.

    Args:
        world: number of ranks. Every one makes the object, and makes the same calls.
    """

    def __init__(self, world: int) -> None:
        # Late: the signals are listened to before torch has been imported.
        import torch
        import torch.distributed as dist

        self.every, self._polls = interval(world), 0
        self.group: Any = dist.new_group(backend="gloo") if world > 1 else None
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: Any = None

    def poll(self) -> bool:
        """Whether a rank had been asked when the last call was made."""
        if self.group is None:
            return bool(_asked)
        self._polls += 1
        if self._polls % self.every:
            return False
        agreed = self._finish()
        self._begin()
        return agreed

    def ask(self) -> bool:
        """Whether a rank has been asked by now; waits for the answer."""
        if self.group is None:
            return bool(_asked)
        self._finish()
        self._begin()
        return self._finish()

    def _begin(self) -> None:
        import torch.distributed as dist

        self._flag.fill_(len(_asked))
        self._work = dist.all_reduce(
            self._flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True
        )

    def _finish(self) -> bool:
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag.item())
