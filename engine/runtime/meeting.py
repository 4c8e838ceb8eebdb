"""How the ranks of a launch come together: told while it lasts, and left at a signal.

torch's own way waits in C++, for half an hour, without a word and deaf to signals. Here it waits in
a thread; the process's main thread tells every 15 seconds who is missing, and leaves when asked.
"""

from __future__ import annotations

import hashlib
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import PrefixStore, TCPStore

from selfdistill.data.cli import format_error
from selfdistill.data.errors import TryAgain, UserError
from selfdistill.engine.runtime import preemption
from selfdistill.engine.runtime.failures import lost_peer
from selfdistill.engine.runtime.rendezvous import free_port, in_step

#: How long ranks wait for each other, at the start and in a collective.
PATIENCE = timedelta(minutes=30)

#: Seconds between two lines about what is waited for.
EVERY = 15.0

#: A name that no server knows by then is taken for a wrong one.
_NAME_SECONDS = 10.0

#: Missing ranks that are named.
_NAMED = 8


class Meeting:
    """The ranks of one launch, at the place that their environment names.

    Args:
        env: as `engine.runtime.rendezvous.resolve` gives it, within the process's own.
        every: seconds between two lines.
    """

    def __init__(self, env: Mapping[str, str], every: float = EVERY) -> None:
        self.env, self.every = env, every
        self.rank, self.world = int(env["RANK"]), int(env["WORLD_SIZE"])
        self.place = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        self._waits_for = "the others"

    def hold(self, then: Callable[[Any], None]) -> None:
        """Meets, then calls `then(store)`, which may wait for the others, too.

        Args:
            then: what all ranks do together; its store is of this launch alone, whoever else came
                to the same port.

        Raises:
            UserError: the address has no such name.
            TryAgain: the port is taken, or the ranks do not find each other in time.
            preemption.Preempted: a signal asked this process to leave.
        """
        if self.world > 1:
            self._resolve_name()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                store = self._gather()
                self._waits_for = (
                    f"all {self.world} ranks have come and connect to each other; if this lasts,"
                    " one of them has ended, or a firewall lies between the hosts"
                )
                then(store)
            except BaseException as error:  # raised again in the main thread
                failures.append(error)

        thread = threading.Thread(target=work, name="meeting", daemon=True)
        thread.start()
        self._attend(thread)
        if failures:
            raise self._told(failures[0]) from failures[0]

    def _attend(self, thread: threading.Thread) -> None:
        """Waits for the thread; tells what it waits for."""
        begun = reported = time.monotonic()
        # On each node one rank tells that it does not reach rank 0, and beside rank 0 one more.
        tells = int(self.env["LOCAL_RANK"]) == 0 or self.rank == 1
        while thread.is_alive():
            thread.join(0.02 if time.monotonic() < begun + 1 else 0.2)
            if preemption.asked():
                raise preemption.Preempted("the start, before all ranks had come")
            now = time.monotonic()
            if tells and now > reported + self.every:
                reported = now
                print(  # in one piece, as `terminal.say`
                    f"rank {self.rank} of {self.world}, {now - begun:.0f} s: {self._waits_for}\n",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )

    def _resolve_name(self) -> None:
        """Whether the address has a name that is known: torch would ask for it for half an hour."""
        end = time.monotonic() + _NAME_SECONDS
        while True:
            try:
                socket.getaddrinfo(self.env["MASTER_ADDR"], None)
                return
            except OSError as error:
                if preemption.asked():
                    raise preemption.Preempted("the start") from None
                if time.monotonic() > end:
                    raise UserError(
                        f"{socket.gethostname()} does not know {self.env['MASTER_ADDR']}, at which"
                        f" the ranks are to meet ({format_error(error)}): {self._address()}"
                    ) from None
            time.sleep(0.5)

    def _gather(self) -> Any:
        """The store of this launch, once all ranks have come to it."""
        host, port = self.env["MASTER_ADDR"], int(self.env["MASTER_PORT"])
        serves = self.rank == 0 and self.env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            self._waits_for = f"waiting for rank 0 at {self.place}, where nobody answers yet"
        if serves and self.world == 1:
            port = 0  # nobody else comes: whichever is free at this moment
        store = TCPStore(
            host,
            port,
            self.world,
            serves,
            PATIENCE,
            wait_for_workers=False,
            multi_tenant=True,
        )
        token = launch(self.env, sys.argv[1:])
        store.set(f"launch/{self.rank}", token)
        ours = PrefixStore(f"selfdistill/{token}", store)
        ours.set(f"here/{self.rank}", socket.gethostname())
        ours.add("arrived", 1)
        if self.rank == 0:
            self._await_all(store, ours, token)
            ours.set("all", "here")
        else:
            self._waits_for = f"rank 0 at {self.place} waits for others, and says for whom"
            ours.wait(["all"], PATIENCE)
        return ours

    def _await_all(self, store: Any, ours: Any, token: str) -> None:
        """Rank 0's part: until as many have come as there are ranks."""
        begun = looked = time.monotonic()
        while (come := ours.add("arrived", 0)) < self.world:
            now = time.monotonic()
            # Half a second before a line is due: a thousand questions take a moment.
            if now > looked + self.every / 2:
                looked = now
                missing = [r for r in range(self.world) if not ours.check([f"here/{r}"])]
                strangers = [
                    r
                    for r in missing[:_NAMED]
                    if store.check([f"launch/{r}"]) and store.get(f"launch/{r}") != token.encode()
                ]
                self._waits_for = self._missing(come, missing, strangers)
            if now > begun + PATIENCE.total_seconds():
                raise TryAgain(self._waits_for)
            time.sleep(0.05)

    def _missing(self, come: int, missing: Sequence[int], strangers: Sequence[int]) -> str:
        """A line about those who have not come."""
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        who = ", ".join(map(str, missing[:_NAMED])) + more
        line = f"{come} of {self.world} ranks have come to {self.place}; waiting for rank {who}"
        if strangers:
            line += (
                f"; rank {strangers[0]} of another launch came to this port: end that one, or"
                f" {self._port()}"
            )
        elif "SLURM_PTY_PORT" in self.env and in_step(self.env):
            line += (
                "; this shell is one task of `srun --pty`, which runs the command once: start it by"
                " srun, or unset SLURM_STEP_ID"
            )
        return line

    def _told(self, error: BaseException) -> BaseException:
        """A failure as the user should see it."""
        lost = isinstance(error, RuntimeError) and lost_peer(error)
        if not lost and not isinstance(error, OSError):
            return error
        reason = format_error(error)[:200]
        if "EADDRINUSE" in reason or "already in use" in reason:
            return TryAgain(
                f"port {self.env['MASTER_PORT']} of {socket.gethostname()}, at which the ranks are"
                f" to meet, is taken, by another run perhaps: {self._port()}"
            )
        if self.rank and re.search("closed|reset|broken pipe", reason, re.IGNORECASE):
            return TryAgain(
                f"rank 0 at {self.place} has ended before all had come: its message tells why"
            )
        return TryAgain(
            f"the {self.world} ranks cannot meet at {self.place} ({reason}): {self._address()}; or"
            f" {self._port()}"
        )

    def _port(self) -> str:
        """How another port is chosen under the launcher in use."""
        free = free_port()
        ways = {
            "deepspeed": f"deepspeed --master_port {free} engine/run.py ...",
            "torchrun": f"torchrun --master_port {free} engine/run.py ...",
            "srun": f"MASTER_PORT={free} srun ...",
        }
        return f"take a free one ({ways.get(launcher(self.env), f'MASTER_PORT={free}')})"

    def _address(self) -> str:
        """How another address is chosen under the launcher in use."""
        ways = {
            "deepspeed": "deepspeed --master_addr ADDRESS",
            "torchrun": "torchrun --master_addr ADDRESS",
            "srun": "MASTER_ADDR=ADDRESS srun ...; srun python -m launcher.doctor tests names",
        }
        way = ways.get(launcher(self.env), "MASTER_ADDR=ADDRESS")
        return f"give an address of rank 0's host that all hosts reach ({way})"


def launcher(env: Mapping[str, str]) -> str:
    """What started this process: deepspeed, torchrun or srun; "" for something else."""
    if "TORCHELASTIC_RUN_ID" in env:
        return "torchrun"
    if "LOCAL_SIZE" in env or "CROSS_RANK" in env:
        return "deepspeed"
    return "srun" if in_step(env) else ""


def launch(env: Mapping[str, str], argv: Sequence[str]) -> str:
    """A name that the ranks of a launch share, and those of another, at the same port, do not.

    Args:
        env: of the process.
        argv: its arguments; that of DeepSpeed's launcher, another for each rank, does not count.
    """
    names = ("WORLD_SIZE", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    elastic = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    values = [env.get(name, "") for name in (*names, *elastic)]
    values += [word for word in argv if not word.startswith("--local_rank")]
    return hashlib.sha256("\0".join(values).encode("utf-8", "replace")).hexdigest()[:16]
