"""Which GPU a rank takes, what its environment says, where gloo listens. GPUs are fakes."""

import os
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist

from selfdistill.data.errors import UserError
from selfdistill.engine.runtime import devices, distributed, network
from selfdistill.engine.runtime.rendezvous import resolve

STEP = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
ALONE = STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
LAUNCHER = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


def shown(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """torch.cuda as a machine with so many visible GPUs has it (a fake)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("env", "count", "index"),
    [
        # srun: each task is shown one of its own, or all of the node's.
        (STEP, 1, 0),
        (STEP, 2, 1),
        (STEP | {"SLURM_GPUS_PER_TASK": "2"}, 2, 0),
        (STEP | {"SLURM_GPUS_PER_TASK": "a100:2"}, 2, 0),
        (STEP | {"SLURM_GPUS_PER_TASK": "1"}, 4, 1),  # and --gpu-bind=none
        # torchrun or deepspeed in a task, which has all of the node's.
        (ALONE | LAUNCHER | {"LOCAL_RANK": "1", "SLURM_GPUS_PER_TASK": "2"}, 2, 1),
        # A shared node: four of its eight are the job's.
        (STEP | {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 4, 1),
        # deepspeed --include localhost:4,5 and torchrun.
        (LAUNCHER | {"LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,5"}, 2, 1),
        (LAUNCHER | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 8, 1),
    ],
)
def test_the_device_of_a_rank(
    env: Mapping[str, str], count: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown(monkeypatch, count)
    assert devices.choose({**env, **resolve(env)}) == torch.device("cuda", index)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shown(monkeypatch, 1)
    env = LAUNCHER | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    with pytest.raises(UserError, match="local rank 1 has no GPU: this machine shows 1"):
        devices.choose(env)


@pytest.mark.parametrize("kind", ["xpu", "mps", "hpu", "npu"])
def test_other_accelerators_are_refused_by_name(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        type = kind

    shown(monkeypatch, 0)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", Found)
    with pytest.raises(UserError, match=f"of the kind '{kind}'.*DS_ACCELERATOR=cpu"):
        devices.choose(LAUNCHER | {"LOCAL_RANK": "0"})
    told = LAUNCHER | {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    assert devices.choose(told) == torch.device("cpu")


def test_rocm_is_cuda_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    shown(monkeypatch, 2)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert devices.choose(LAUNCHER | {"LOCAL_RANK": "1"}) == torch.device("cuda", 1)


def test_the_environment_says_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed reads LOCAL_RANK for the number of its device, whatever SLURM_LOCALID is."""
    shown(monkeypatch, 1)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)

    class Enough(Exception):
        """Nothing of CUDA can be done beyond."""

    def stop() -> None:
        raise Enough

    monkeypatch.setattr(distributed, "_share_cores", stop)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        with pytest.raises(Enough):
            distributed.initialize()
        assert os.environ["LOCAL_RANK"] == "0"
        assert os.environ["RANK"] == "3"
        assert os.environ["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert taken == [torch.device("cuda", 0)]


def test_two_ranks_of_one_gpu_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    store = dist.HashStore()
    devices.claim(store, 0, "GPU-aaaa")
    devices.claim(store, 1, "GPU-bbbb")
    with pytest.raises(UserError) as caught:
        devices.claim(store, 2, "GPU-bbbb")
    assert "ranks 1 and 2 on" in str(caught.value)
    assert "--gpus-per-node=2" in str(caught.value)
    assert "\n" not in str(caught.value)


# Cores


def test_deepspeeds_launcher_tells_the_ranks_of_a_node() -> None:
    env = LAUNCHER | {"LOCAL_RANK": "1", "WORLD_SIZE": "16", "LOCAL_SIZE": "2"}
    assert resolve(env)["LOCAL_WORLD_SIZE"] == "2"
    assert resolve(env | {"LOCAL_WORLD_SIZE": "4"})["LOCAL_WORLD_SIZE"] == "4"


def test_a_launchers_one_thread_becomes_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that compute on a CPU, and on a GPU those of DeepSpeed's CPUAdam."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for local_world, gpus, expected in (("2", 0, [3]), ("2", 2, [3]), ("1", 1, [6]), ("1", 0, [])):
        taken.clear()
        shown(monkeypatch, gpus)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local_world)
        distributed._share_cores()
        assert taken == expected, (local_world, gpus)


def test_ranks_of_a_launcher_in_a_task_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"SLURM_CPUS_PER_TASK": "64", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (ALONE | LAUNCHER | more).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert distributed.cores() == 32
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.cores() == 64


def test_one_core_a_task_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    assert "--cpus-per-task=8" in str(distributed.few_cores())
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert distributed.few_cores() is None
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert distributed.few_cores() is None


# Where gloo listens


def test_the_interface_that_reaches_an_address() -> None:
    assert network.address_towards("127.0.0.1") == "127.0.0.1"
    assert network.interface_of("127.0.0.1") == "lo"
    assert network.interface_of("192.0.2.1") is None  # of the addresses for documentation


def test_gloo_takes_the_interface_that_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first host the master's name is Debian's 127.0.1.1; the others' ranks tell the way."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    store = dist.HashStore()
    several = {"MASTER_ADDR": "node1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}
    ways = {"node1": "10.0.0.2", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(network, "address_towards", lambda host: ways[host])
    cards = {"10.0.0.1": "eth0", "10.0.0.2": "ib0"}
    monkeypatch.setattr(network, "interface_of", cards.get)
    network.prefer_interface(several, store)  # a rank of the second host
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "ib0"
    ways["node1"] = "127.0.1.1"
    network.prefer_interface(several, store)  # one of the first
    assert os.environ.pop("GLOO_SOCKET_IFNAME") == "eth0"
    # One host alone, and a user's own choice.
    network.prefer_interface(several | {"WORLD_SIZE": "2"}, store)
    network.prefer_interface(several | {"GLOO_SOCKET_IFNAME": "x"}, store)
    assert "GLOO_SOCKET_IFNAME" not in os.environ
