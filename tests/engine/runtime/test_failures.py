"""Whose a failure is: the user's (2), the machine's (75), another rank's (75), or our own (1)."""

import errno
import os
import subprocess

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from selfdistill.data.errors import PeerLost, TryAgain, UserError
from selfdistill.engine.runtime.distributed import Ranks, main_only
from selfdistill.engine.runtime.failures import explain, refused
from tests.kit.launches import ROOT, environment, free_port

GPU = torch.device("cuda", 1)

#: Words as torch 2.11 and NCCL 2.27 put them.
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:3699, {}, NCCL version 2.27.5\n{}"
USERS = [
    NCCL.format(
        "invalid usage (run with NCCL_DEBUG=WARN for details)",
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n"
        "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
    ),
    NCCL.format("invalid usage", "ncclInvalidUsage: This usually reflects invalid usage"),
    NCCL.format("invalid argument", "ncclInvalidArgument: Invalid value for an argument."),
    NCCL.format(
        "unhandled cuda error",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\n"
        "Cuda failure 2 'out of memory'",
    ),
]
MACHINES = [
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: uncorrectable NVLink error detected during the execution",
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable",
    "CUDA error: unknown error (Xid 79: GPU has fallen off the bus)",
]
GONE = [
    NCCL.format(
        "remote process exited or there was a network error",
        "ncclRemoteError: A call failed possibly due to a network error",
    ),
    NCCL.format("unhandled system error", "ncclSystemError: System call (e.g. socket) failed"),
]


def test_nccls_own_mistakes_are_no_lost_peers() -> None:
    for words in USERS:
        found = explain(dist.DistBackendError(words), 2, GPU)
        assert isinstance(found, UserError), words
        assert not isinstance(found, TryAgain), words
        assert "\n" not in str(found)
    assert "same GPU" in str(explain(dist.DistBackendError(USERS[0]), 2, GPU))
    assert "smaller batch" in str(explain(dist.DistBackendError(USERS[3]), 2, GPU))
    full = RuntimeError("CUDA error: out of memory")
    assert "smaller batch" in str(explain(full, 1, GPU))


def test_a_broken_device_is_the_machines() -> None:
    kind = getattr(torch, "AcceleratorError", RuntimeError)
    for words in MACHINES:
        found = explain(kind(words), 1, GPU)
        assert isinstance(found, TryAgain), words
        assert not isinstance(found, PeerLost)
        assert "cuda:1 of" in str(found)
        assert "--exclude=" in str(found)


def test_a_lost_peer_is_one() -> None:
    for words in GONE:
        assert isinstance(explain(dist.DistBackendError(words), 2, GPU), PeerLost), words
    closed = RuntimeError("[pair.cc:553] Connection closed by peer [10.0.0.2]:1234")
    assert isinstance(explain(closed, 2, torch.device("cpu")), PeerLost)


def test_what_may_pass_on_rank_0_does_so_on_all(ranks: Ranks) -> None:
    def refuse(number: int) -> None:
        raise OSError(number, os.strerror(number), "runs/x")

    with pytest.raises(TryAgain, match="runs/x: Stale file handle"):
        main_only(ranks, lambda: refuse(errno.ESTALE))
    with pytest.raises(UserError, match="the disk is full") as met:
        main_only(ranks, lambda: refuse(errno.ENOSPC))
    assert not isinstance(met.value, TryAgain)


def test_safetensors_tells_the_number_in_words() -> None:
    words = "Error while serializing: I/O error: {} (os error {})"
    passing = refused(SafetensorError(words.format("Input/output error", errno.EIO)), "not saved")
    assert isinstance(passing, TryAgain)
    assert str(passing) == "not saved"
    full = refused(SafetensorError(words.format("No space left on device", errno.ENOSPC)))
    assert not isinstance(full, TryAgain)
    assert "No space left" in str(full)


def test_a_fault_of_ours_is_none_of_these() -> None:
    for words in ("CUDA error: device-side assert triggered", "shape '[3]' is invalid for input"):
        assert explain(RuntimeError(words), 2, GPU) is None
    # No word of CUDA's: a tensor operation that was called wrongly.
    assert explain(RuntimeError("invalid argument 2: wrong size"), 2, GPU) is None


#: engine/run.py with a fault in it, and something that holds up Python's end, as NCCL may (a fake).
FAULT = """
import os, runpy, sys, threading, time
sys.argv = ["engine/run.py", "--output", sys.argv[1]]
sys.path.insert(0, os.getcwd())
from selfdistill.engine.checkpoints import folder
opened = folder.open_run
def wrong(settings, ranks):
    run = opened(settings, ranks)
    threading.Thread(target=time.sleep, args=(600,)).start()
    if run.ranks.rank == 1:
        raise LookupError("a fault of ours")
    run.boundary("waits for the other", wait=True)
folder.open_run = wrong
runpy.run_path("engine/run.py", run_name="__main__")
"""


@pytest.mark.multi
def test_an_unexpected_exception_leaves_at_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("fault")
    (folder / "fault.py").write_text(FAULT)
    words = ["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = subprocess.run(
        [*words, str(folder / "fault.py"), str(folder / "run")],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,  # half of what holds up Python's end
    )
    assert "LookupError: a fault of ours" in done.stderr
    # torchrun names the first that failed: not the other rank, which would ask to be put back.
    assert "exitcode  : 1 " in done.stderr
