"""Who am I among the processes, and where do they meet: from the launcher's environment.

Four ways to be started, one result: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, as torch.distributed reads them. The launchers `deepspeed` and `torchrun` set them
themselves; under `srun` they come from SLURM's variables, without ssh, pdsh or MPI; without any of
these the process is alone.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
from collections.abc import Mapping

from selfdistill.data.errors import UserError

#: Ports that ranks meet at: above the well-known ones, below those that Linux gives to connections.
_FIRST_PORT, _PORTS = 12_000, 20_000


def resolve(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """torch.distributed's variables for this process.

    Args:
        environment: of the process; by default its own.

    Returns:
        RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    Raises:
        UserError: the environment is incomplete.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env:
        return _checked(_from_launcher(env))
    if in_step(env):
        return _checked(from_slurm(env))
    return _alone()


def _checked(found: dict[str, str]) -> dict[str, str]:
    """The same; refuses what is no number, or no rank of so many, or no port."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if not re.fullmatch("[0-9]{1,9}", found[name]):
            raise UserError(f"{name} is {found[name]!r}, no number: correct it, or unset it")
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise UserError(
            f"RANK is {found['RANK']} of WORLD_SIZE {found['WORLD_SIZE']}: ranks begin at 0; start"
            " with deepspeed, torchrun or srun, or unset both to run one process"
        )
    if not 0 < int(found["MASTER_PORT"]) < 2**16:
        raise UserError(f"MASTER_PORT is {found['MASTER_PORT']}: give a port, from 1 to 65535")
    return found


def in_step(env: Mapping[str, str]) -> bool:
    """Whether `srun` started this process.

    The shell of a batch script has SLURM's variables of the job, too, and runs once: only a step
    has a number. (That of `salloc` and `srun --pty bash` is a step of its own, of one task.)
    """
    return env.get("SLURM_STEP_ID", "").isdigit() and "SLURM_PROCID" in env


def of_step(env: Mapping[str, str]) -> bool:
    """Whether this rank is a task of `srun`, and none of a launcher that a task started.

    Args:
        env: of the process; what its launcher says wins, as in `resolve`.
    """
    if not in_step(env):
        return False
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    rank, world = env.get("RANK", env["SLURM_PROCID"]), env.get("WORLD_SIZE", tasks)
    return (rank, world) == (env["SLURM_PROCID"], tasks)


def from_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of a process that `srun` started: one task is one rank.

    The ranks meet on the first host of the step. MASTER_ADDR and MASTER_PORT, where set, win.

    Raises:
        UserError: a variable of SLURM's is missing.
    """
    needed = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST")
    missing = [name for name in needed if name not in env]
    if missing:
        raise UserError(
            f"started by srun, but {', '.join(missing)} is not set: srun --export=ALL passes it on"
        )
    here = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))
    node = int(env.get("SLURM_NODEID", "0"))
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_WORLD_SIZE": str(here[min(node, len(here) - 1)]),
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": env.get("MASTER_PORT") or str(slurm_port(env)),
    }


def slurm_port(env: Mapping[str, str]) -> int:
    """The port at which the ranks of a step meet: another for each job, step and restart."""
    number = 0
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"):
        value = env.get(name, "0")
        number = 31 * number + (int(value) if value.isdigit() else 0)
    return _FIRST_PORT + number % _PORTS


def first_host(nodelist: str) -> str:
    """The first host of SLURM's short notation: node7 of "node[7-9,12],gpu3".

    `scontrol show hostnames` does the same where it is installed; in a container it often is not.
    """
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _tasks_per_node(notation: str) -> list[int]:
    """Tasks of each node of SLURM's short notation: [2, 2, 1] of "2(x2),1"."""
    found: list[int] = []
    for part in notation.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is {notation!r}: not SLURM's notation")
        found += [int(match[1])] * int(match[2] or 1)
    return found


def _from_launcher(env: Mapping[str, str]) -> dict[str, str]:
    missing = [k for k in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in env]
    if missing:
        raise UserError(
            f"RANK is set but {', '.join(missing)} is not: start with deepspeed, torchrun or srun, "
            "or unset RANK to run one process"
        )
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: env[name] for name in names} | {
        "LOCAL_RANK": env.get("LOCAL_RANK", "0"),
        # DeepSpeed's launcher calls it LOCAL_SIZE.
        "LOCAL_WORLD_SIZE": env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", env["WORLD_SIZE"])),
    }


def free_port() -> int:
    """A port of this machine that nobody listens on.

    None that the system gives to connections: one of them could take it in the seconds until the
    first rank listens.
    """
    chance = random.SystemRandom()  # not the global generator, which is seeded
    while True:
        port = chance.randrange(_FIRST_PORT, _FIRST_PORT + _PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _alone() -> dict[str, str]:
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
