"""What goes wrong where ranks start: each launch says what is missing, and ends when it is told to.

Real launchers on loopback; srun's part is in tests/cluster. `make test-faults` runs all of it and
prints the table of docs/faults.md.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from selfdistill.data import pack
from selfdistill.engine.runtime.preemption import AGAIN
from tests.kit.launches import ROOT, environment, free_port, make_base, make_images

pytestmark = pytest.mark.multi


@dataclass
class Came:
    """What a launch printed, and how it ended."""

    launcher: str
    what: str
    said: str
    seconds: float
    code: int


TABLE: list[Came] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print("\n\n| launcher | what was done | what was printed | ended after | exit code |")
    print("|---|---|---|---|---|")
    for row in TABLE:
        said = row.said.replace("|", "\\|")
        print(f"| {row.launcher} | {row.what} | {said} | {row.seconds:.0f} s | {row.code} |")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("starts")
    make_base(root / "base")
    pack.pack(str(make_images(root / "images")), str(root / "shards"))
    return root


class Launch:
    """A launch of two steps, in a session of its own; its output goes to a file."""

    def __init__(self, root: Path, name: str, *head: str, **env: str) -> None:
        self.log = root / f"{name}.log"
        words = ["engine/run.py", "--stage", "pretrain", "--pretrain.steps", "2"]
        words += ["--pretrain.batch", "8", "--data", str(root / "shards")]
        words += ["--model", str(root / "base"), "--output", str(root / name)]
        self.began = time.monotonic()
        self._ranks: dict[int, psutil.Process] = {}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*(head or [sys.executable]), *words],
                cwd=ROOT,
                env=environment(**env),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def says(self, words: str, within: float = 200) -> str:
        """The first line with these words, once it is there."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            found = [line for line in self.log.read_text().splitlines() if words in line]
            if found:
                return found[0]
            time.sleep(0.1)
        raise AssertionError(f"{words!r} is not in: {self.log.read_text()}")

    def children(self) -> list[int]:
        """The ranks' processes; torchrun gives each a session of its own."""
        try:
            inner = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            inner = []
        for process in inner:
            with contextlib.suppress(psutil.Error):
                if "RANK" in process.environ() and "engine/run.py" in process.cmdline():
                    self._ranks[process.pid] = process
        return [pid for pid, process in self._ranks.items() if process.is_running()]

    def child(self, number: int) -> int:
        """The process of a rank, once it is there."""
        end = time.monotonic() + 200
        while time.monotonic() < end:
            self.children()
            for pid, process in self._ranks.items():
                if process.is_running() and process.environ()["RANK"] == str(number):
                    return pid
            time.sleep(0.05)
        raise AssertionError(f"there is no rank {number}")

    def ends(self, within: float = 200) -> int:
        """The exit code; nothing of the launch is left."""
        try:
            code = self.process.wait(within)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"it does not end: {self.log.read_text()}") from None
        end = time.monotonic() + 60
        while self.children():
            assert time.monotonic() < end, "a rank is left"
            time.sleep(0.1)
        # Launchers print tracebacks of their own.
        assert f'File "{ROOT}/engine' not in self.log.read_text(), self.log.read_text()
        return code

    def note(self, launcher: str, what: str, said: str) -> int:
        """A row of the table, once it has ended."""
        code = self.ends()
        TABLE.append(Came(launcher, what, said, time.monotonic() - self.began, code))
        return code


