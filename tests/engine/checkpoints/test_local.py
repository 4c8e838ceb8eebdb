"""Checkpoints on the nodes' own disks: what is taken when nodes come back, or do not."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.checkpoint import Checkpoints
from selfdistill.engine.checkpoints.local import Local, open_checkpoints
from selfdistill.engine.config.schema import Config
from selfdistill.engine.runtime.distributed import Ranks
from tests.engine.checkpoints.attack import CONFIG, Training, flip, truncate
from tests.kit.launches import COMMON, ROOT, environment, free_port, make_world, metrics, run_cases


class Node:
    """A rank that saves on its node's disk and on the shared one."""

    def __init__(self, root: Path, ranks: Ranks) -> None:
        self.training, self.stage = Training(root, ranks), root / "stage"
        self.stage.mkdir()
        self.config = Config(
            save_every=2, save_local=str(root / "$DISK"), save_local_every=1, keep=2
        )

    def opened(self) -> Checkpoints:
        found = open_checkpoints(self.config, self.stage, self.training.ranks, lambda: None)
        assert isinstance(found, Local)
        return found

    def save(self, kept: Checkpoints) -> None:
        self.training.step()
        kept.save(self.training.engine, self.training.state)

    def resumed(self) -> tuple[int, str]:
        """The step that a launch goes on from, bit for bit, and whose disk it lies on."""
        kept = self.opened()
        found = kept.find(CONFIG, "data")
        if found is None:
            return 0, ""
        where, state = found
        read = kept.reader(found)
        for name, value in self.training.weights[state.step].items():
            assert torch.equal(read(name), value), f"{name} at step {state.step}"
        return state.step, "shared" if where.parent == kept.shared.folder else "local"


