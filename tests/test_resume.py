"""Resume: a killed run continues bit for bit; what does not belong together is refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data import pack
from tests.helpers import (
    COMMON,
    ROOT,
    environment,
    launch,
    make_base,
    make_images,
    metrics,
    run_cases,
)

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resume")
    make_images(root / "images")
    pack.pack(str(root / "images"), str(root / "shards"))
    make_base(root / "base")
    make_base(root / "teacher", seed=1)
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


def test_two_ranks_continue_bit_for_bit_and_reuse_the_feature_table(root: Path) -> None:
    more = {
        "stage": "distill",
        "teacher": root / "teacher",
        "teacher.mode": "cached",
        "distill.steps": 20,
        "zero": "zero2",
    }
    whole, broken = root / "runs" / "whole-2", root / "runs" / "broken-2"
    done = launch("engine/run.py", *words(root, whole, **more))
    assert done.returncode == 0, done.stderr[-3000:]
    port = "29713"
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", port, "engine/run.py"]
    stage = broken / "distill-1"
    kill_after(stage / "checkpoints" / "step-00000010", launcher + words(root, broken, **more))
    assert not (stage / "result.json").exists()
    table = (stage / "teacher" / "features.npy").stat()
    done = launch("engine/run.py", *words(root, broken, **more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed at step" in done.stdout
    again = (stage / "teacher" / "features.npy").stat()
    assert (again.st_ino, again.st_mtime_ns) == (table.st_ino, table.st_mtime_ns)
    a, b = (load_file(p / "distill-1" / "export" / "model.safetensors") for p in (whole, broken))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert [line["loss/loss"] for line in metrics(whole / "distill-1")] == [
        line["loss/loss"] for line in metrics(stage)
    ]


def test_a_feature_table_of_something_else_is_refused(root: Path) -> None:
    """Another teacher, other data, another view; the right ones are let in."""
    make_images(root / "more", train=10)
    pack.pack(str(root / "more"), str(root / "other-shards"))
    shared = {
        "stage": "distill",
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "teacher": str(root / "teacher"),
        "teacher.mode": "cached",
    }
    first = shared | {"output": str(root / "runs" / "table")}
    run_cases(root / "first", [first], ranks=1)
    table = root / "runs" / "table" / "distill-1" / "teacher"
    cases: dict[str, dict[str, object]] = {
        "same": {},
        "teacher": {"teacher": str(root / "base"), "expect_error": "another teacher"},
        "data": {"data": str(root / "other-shards"), "expect_error": "another data set"},
        "feature": {"distill.feature": "mean", "expect_error": "another view"},
    }
    for name in cases:
        shutil.copytree(table, root / "runs" / f"table-{name}" / "distill-1" / "teacher")
    copy = root / "runs" / "table-same" / "distill-1" / "teacher" / "features.npy"
    before = copy.stat()
    run_cases(
        root / "again",
        [
            shared | {"output": str(root / "runs" / f"table-{name}")} | more
            for name, more in cases.items()
        ],
        ranks=1,
    )
    one, other = (
        [line["loss/loss"] for line in metrics(root / "runs" / name / "distill-1")]
        for name in ("table", "table-same")
    )
    assert one == other
    assert (copy.stat().st_ino, copy.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
