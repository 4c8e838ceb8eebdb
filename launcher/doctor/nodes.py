"""The tasks of `srun --ntasks-per-node=1 python -m launcher.doctor`, and the port where they meet.

Task 0 listens on the port at which the ranks of a run would meet, and the others call it by its
host's name.
"""

import contextlib
import json
import os
import re
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.runtime import rendezvous
from selfdistill.launcher.doctor.checks import Line

#: Where the deepspeed launcher and torchrun let ranks meet unless told otherwise.
DEFAULT_PORT = 29500

#: Seconds that clocks may be apart: log lines and file times of nodes are compared by eye.
APART = 3.0

_NETWORK = (
    "let the firewall pass TCP between the nodes, or name the interface that they share"
    " (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)"
)


@dataclass(frozen=True)
class Task:
    """This process among those of the SLURM step; alone, rank 0 of one.

    Attributes:
        rank: its number.
        tasks: how many there are.
        hosts: names of the step's nodes.
        address: name or address of the one where ranks would meet, rank 0's.
        port: theirs there.
        job: a name that no other step has, nor this one after a requeue.
    """

    rank: int
    tasks: int
    hosts: tuple[str, ...]
    address: str
    port: int
    job: str

    def host(self, rank: int) -> str:
        """Name of a task's node."""
        # With one task a node they go over the nodes in order.
        return self.hosts[rank] if len(self.hosts) == self.tasks else f"task {rank}"


