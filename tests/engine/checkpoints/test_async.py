"""Checkpoints that are written while the steps go on."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from selfdistill.data.errors import TryAgain, UserError
from selfdistill.engine.checkpoints import checkpoint
from selfdistill.engine.checkpoints.checkpoint import Checkpoints
from selfdistill.engine.runtime.distributed import Ranks
from tests.engine.checkpoints.attack import Training


class SlowDisk:
    """Writes nothing before it is let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let = threading.Event()
        write = checkpoint.save_file

        def slow(*words: Any) -> None:
            assert self.let.wait(60)
            write(*words)

        monkeypatch.setattr(checkpoint, "save_file", slow)


def test_the_steps_go_on_meanwhile(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, training = SlowDisk(monkeypatch), Training(tmp_path, ranks)
    saved = Checkpoints(tmp_path, ranks, keep=2)
    training.step()
    saved.save(training.engine, training.state, wait=False)
    training.step()  # the weights of step 1 are no more
    saved.settle(wait=False)
    assert saved.names() == []
    assert training.resumed(tmp_path) == 0  # killed now, it begins anew
    disk.let.set()
    saved.settle()
    assert saved.names() == ["step-00000001"]
    assert training.resumed(tmp_path) == 1
    saved.save(training.engine, training.state, wait=False)
    training.step()
    saved.save(training.engine, training.state)  # the one before it counts first
    assert saved.names() == ["step-00000002", "step-00000003"]
    saved.save(training.engine, training.state)  # a step is saved once
    assert not list(tmp_path.glob(".draft-*"))
    assert training.resumed(tmp_path) == 3


def test_a_disk_that_refuses(ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, ranks)
    saved = Checkpoints(tmp_path, ranks, keep=2)
    training.step()
    saved.save(training.engine, training.state)
    training.step()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    saved.save(training.engine, training.state, wait=False)
    training.step()
    with pytest.raises(UserError, match=r"not saved: .*No space left on device; free space"):
        saved.settle()
    assert training.resumed(tmp_path) == 1
    assert not list(tmp_path.glob(".draft-*"))


@pytest.mark.parametrize("name", ["state.json", "*.safetensors"])
def test_a_file_system_that_fails_breaks_no_checkpoint(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What a client of NFS says after a requeue: another launch finds the newest one whole."""
    training = Training(tmp_path, ranks)
    saved = Checkpoints(tmp_path, ranks, keep=2)
    for _ in range(2):
        training.step()
        saved.save(training.engine, training.state)
    newest = next((tmp_path / "step-00000002").glob(name))
    opens = os.open

    def stale(path: Any, *words: Any, **more: Any) -> int:
        if Path(path) == newest:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return opens(path, *words, **more)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", stale)
        with pytest.raises(TryAgain, match=r"Stale file handle.*launch again"):
            saved.newest()
    found = saved.newest()
    assert found is not None
    assert found[1].step == 2
