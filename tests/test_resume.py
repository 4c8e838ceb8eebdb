"""Resume: a killed run continues bit for bit; what does not belong together is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import pack
from tests.helpers import COMMON, ROOT, environment, launch, make_base, make_images, metrics

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    make_images(root / "images")
    pack.pack(str(root / "images"), str(root / "shards"))
    make_base(root / "base")
    return root


def words(root: Path, output: Path, **more: object) -> list[str]:
    table = COMMON | {
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.steps": 60,
        "finetune.dropout": 0.3,  # its masks must continue as well
        "finetune.lr": 1e-3,
        "save_every": 10,
        "data": root / "shards",
        "model": root / "base",
        "output": output,
        **more,
    }
    return [word for key, value in table.items() for word in (f"--{key}", str(value))]


def kill_after(checkpoint: Path, command: list[str]) -> None:
    """Starts a run in a process group of its own and kills it once a checkpoint is there."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (checkpoint / "state.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_continues_bit_for_bit(root: Path) -> None:
    whole, broken = root / "runs" / "whole", root / "runs" / "broken"
    done = launch("engine/run.py", *words(root, whole), launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    command = [sys.executable, "engine/run.py", *words(root, broken)]
    kill_after(broken / "finetune-model" / "checkpoints" / "step-00000010", command)
    assert not (broken / "finetune-model" / "result.json").exists()

    # The newest checkpoint is damaged as well: the one before it is taken, with a warning.
    folder = broken / "finetune-model" / "checkpoints"
    copies = sorted(p for p in folder.glob("step-*"))
    if len(copies) > 1:
        victim = next(copies[-1].glob("*.pt"))
        victim.write_bytes(victim.read_bytes()[:100])
    done = launch("engine/run.py", *words(root, broken), launcher="python")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step" in done.stdout
    assert ("skipped" in done.stderr) == (len(copies) > 1)

    a, b = (
        load_file(p / "finetune-model" / "export" / "model.safetensors") for p in (whole, broken)
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    lines = [metrics(p / "finetune-model") for p in (whole, broken)]
    for one, other in zip(*lines, strict=True):
        assert one["step"] == other["step"]
        assert one.get("loss/loss") == other.get("loss/loss")

    # Complete: a second call leaves it alone.
    before = (whole / "finetune-model" / "result.json").read_text()
    done = launch("engine/run.py", *words(root, whole), launcher="python")
    assert done.returncode == 0
    assert "complete, skipped" in done.stdout
    assert (whole / "finetune-model" / "result.json").read_text() == before


def test_another_configuration_is_refused(root: Path) -> None:
    output = root / "runs" / "other"
    command = [sys.executable, "engine/run.py", *words(root, output)]
    kill_after(output / "finetune-model" / "checkpoints" / "step-00000010", command)
    done = launch("engine/run.py", *words(root, output, **{"finetune.lr": 0.5}), launcher="python")
    assert done.returncode == 2
    assert "finetune.lr = 0.001, now it is 0.5" in done.stderr
    assert "Traceback" not in done.stderr
    done = launch("engine/run.py", *words(root, output, resume="never"), launcher="python")
    assert done.returncode == 2
    assert "--overwrite" in done.stderr
    done = launch("engine/run.py", *words(root, output), ranks=2)
    assert done.returncode == 2
    assert "made with 1 ranks, now there are 2" in done.stderr
    state = output / "finetune-model" / "checkpoints" / "step-00000010" / "state.json"
    assert json.loads(state.read_text())["position"] == 10 * COMMON["finetune.batch"]
