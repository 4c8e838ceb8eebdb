"""`python -m launcher.doctor` on several nodes: the port, the shared folder, SLURM's variables."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from selfdistill.data.errors import UserError
from selfdistill.engine.runtime import rendezvous
from selfdistill.launcher.doctor import nodes, shared
from selfdistill.launcher.doctor.nodes import Task
from tests.kit.launches import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def port() -> int:
    """One that is free now, and that the system gives to no connection of another test."""
    return free_port()


def pair(port: int, rank: int) -> Task:
    return Task(rank, 2, ("localhost", "elsewhere"), "localhost", port, "7.0.0")


# The port


def test_a_port_that_is_free_or_taken(port: int) -> None:
    me = Task(0, 1, ("here",), "here", port, "")
    assert nodes.alone(me).state == "ok"
    with socket.create_server(("127.0.0.1", port)):
        line = nodes.alone(me)
        assert (line.state, str(port) in line.found) == ("FAILED", True)
        assert "MASTER_PORT" in line.cure
        (line,) = nodes.listen(pair(port, 0), 1)
        assert (line.state, f"port {port} of localhost" in line.found) == ("FAILED", True)
    assert nodes.alone(Task(0, 1, ("here",), "here", 70_000, "")).state == "FAILED"


def test_tasks_that_do_not_reach_one_another(port: int) -> None:
    (line,) = nodes.listen(pair(port, 0), 0.2)
    assert (line.state, "was not called by elsewhere" in line.found) == ("FAILED", True)
    (line,) = nodes.call(pair(port, 1), 0.2)
    assert line.state == "FAILED"
    assert f"localhost:{port} cannot be reached: Connection refused" in line.found
    assert "NCCL_SOCKET_IFNAME" in line.cure
    unknown = Task(1, 2, ("a", "b"), "no-such-host.invalid", port, "7.0.0")
    (line,) = nodes.call(unknown, 0.2)
    assert (line.state, "no-such-host.invalid has no address" in line.found) == ("FAILED", True)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b'{"heard": "x"}\n', b"[]\n"])
def test_another_program_at_the_port(port: int, answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.makefile("rb").readline()
                connection.sendall(answer)

        pool.submit(serve)
        (line,) = nodes.call(pair(port, 1), 0)
    assert (line.state, "another program answers" in line.found) == ("FAILED", True)


@pytest.mark.parametrize(
    ("ahead", "state", "said"),
    [
        (0.0, "ok", "all within 0."),
        (-60.0, "warning", "elsewhere is 60.0 s behind that of localhost"),
        (60.0, "warning", "elsewhere is 60.0 s ahead of that of localhost"),
    ],
)
def test_clocks_and_strangers(port: int, ahead: float, state: str, said: str) -> None:
    """A stranger's words and another job's task are passed over."""
    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(nodes.listen, pair(port, 0), 20)
        message = {"job": "7.0.0", "rank": 1, "nonce": "n", "time": 0.0}
        for words in (b"GET /\n", b"", json.dumps(message | {"job": "6.0.0"}).encode() + b"\n"):
            _say(port, words)
        message["time"] = time.time() + ahead
        assert json.loads(_say(port, json.dumps(message).encode() + b"\n"))["heard"] == "n"
        reached, clocks = listening.result()
    assert reached.state == "ok"
    assert clocks.state == state
    # What a loaded machine needs to answer counts, too.
    assert said in re.sub(r"(59|60)\.\d", "60.0", clocks.found)


def _say(port: int, words: bytes) -> bytes:
    for _ in range(100):
        try:
            with socket.create_connection(("localhost", port), timeout=10) as connection:
                connection.sendall(words)
                connection.shutdown(socket.SHUT_WR)
                return connection.makefile("rb").readline()
        except ConnectionRefusedError:  # not listening yet
            time.sleep(0.05)
    raise AssertionError("nobody listens")


# SLURM's variables


@pytest.mark.parametrize(
    ("short", "names"),
    [
        ("login", ["login"]),
        ("a,b-1", ["a", "b-1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[08-10,12]x,m", ["n08x", "n09x", "n10x", "n12x", "m"]),
        ("r[1-2]n[3-4]", ["r1n3", "r1n4", "r2n3", "r2n4"]),
    ],
)
def test_host_names(short: str, names: list[str]) -> None:
    assert nodes.expand(short) == names


def test_who_this_process_is() -> None:
    step = {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_ID": "3",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "100",
    }
    port = int(rendezvous.from_slurm(step)["MASTER_PORT"])  # the run's own rule
    assert nodes.task(step) == Task(1, 2, ("n1", "n2"), "n1", port, "100.3.0")
    assert nodes.task(step).host(1) == "n2"
    told = {"MASTER_PORT": "29400", "MASTER_ADDR": "10.0.0.1", "SLURM_RESTART_COUNT": "2"}
    again = nodes.task(step | told)
    assert (again.address, again.port, again.job) == ("10.0.0.1", 29400, "100.3.2")
    crowded = nodes.task(step | {"SLURM_STEP_NUM_TASKS": "16"})
    assert crowded.host(1) == "task 1"  # not one a node: nobody knows which
    batch = {k: v for k, v in step.items() if "STEP" not in k} | {"SLURM_NTASKS": "2"}
    assert nodes.task(batch).tasks == 1
    assert nodes.task({}).port == 29500
    with pytest.raises(UserError, match="start with srun"):
        nodes.task(step | {"SLURM_PROCID": "first"})
    with pytest.raises(UserError, match="SLURM_STEP_NODELIST is not set"):
        nodes.task({k: v for k, v in step.items() if k != "SLURM_STEP_NODELIST"})


# Two nodes


def start(rank: int, port: int, output: Path, *more: str) -> subprocess.Popen[str]:
    slurm = {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost,elsewhere",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "launcher.doctor", "--output", str(output), *more],
        cwd=ROOT,
        env=os.environ | slurm | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ends(*tasks: subprocess.Popen[str]) -> Iterator[tuple[int, str]]:
    for one in tasks:
        said, _ = one.communicate(timeout=180)
        yield one.returncode, said


def test_two_nodes_with_one_folder(tmp_path: Path, port: int) -> None:
    output = tmp_path / "runs" / "x"
    (code, said), (other_code, other) = ends(start(0, port, output), start(1, port, output))
    assert (code, other_code) == (0, 0), said + other
    assert all(line.startswith("localhost: ") for line in said.splitlines())
    assert f"ok       port: localhost:{port} is reached by every other node (1)" in said
    assert f"ok       shared folder: {output} is one for all 2 nodes" in said
    assert "ok       versions: Python and " in said
    assert "ok       clocks: all within " in said
    assert "ok       sum over gloo: 2 of 2 tasks" in said
    assert not re.search(" ok ", other)
    assert not (tmp_path / "runs").exists()  # nothing is left behind


def test_two_nodes_with_folders_of_their_own(tmp_path: Path, port: int) -> None:
    (tmp_path / "b").mkdir()
    first = start(0, port, tmp_path / "a", "--timeout", "25")
    second = start(1, port, tmp_path / "b", "--timeout", "25")
    (code, said), (other_code, other) = ends(first, second)
    assert (code, other_code) == (2, 2), said + other
    assert re.search("localhost: FAILED +shared folder: .* has no file of elsewhere after", said)
    assert re.search("elsewhere: FAILED +shared folder: .* has no file of localhost after", other)
    assert "Traceback" not in said + other
    assert [p.name for p in tmp_path.iterdir()] == ["b"]  # what was there stays, and is empty
    assert not list((tmp_path / "b").iterdir())


def test_nodes_with_other_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = iter([{"python": "3.11.9", "torch": "2.15.0"}, {"python": "3.11.9", "torch": "2.14.0"}])
    lock = threading.Lock()

    def versions() -> dict[str, str]:
        with lock:
            return next(given)

    monkeypatch.setattr(shared, "versions", versions)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(shared.share, pair(1, rank), tmp_path, 20) for rank in (0, 1)]
        first, second = (one.result() for one in both)
    assert [line.state for line in first] == ["ok", "FAILED"]
    assert "torch is 2.1" in first[1].found
    assert "python" not in first[1].found
    assert [line.state for line in second] == ["ok"]


def test_a_shared_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = shared.share(pair(1, 0), tmp_path / "file" / "x", 1)
    assert (line.state, "is not a folder" in line.found) == ("FAILED", True)
