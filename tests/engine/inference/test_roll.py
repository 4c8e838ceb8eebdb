"""The first rank waits for the others only as long as they are at work."""

import threading
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore

from selfdistill.data.errors import TryAgain
from selfdistill.engine.inference import work
from selfdistill.engine.inference.parts import Parts
from selfdistill.engine.inference.work import Roll


@pytest.fixture
def rolls(monkeypatch: pytest.MonkeyPatch) -> tuple[Roll, Roll]:
    monkeypatch.setattr(work, "_BEAT", 0.02)
    monkeypatch.setattr(work, "_GONE", 1.0)
    store = HashStore()
    return Roll(store, 0, 2), Roll(store, 1, 2)


def look(roll: Roll, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        roll.look()
        time.sleep(0.02)


def test_one_at_work_is_waited_for(rolls: tuple[Roll, Roll]) -> None:
    first, other = rolls
    with first:
        with other:
            look(first, 2.5)
        look(first, 2.5)  # it has ended its own, and a third may not have


def test_the_first_leaves_last(rolls: tuple[Roll, Roll], monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = rolls
    monkeypatch.setattr(work, "_BEAT", 60.0)
    threading.Timer(0.5, lambda: other.__exit__(None)).start()
    began = time.monotonic()
    with first:
        pass
    assert 0.4 < time.monotonic() - began < 30


def test_one_that_fails_is_told_at_once(rolls: tuple[Roll, Roll], tmp_path: Path) -> None:
    first, other = rolls
    with pytest.raises(OSError, match="full"), other:
        raise OSError("full")
    parts = Parts(tmp_path / "labels.csv", {}, 9)
    with first, pytest.raises(TryAgain, match="rank 1 of 2 has failed: launch again"):
        parts.wait(first.look)


def test_one_that_was_killed_is_missed(rolls: tuple[Roll, Roll]) -> None:
    first, other = rolls
    other.__enter__()
    other.over.set()  # no word more, as after SIGKILL
    with first, pytest.raises(TryAgain, match="was not heard of for 1 s"):
        look(first, 30)