def rank(number: int, port: int, world: int = 2) -> dict[str, str]:
    return {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def taken() -> socket.socket:
    """A listening socket, as another run's."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("0.0.0.0", 0))
    listening.listen()
    return listening


@pytest.mark.parametrize("missing", [0, 1])
def test_who_is_missing_is_told_and_a_signal_ends_it(root: Path, missing: int) -> None:
    there = Launch(root, f"missing-{missing}", **rank(1 - missing, free_port()))
    words = "waiting for rank 1" if missing else "waiting for rank 0"
    said = there.says(words)
    there.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    assert there.ends() == AGAIN
    assert time.monotonic() - asked < 30  # the ranks are waited for half an hour
    there.note("none", f"rank {missing} of 2 never comes, then SIGTERM", said)


def test_two_ctrl_c_end_it_at_once(root: Path) -> None:
    there = Launch(root, "ctrl-c", **rank(0, free_port()))
    there.says("waiting for rank 1")
    there.process.send_signal(signal.SIGINT)
    said = there.says("interrupted (SIGINT) at the start, before all ranks had come")
    assert there.note("none", "rank 1 of 2 never comes, then Ctrl-C", said) == AGAIN


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_port_that_is_taken(root: Path, launcher: str) -> None:
    with contextlib.closing(taken()) as listening:
        port = str(listening.getsockname()[1])
        head = {
            "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", port],
            "torchrun": ["torchrun", "--nproc_per_node=2", f"--master_port={port}"],
        }[launcher]
        there = Launch(root, f"taken-{launcher}", *head)
        if launcher == "torchrun":  # its own agent takes the port before any rank is there
            there.process.wait(200)
            assert "already in use" in there.log.read_text()
            return
        said = there.says("error: port ")
        assert "take a free one (deepspeed --master_port " in said
        # DeepSpeed's launcher makes 1 of every failure.
        assert there.note(launcher, "the port is taken", said) != 0


def test_a_name_that_nobody_knows(root: Path) -> None:
    there = Launch(root, "name", **rank(0, free_port()) | {"MASTER_ADDR": "no-such-host.invalid"})
    said = there.says("error: ")
    assert "does not know no-such-host.invalid" in said
    assert there.note("none", "a name that does not resolve", said) == 2


def test_numbers_that_are_none(root: Path) -> None:
    for change, words in (
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', no number"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000: give a port"),
        ({"RANK": "2"}, "RANK is 2 of WORLD_SIZE 2: ranks begin at 0"),
    ):
        there = Launch(root, "numbers", **rank(0, free_port()) | change)
        said = there.says("error: ")
        assert words in said
        assert there.note("none", "`{}={}`".format(*next(iter(change.items()))), said) == 2


@pytest.mark.faults
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_rank_that_dies_as_it_starts(root: Path, launcher: str) -> None:
    head = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--nproc_per_node=2", f"--master_port={free_port()}"],
    }[launcher]
    there = Launch(root, f"dies-{launcher}", *head)
    there.child(0)
    os.kill(there.child(1), signal.SIGKILL)
    code = there.note(launcher, "rank 1 is killed while it imports", _last(there))
    assert code != 0
    TABLE[-1].said = _last(there)


@pytest.mark.faults
def test_two_launches_at_one_port(root: Path) -> None:
    """A rank of the second does not join the first, whose own comes later; then it goes on."""
    port = free_port()
    first = Launch(root, "first", **rank(0, port))
    first.says("waiting for rank 1")
    stranger = Launch(root, "second", **rank(1, port))
    said = first.says("of another launch came to this port")
    stranger.process.send_signal(signal.SIGTERM)
    assert stranger.ends() == AGAIN
    mate = Launch(root, "first", **rank(1, port))
    assert mate.ends() == 0
    assert first.note("none", "a rank of another launch comes to the port, then its own", said) == 0


@pytest.mark.faults
def test_ctrl_c_under_deepspeed(root: Path) -> None:
    """A terminal sends it to all; DeepSpeed's launcher makes 1 of every end but a good one."""
    there = Launch(
        root, "launcher", "deepspeed", "--num_gpus", "2", "--master_port", f"{free_port()}"
    )
    there.child(1)
    time.sleep(2)
    os.killpg(there.process.pid, signal.SIGINT)
    assert there.note("deepspeed", "Ctrl-C while its ranks import", "") != 0
    TABLE[-1].said = _last(there)


def _last(launch: Launch) -> str:
    """The last line of the run's own, or of its launcher."""
    lines = [line for line in launch.log.read_text().splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(("error:", "interrupted"))]
    return (ours or lines or [""])[-1]
