"""Checkpoints under attack: never a corrupt resume, never a loss of more than one interval."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kit.launches import ROOT, environment

KILLS = 60


@pytest.fixture(scope="module")
def came(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the attacks of checkpoint_attack.py came to; every tensor was compared there."""
    folder = tmp_path_factory.mktemp("attack")
    words = [sys.executable, "tests/engine/checkpoints/attack.py", str(folder), str(KILLS)]
    # Its file systems are mounted in a namespace of its own.
    inside = ["unshare", "-m" if os.geteuid() == 0 else "-rm"]
    done = subprocess.run(
        [*inside, *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "; skipped" in done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_the_last_two_are_kept(came: dict[str, Any]) -> None:
    assert came["kept"] == ["step-00000002", "step-00000003"]


def test_an_attacked_file_falls_back_one_checkpoint(came: dict[str, Any]) -> None:
    attacks = {k: v for k, v in came["files"].items() if "latest" not in k}
    files = {k: v for k, v in attacks.items() if "safetensors" in k or "state.json" in k}
    assert len(files) == 11
    assert set(files.values()) == {2}, files
    assert attacks["an empty folder is newer"] == 3
    assert attacks["a folder of another name"] == 3
    assert attacks["saved again"] == 3


def test_latest_is_for_people(came: dict[str, Any]) -> None:
    """Whatever it says, the newest whole checkpoint is taken."""
    found = {k: v for k, v in came["files"].items() if "latest" in k}
    assert len(found) == 6
    assert set(found.values()) == {3}, found


def test_a_kill_while_saving_loses_no_more_than_that_save(came: dict[str, Any]) -> None:
    kills = came["kills"]
    assert len(kills) == KILLS
    assert all(kill["after"] in (kill["before"], kill["saving"]) for kill in kills), kills
    assert all(kill["after"] == kill["saving"] for kill in kills if kill["finished"])
    # The moments were spread: before, amid and after.
    assert sum(kill["draft"] for kill in kills) >= KILLS // 4
    assert 0 < sum(kill["after"] == kill["saving"] for kill in kills) < KILLS


@pytest.mark.parametrize(("disk", "word"), [("full", "space"), ("read-only", "Read-only")])
def test_a_disk_that_refuses_leaves_the_old_one(came: dict[str, Any], disk: str, word: str) -> None:
    message, old_is_whole, left = came["disk"][disk]
    assert word.lower() in message.lower()
    assert "\n" not in message
    assert old_is_whole
    if disk == "full":
        assert not left