@pytest.fixture
def node(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setenv("DISK", "disk")
    return Node(tmp_path, ranks)


def test_the_newest_whole_one_is_taken(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    kept = node.opened()
    node.save(kept)
    assert node.resumed() == (1, "local")
    node.save(kept.shared)
    assert node.resumed() == (2, "shared")
    for _ in range(2):
        node.save(kept)
    assert [path.name for path in kept.folder.iterdir()] == ["step-00000004"]  # no older ones
    assert capsys.readouterr().err == ""
    part = next(kept.folder.glob("step-00000004/part-*"))
    shutil.copytree(kept.folder, whole := node.stage.parent / "whole")
    for attack in (truncate, flip, Path.unlink):
        # Path.unlink has one argument more, so the tuple's common type is no callable to mypy.
        attack(part)  # type: ignore[operator]
        assert node.resumed() == (2, "shared"), attack
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: ")
        assert line.endswith("; skipped")
        assert not list(kept.folder.iterdir())  # its shares would mix with those of step 4 anew
        shutil.copytree(whole, kept.folder, dirs_exist_ok=True)
    assert node.resumed() == (4, "local")
    kept.clear()
    assert not kept.folder.exists()
    assert node.resumed() == (2, "shared")
    assert "no checkpoint lies on the nodes' own disks" in capsys.readouterr().err


def test_a_write_that_is_cut_leaves_the_one_before(node: Node) -> None:
    kept = node.opened()
    node.save(kept)
    draft = shutil.copytree(kept.folder / "step-00000001", kept.folder / "step-00000002")
    truncate(next(draft.glob("part-*")))
    next(draft.glob("state-*")).unlink()  # comes when all ranks have written
    assert node.resumed() == (1, "local")
    assert not draft.exists()


def test_a_stage_that_is_begun_anew_takes_none_of_before(node: Node) -> None:
    kept = node.opened()
    node.save(kept)
    shutil.rmtree(node.stage)  # --overwrite
    node.stage.mkdir()
    assert node.resumed() == (0, "")
    assert not kept.folder.exists()


def test_options_that_do_not_go_together(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="give both, or neither"):
        Config(save_local="/disk")
    with pytest.raises(ValueError, match="must be below save_every, which is 1000"):
        Config(save_local="/disk", save_local_every=1000)
    monkeypatch.delenv("DISK")
    with pytest.raises(UserError, match=r"--save_local .*DISK, on .*: a variable is not set"):
        node.opened()
    monkeypatch.setenv("DISK", "file")
    (node.stage.parent / "file").write_text("")
    with pytest.raises(UserError, match=r"--save_local .*DISK, on .*: File exists"):
        node.opened()


def finetune(root: Path, name: str, **more: object) -> dict[str, object]:
    return {
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.steps": 200,
        "finetune.dropout": 0.3,
        "finetune.lr": 1e-3,
        "zero": "zero2",
        "save_every": 40,
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "output": str(root / "runs" / name),
        # Two nodes of a rank each.
        "save_local": str(root / "disk-$LOCAL_RANK"),
        "save_local_every": 5,
        **more,
    }


def kept_on(disk: Path, stage: Path) -> Path:
    """A node's folder for a stage."""
    place = hashlib.sha256(str(stage.resolve()).encode()).hexdigest()[:16]
    number = (stage / ".local").read_text()
    return disk / f"selfdistill-{place}-{number}"


def newest(pattern: str, folder: Path) -> int:
    """The highest of the steps that have a record; 0 if none has."""
    found = [int(path.parent.name.removeprefix("step-")) for path in folder.glob(pattern)]
    return max(found, default=0)


def killed(root: Path, stage: Path) -> tuple[int, int]:
    """A run of two ranks, killed when its nodes have a newer checkpoint than the shared disk.

    Returns:
        The steps of both.
    """
    case = COMMON | finetune(root, "killed", save_async=True)
    words = [word for key, value in case.items() for word in (f"--{key}", str(value))]
    process = subprocess.Popen(
        [
            "deepspeed",
            "--num_gpus",
            "2",
            "--master_port",
            str(free_port()),
            "engine/run.py",
            *words,
        ],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240

    def there() -> tuple[int, int]:
        shared = newest("step-*/state.json", stage / "checkpoints")
        return newest("disk-*/*/step-*/state-*", root), shared

    # The second since then: the record of one may be on one of the nodes alone.
    while not 0 < there()[1] < there()[0] - 5:
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (stage / "result.json").exists()
    return there()


@pytest.mark.multi
def test_two_nodes_go_on_bit_for_bit(tmp_path_factory: pytest.TempPathFactory) -> None:
    """From their own disks where both come back; from the shared one where one was replaced."""
    root = make_world(tmp_path_factory.mktemp("local"))
    stages = {n: root / "runs" / n / "finetune-model" for n in ("whole", "killed", "replaced")}
    steps = killed(root, stages["killed"])
    assert steps[0] > steps[1]
    shutil.copytree(root / "runs" / "killed", root / "runs" / "replaced")
    theirs = kept_on(root / "disk-0", stages["killed"])
    parts = [len(list(theirs.glob(f"step-*/{kind}-*"))) for kind in ("part", "state")]
    assert max(parts) <= 2  # its own share, and one that is being written
    shutil.copytree(theirs, kept_on(root / "disk-0", stages["replaced"]))
    cases = [finetune(root, name) for name in stages]
    del cases[0]["save_local"], cases[0]["save_local_every"]
    lines = run_cases(root / "again", cases).splitlines()
    resumed = [
        int(line.split("resumed at step ")[1].split()[0]) for line in lines if "resumed" in line
    ]
    assert resumed == list(steps), lines
    assert any("part-00001-of-00002.safetensors lies on no node" in line for line in lines)
    wanted = load_file(stages["whole"] / "export" / "model.safetensors")
    for name in ("killed", "replaced"):
        weights = load_file(stages[name] / "export" / "model.safetensors")
        assert all(torch.equal(weights[key], value) for key, value in wanted.items())
        for one, other in zip(metrics(stages["whole"]), metrics(stages[name]), strict=True):
            assert one["step"] == other["step"]
            assert one.get("loss/loss") == other.get("loss/loss")
        assert json.loads((stages[name] / "result.json").read_text())["steps"] == 200
    assert not list(root.glob("disk-*/*"))  # of complete stages nothing is left
