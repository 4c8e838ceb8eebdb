"""A worker that the kernel kills: one clear line, soon, wherever the program stands."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from selfdistill.data.errors import WorkerLost
from selfdistill.data.loading.codec import Images
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.shards.manifest import Manifest
from tests.kit.launches import BIN, COMMON, ROOT, environment, make_world
from tests.kit.shards import uneven

SAID = (
    r"^a data loader worker \(pid {}\) was killed by the system \(SIGKILL\), most likely for lack"
)


class Slow(Images):
    """Takes long for each picture from the given number of batches on."""

    def __init__(self, seconds: float) -> None:
        super().__init__(4)
        self.seconds = seconds

    def decode(self, content: bytes, name: str) -> np.ndarray:
        time.sleep(self.seconds)
        return super().decode(content, name)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return uneven(tmp_path_factory.mktemp("data") / "train", [9, 8])


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch looks for dead workers once a minute, not every 5 s: what is soon seen, a signal told.

    So the bounds below may be so wide that no load of the machine reaches them.
    """
    look = _MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(look, "__defaults__", (60.0,))


def workers(of: int | None = None) -> list[int]:
    """The processes that this one (or another) has forked."""
    pid = of or os.getpid()
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(p) for p in text.split() if _python(int(p))]


def _python(pid: int) -> bool:
    try:
        return b"\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def until(met: Callable[[], Any], seconds: float = 100) -> Any:
    """What is there in the end."""
    end = time.monotonic() + seconds
    while not (found := met()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def lost(act: Callable[[], Any], pid: int) -> None:
    with pytest.raises(WorkerLost, match=SAID.format(pid)) as caught:
        act()
    assert "\n" not in str(caught.value)
    assert "launch again and the stage goes on from its checkpoint" in str(caught.value)
    assert "--data.workers" in str(caught.value)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("number", [1, 2])
def test_while_the_program_waits_for_a_batch(split: Manifest, number: int) -> None:
    """torch would look for dead workers much later; a signal tells at once."""
    stream = iter(Loader(split, batch=4, workers=number, codec=Slow(30)))
    before = set(workers())
    killed: list[float] = []
    pids: list[int] = []

    def kill() -> None:
        there = until(lambda: set(workers()) - before)
        time.sleep(1)
        pids.append(there.pop())
        killed.append(time.monotonic())
        os.kill(pids[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerLost) as caught:
        next(stream)
    seconds = time.monotonic() - killed[0]
    killer.join()
    print(f"{seconds:.3f} s from the kill to the message")
    assert f"(pid {pids[0]})" in str(caught.value)
    assert seconds < 20
    assert set(workers()) == before


@pytest.mark.usefixtures("alone")
def test_while_the_program_does_something_else(split: Manifest) -> None:
    """Nothing is raised in the midst of a step or a checkpoint, but at the next batch."""
    before = set(workers())
    stream = iter(Loader(split, batch=4, workers=2))
    next(stream)
    pid = (set(workers()) - before).pop()
    os.kill(pid, signal.SIGKILL)
    until(lambda: not _python(pid))
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        time.sleep(0.01)
    begin = time.monotonic()
    lost(lambda: next(stream), pid)
    assert time.monotonic() - begin < 20
    assert set(workers()) == before


def test_one_pass(split: Manifest) -> None:
    before = set(workers())
    batches = iter(Sequential(split, batch=2, workers=1))
    next(batches)
    (pid,) = set(workers()) - before
    os.kill(pid, signal.SIGKILL)
    lost(lambda: list(batches), pid)
    # The next pass has workers of its own.
    assert len(list(Sequential(split, batch=2, workers=1))) == 9


@pytest.mark.usefixtures("alone")
def test_closing_asks_nothing_of_the_dead(split: Manifest) -> None:
    """It may have held a lock for which the others, and we, would wait for ever."""
    before = set(workers())
    loader = Loader(split, batch=4, workers=2, codec=Slow(30))
    stream = iter(loader)

    def kill() -> None:
        until(lambda: len(set(workers()) - before) == 2)
        time.sleep(0.5)
        os.kill(max(set(workers()) - before), signal.SIGKILL)

    threading.Thread(target=kill).start()
    begin = time.monotonic()
    with pytest.raises(WorkerLost):
        next(stream)
    loader.close()
    stream.close()
    assert time.monotonic() - begin < 25  # a picture takes 30
    assert set(workers()) == before


@pytest.mark.parametrize("name", ["SIGBUS", "SIGSEGV"])
def test_other_deaths(split: Manifest, name: str) -> None:
    before = set(workers())
    stream = iter(Loader(split, batch=4, workers=1))
    next(stream)
    (pid,) = set(workers()) - before
    os.kill(pid, getattr(signal, name))
    said = "lack of shared memory" if name == "SIGBUS" else rf"died \(exit -{signal.SIGSEGV:d}\)"
    with pytest.raises(WorkerLost, match=said):
        list(islice(stream, 100))


def test_at_any_moment_it_never_hangs(split: Manifest) -> None:
    """Workers that write, read and wait are killed, at 12 moments of a fast loop."""
    for turn in range(12):
        before = set(workers())
        stream = iter(Loader(split, batch=8, workers=2, seed=turn))
        next(stream)
        pid = max(set(workers()) - before)
        timer = threading.Timer(0.02 + 0.013 * turn, os.kill, (pid, signal.SIGKILL))
        timer.start()
        begin = time.monotonic()
        with pytest.raises(WorkerLost):
            list(islice(stream, 100_000))
        timer.join()
        assert time.monotonic() - begin < 10
        assert set(workers()) == before


@pytest.mark.multi
def test_a_run_says_it_and_ends(tmp_path: Path) -> None:
    """The worker of a real training is killed; the run ends with the line, and not with 2."""
    root = make_world(tmp_path)
    table = COMMON | {
        "stage": "pretrain",
        "pretrain.steps": 100_000,
        "data": root / "shards",
        "model": root / "base",
        "output": root / "run",
        "data.workers": 1,
    }
    words = [word for key, value in table.items() for word in (f"--{key}", str(value))]
    log = tmp_path / "log"  # a pipe that nobody reads would stop the run
    with log.open("w") as file:
        run = subprocess.Popen(
            [BIN / "python", "engine/run.py", *words],
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    try:
        lines = root / "run" / "pretrain" / "metrics.jsonl"
        end = time.monotonic() + 240
        while not (lines.exists() and lines.read_text().count("\n") > 3):
            assert run.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.05)
        pid = max(workers(run.pid))
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        run.wait(200)
    finally:
        run.kill()
        run.wait()
    print(f"{time.monotonic() - begin:.2f} s from the kill to the end of the run")
    printed = log.read_text()
    assert f"error: a data loader worker (pid {pid}) was killed by the system" in printed
    assert "Traceback" not in printed
    assert run.returncode == 75
