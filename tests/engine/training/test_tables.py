"""A split's table of members is opened once a node, and its faults are known to all ranks."""

import json
import shutil
from pathlib import Path

import pytest

from selfdistill.data import pack
from tests.engine.checkpoints.attack import flip
from tests.kit.launches import ROOT, launch, make_images


@pytest.mark.multi
def test_one_rank_opens_the_tables(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    shards, broken = tmp_path / "shards", tmp_path / "broken"
    pack.pack(str(tmp_path / "images"), str(shards))
    shutil.copytree(shards, broken)
    flip(broken / "train" / "members.npy")
    done = launch(ROOT / "tests" / "engine" / "training" / "opening.py", shards, broken)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    first, second = sorted(told, key=lambda one: one["rank"])
    assert first["opened"] == ["manifest.json"] * 2 + ["members.npy"] * 2
    assert second["opened"] == []
    assert (first["same"], second["same"]) == (True, True)
    assert first["error"] == second["error"]
    assert "is not the table that" in first["error"]
