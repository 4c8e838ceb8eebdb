"""Resume: a killed run continues bit for bit; what does not belong together is refused.

Starts of DeepSpeed are dear: what one rank does is done in two groups, before and after the kills.
"""

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

from selfdistill.data import pack
from tests.kit.launches import (
    COMMON,
    ROOT,
    environment,
    free_port,
    launch,
    make_images,
    make_world,
    metrics,
    run_cases,
)

pytestmark = pytest.mark.multi

STEP_10 = Path("finetune-model") / "checkpoints" / "step-00000010"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("resume"))
    make_images(root / "more", train=10)
    pack.pack(str(root / "more"), str(root / "other-shards"))
    return root


def finetune(root: Path, name: str, **more: object) -> dict[str, object]:
    return {
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.steps": 60,
        "finetune.dropout": 0.3,  # its masks must continue as well
        "finetune.lr": 1e-3,
        "save_every": 10,
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "output": str(root / "runs" / name),
        **more,
    }


def distill(root: Path, name: str, **more: object) -> dict[str, object]:
    return {
        "stage": "distill",
        "distill.steps": 60,
        "save_every": 10,
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "teacher": str(root / "teacher"),
        "teacher.mode": "cached",
        "output": str(root / "runs" / name),
        **more,
    }


def words(case: dict[str, object]) -> list[str]:
    return [word for key, value in (COMMON | case).items() for word in (f"--{key}", str(value))]


def kill_after(checkpoint: Path, command: list[str]) -> None:
    """Starts a run in a process group of its own and kills it once a checkpoint is there."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 240
    while not (checkpoint / "state.json").exists():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def copy_of(root: Path, name: str, new: str, what: str = "") -> None:
    shutil.copytree(root / "runs" / name / what, root / "runs" / new / what)


def same_weights(*stages: Path) -> bool:
    a, b = (load_file(stage / "export" / "model.safetensors") for stage in stages)
    assert a.keys() == b.keys()
    return all(torch.equal(a[key], b[key]) for key in a)


def other_tables(root: Path) -> dict[str, dict[str, object]]:
    """Name -> what differs from the run that made the table, and how it is refused."""
    return {
        "teacher": {"teacher": str(root / "base"), "expect_error": "another teacher"},
        "data": {"data": str(root / "other-shards"), "expect_error": "another data set"},
        "feature": {"distill.feature": "mean", "expect_error": "another view"},
    }


@pytest.fixture(scope="module")
def whole(root: Path) -> None:
    """Runs that nobody disturbs."""
    run_cases(root / "first", [finetune(root, "whole"), distill(root, "table")], ranks=1)


@pytest.fixture(scope="module")
def killed(root: Path) -> None:
    """A fine-tuning of one rank and a distillation of two, each killed after its 10th step.

    They write their checkpoints while the steps go on; those that go on from them do not. Many more
    steps would follow, and all checkpoints stay: the kill comes late on a busy machine.
    """
    late = {"save_async": True, "keep": 9}
    kill_after(
        root / "runs" / "killed" / STEP_10,
        [sys.executable, "engine/run.py", *words(finetune(root, "killed", **late))],
    )
    assert not (root / "runs" / "killed" / "finetune-model" / "result.json").exists()
    kill_after(
        root / "runs" / "killed-2" / "distill-1" / "checkpoints" / "step-00000010",
        [
            *("deepspeed", "--num_gpus", "2", "--master_port", str(free_port())),
            *("engine/run.py", *words(distill(root, "killed-2", zero="zero2", **late))),
        ],
    )
    assert not (root / "runs" / "killed-2" / "distill-1" / "result.json").exists()


@pytest.fixture(scope="module")
def again(root: Path, whole: None, killed: None) -> str:
    """What the second group of one rank printed."""
    for name in ("lr", "never"):
        copy_of(root, "killed", name)
    others = other_tables(root)
    for name in ("same", *others):
        copy_of(root, "table", f"table-{name}", "distill-1/teacher")
    # The newest checkpoint is damaged as well: the one before it is taken, with a warning.
    copies = sorted((root / "runs" / "killed" / STEP_10).parent.glob("step-*"))
    if len(copies) > 1:
        victim = next(copies[-1].glob("*.safetensors"))
        victim.write_bytes(victim.read_bytes()[:100])
    printed = run_cases(
        root / "again",
        [
            finetune(root, "killed"),
            finetune(root, "whole"),
            finetune(root, "never", resume="never", expect_error="--overwrite"),
            distill(root, "table-same"),
            *(distill(root, f"table-{name}", **more) for name, more in others.items()),
        ],
        ranks=1,
    )
    assert ("; skipped" in printed) == (len(copies) > 1)
    return printed


def test_a_killed_run_continues_bit_for_bit(root: Path, again: str) -> None:
    assert "resumed at step" in again
    stages = [root / "runs" / name / "finetune-model" for name in ("whole", "killed")]
    assert same_weights(*stages)
    for one, other in zip(*map(metrics, stages), strict=True):
        assert one["step"] == other["step"]
        assert one.get("loss/loss") == other.get("loss/loss")


def test_a_complete_stage_is_left_alone(root: Path, again: str) -> None:
    assert f"complete, skipped ({root / 'runs' / 'whole'}" in again


def test_another_configuration_is_refused(root: Path, again: str) -> None:
    """Exit code and line as a person sees them; a resume refused by groups."""
    case = finetune(root, "lr", **{"finetune.lr": 0.5})
    done = launch("engine/run.py", *words(case), launcher="python")
    assert done.returncode == 2
    assert "finetune.lr = 0.001, now it is 0.5" in done.stderr
    assert "Traceback" not in done.stderr
    state = json.loads((root / "runs" / "lr" / STEP_10 / "state.json").read_text())
    assert state["position"] == 10 * COMMON["finetune.batch"]
    assert again.count("as expected:") == 1 + len(other_tables(root))


def test_two_ranks_continue_bit_for_bit_and_reuse_the_feature_table(
    root: Path, killed: None, again: str
) -> None:
    stage = root / "runs" / "killed-2" / "distill-1"
    table = (stage / "teacher" / "features.npy").stat()
    cases = [distill(root, name, zero="zero2") for name in ("killed-2", "whole-2")]
    assert "distill-1: resumed at step" in run_cases(root / "two", cases)
    after = (stage / "teacher" / "features.npy").stat()
    assert (after.st_ino, after.st_mtime_ns) == (table.st_ino, table.st_mtime_ns)
    other = root / "runs" / "whole-2" / "distill-1"
    assert same_weights(stage, other)
    assert [line["loss/loss"] for line in metrics(stage)] == [
        line["loss/loss"] for line in metrics(other)
    ]


def test_a_feature_table_of_something_else_is_refused(root: Path, again: str) -> None:
    """Another teacher, other data, another view are refused; the right table is let in."""
    for name, more in other_tables(root).items():
        assert str(more["expect_error"]) in again, name
    one, other = (root / "runs" / name / "distill-1" for name in ("table", "table-same"))
    assert [line["loss/loss"] for line in metrics(one)] == [
        line["loss/loss"] for line in metrics(other)
    ]