def expand(nodes: str) -> list[str]:
    """Host names of SLURM's short form: `a[01-02,7],b` are a01, a02, a7 and b."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        bracket = re.search(r"\[([^\]]*)\]", part)
        if bracket is None:
            names.append(part)
            continue
        for item in bracket[1].split(","):
            low, _, high = item.partition("-")
            for number in range(int(low), int(high or low) + 1):
                whole = part[: bracket.start()] + f"{number:0{len(low)}d}" + part[bracket.end() :]
                names += expand(whole)
    return names


def task(environ: Mapping[str, str] = os.environ) -> Task:
    """Who this process is, and where the ranks of a run started likewise would meet.

    Raises:
        UserError: a variable is missing or no number.
    """
    try:
        if not rendezvous.in_step(environ):
            port = int(environ.get("MASTER_PORT") or DEFAULT_PORT)
            return Task(0, 1, (socket.gethostname(),), socket.gethostname(), port, "")
        found = rendezvous.from_slurm(environ)
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        return Task(
            rank=int(found["RANK"]),
            tasks=int(found["WORLD_SIZE"]),
            hosts=tuple(expand(environ["SLURM_STEP_NODELIST"])),
            address=found["MASTER_ADDR"],
            port=int(found["MASTER_PORT"]),
            job=".".join(environ.get(name, "0") for name in names),
        )
    except ValueError as error:
        raise UserError(
            f"SLURM's variables or MASTER_PORT cannot be read ({error}): start with srun,"
            " or unset SLURM_STEP_ID to check this machine alone"
        ) from None


def _open(port: int) -> socket.socket:
    """A listening socket on all interfaces, as torch's store opens one."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be switched off; a port in use shows below
            return socket.create_server(
                ("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
    return socket.create_server(("", port), backlog=1024)


def _taken(me: Task, error: Exception) -> Line:
    cure = (
        "set MASTER_PORT (deepspeed and torchrun: --master_port) to a free one, or end what has it"
    )
    # Python adds the address to the system's words.
    reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else error
    found = f"port {me.port} of {me.address} cannot be opened: {reason}"
    return Line("FAILED", "port", found, cure)


def alone(me: Task) -> Line:
    """Whether the port is free and this machine knows its own name."""
    try:
        _open(me.port).close()
    except (OSError, OverflowError) as error:
        return _taken(me, error)
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        found = f"{me.port} is free, but the own name {name} has no address: {error.strerror}"
        cure = f"add its address in the network and '{name}' to /etc/hosts, as every node sees it"
        return Line("warning", "port", found, cure)
    return Line("ok", "port", f"{me.port} is free, the own name {name} has an address")


def listen(me: Task, timeout: float) -> list[Line]:
    """Task 0's side: waits at the port for every other task, and compares their clocks."""
    try:
        server = _open(me.port)
    except (OSError, OverflowError) as error:
        return [_taken(me, error)]
    ahead: dict[int, float] = {}
    until = time.monotonic() + timeout
    with server:
        while len(ahead) < me.tasks - 1 and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            # Anybody may call at an open port: what makes no sense is passed over.
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    message = json.loads(connection.makefile("rb").readline(1000))
                    now = time.time()
                    if message["job"] == me.job:
                        reply = {"job": me.job, "heard": message["nonce"]}
                        connection.sendall(json.dumps(reply).encode() + b"\n")
                        ahead[int(message["rank"])] = float(message["time"]) - now
    silent = [me.host(rank) for rank in range(1, me.tasks) if rank not in ahead]
    if silent:
        found = f"{me.address}:{me.port} was not called by {', '.join(silent)} in {timeout:.0f} s"
        lines = [Line("FAILED", "port", found, _NETWORK)]
    else:
        found = f"{me.address}:{me.port} is reached by every other node ({me.tasks - 1})"
        lines = [Line("ok", "port", found)]
    if ahead:
        rank = max(ahead, key=lambda r: abs(ahead[r]))
        seconds = f"{abs(ahead[rank]):.1f} s"
        if abs(ahead[rank]) > APART:
            side = "ahead of" if ahead[rank] > 0 else "behind"
            found = f"that of {me.host(rank)} is {seconds} {side} that of {me.address}"
            lines.append(Line("warning", "clocks", found, "let NTP (chrony) set them"))
        else:
            lines.append(Line("ok", "clocks", f"all within {seconds} of that of {me.address}"))
    return lines


def call(me: Task, timeout: float) -> list[Line]:
    """The other tasks' side: calls task 0 by its host name until it answers."""
    where = f"{me.address}:{me.port}"
    nonce = uuid.uuid4().hex
    until = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((me.address, me.port), timeout=5) as connection:
                message = {"job": me.job, "rank": me.rank, "nonce": nonce, "time": time.time()}
                connection.sendall(json.dumps(message).encode() + b"\n")
                reply = json.loads(connection.makefile("rb").readline(1000))
            if reply["heard"] == nonce:
                return [Line("ok", "port", f"{where} answers")]
            wrong = "another program answers"
        except socket.gaierror as error:
            found = f"the host name {me.address} has no address here: {error.strerror}"
            return [Line("FAILED", "port", found, "add the nodes to DNS or /etc/hosts")]
        except OSError as error:
            wrong = error.strerror or "no answer within 5 s"
        except (ValueError, KeyError, TypeError, OverflowError):
            wrong = "another program answers"
        if time.monotonic() > until:
            found = f"{where} cannot be reached: {wrong}"
            cure = f"{_NETWORK}; MASTER_PORT chooses another port"
            return [Line("FAILED", "port", found, cure)]
        time.sleep(0.5)


def add_up(me: Task, timeout: float) -> list[Line]:
    """Sums one number over all tasks as the ranks of a run do: over gloo, and over NCCL with GPUs.

    Args:
        me: this task; every one calls it.
        timeout: seconds to wait for the others.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    from selfdistill.engine.runtime.network import prefer_interface

    lines = []
    store: TCPStore | None = None
    patience = timedelta(seconds=timeout)
    env = {"MASTER_ADDR": me.address, "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": str(me.tasks)}
    for backend in ("gloo", "nccl") if torch.cuda.is_available() else ("gloo",):
        name = f"sum over {backend}"
        try:
            if store is None:  # one for both: it listens as long as it lives
                store = TCPStore(me.address, me.port, me.tasks, me.rank == 0, patience)
            prefer_interface(os.environ | env, store)
            dist.init_process_group(
                backend,
                store=PrefixStore(backend, store),
                rank=me.rank,
                world_size=me.tasks,
                timeout=patience,
            )
            one = torch.ones(1, device="cuda" if backend == "nccl" else "cpu")
            dist.all_reduce(one)
            found = f"{one.item():g} of {me.tasks} tasks"
            good = one.item() == me.tasks
            dist.destroy_process_group()
        except (RuntimeError, ValueError, OSError) as error:
            found, good = cli.format_error(error)[:200], False
        if not good:
            lines.append(Line("FAILED", name, found, _NETWORK))
            break
        if me.rank == 0:
            lines.append(Line("ok", name, found))
    return lines
