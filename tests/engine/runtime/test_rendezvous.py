"""The process group's variables from each launcher's environment; real launches stand elsewhere."""

import shutil
import socket
import subprocess

import pytest

from selfdistill.data.errors import UserError
from selfdistill.engine.runtime.meeting import Meeting
from selfdistill.engine.runtime.rendezvous import (
    first_host,
    free_port,
    from_slurm,
    in_step,
    resolve,
    slurm_port,
)

#: As srun sets them for the fourth of five tasks on three nodes.
TASK = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_NODELIST": "node[07-08,12]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
}


def test_a_task_of_srun_is_a_rank() -> None:
    found = resolve(TASK)
    assert {k: found[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")} == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "5",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert found["MASTER_ADDR"] == "node07"
    assert 12_000 <= int(found["MASTER_PORT"]) < 32_000
    last = resolve(TASK | {"SLURM_PROCID": "4", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"})
    assert last["LOCAL_WORLD_SIZE"] == "1"
    assert last["MASTER_PORT"] == found["MASTER_PORT"]


def test_the_users_own_address_and_port_win() -> None:
    found = resolve(TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "4711")


def test_each_job_step_and_restart_meets_at_another_port() -> None:
    changes: list[dict[str, str]] = [
        {},
        {"SLURM_JOB_ID": "1235"},
        {"SLURM_STEP_ID": "1"},
        {"SLURM_RESTART_COUNT": "1"},
    ]
    assert len({slurm_port(TASK | change) for change in changes}) == len(changes)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node[1-4]", "node1"),
        ("node[003,007-9]", "node003"),
        ("a7,b[1-2]", "a7"),
        ("rack[2-3]n[10-12],login", "rack2n10"),
        ("gpu-[5]-ib,gpu-7-ib", "gpu-5-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host
    if shutil.which("scontrol"):  # it expands without a cluster
        words = ["scontrol", "show", "hostnames", nodelist]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            assert done.stdout.split()[0] == host


def test_torchrun_and_deepspeed_come_before_slurm() -> None:
    """Inside a job they set RANK themselves."""
    launcher = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    found = resolve(TASK | launcher)
    assert found == launcher | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}


def test_the_shell_of_a_batch_script_is_alone() -> None:
    shell = {k: v for k, v in TASK.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert not in_step(shell)
    assert resolve(shell)["WORLD_SIZE"] == "1"
    assert not in_step(shell | {"SLURM_STEP_ID": "batch"})


def test_alone() -> None:
    found = resolve({})
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")
    assert int(found["MASTER_PORT"]) > 0


def test_a_free_port_is_none_that_a_connection_takes() -> None:
    """Linux gives connections those from 32,768 on, unless it is told otherwise."""
    assert all(1024 < free_port() < 32_768 for _ in range(50))


def test_one_process_needs_no_certain_port() -> None:
    found = resolve({})
    met: list[object] = []
    with socket.create_server(("", int(found["MASTER_PORT"]))):
        Meeting(found).hold(met.append)
    assert met


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT is not"):
        resolve({"RANK": "0", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        from_slurm({k: v for k, v in TASK.items() if k != "SLURM_LOCALID"})
    with pytest.raises(UserError, match="not SLURM's notation"):
        resolve(TASK | {"SLURM_STEP_TASKS_PER_NODE": "two"})
