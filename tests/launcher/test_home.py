"""`~` in what a command writes: of OUT=~/x, or in quotation marks, the shell leaves it as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selfdistill.data.errors import UserError
from selfdistill.launcher import slurm
from selfdistill.launcher.embed import embed
from selfdistill.launcher.examples import __main__ as examples
from selfdistill.launcher.predict import predict


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize(("command", "name"), [(predict, "labels.csv"), (embed, "features.npy")])
def test_out(command: Callable[..., Any], name: str, home: Path) -> None:
    with pytest.raises(UserError, match="none"):
        command("none", "none", f"~/found/{name}")
    assert (home / "found").is_dir()
    assert not Path("~").exists()


def test_an_example(home: Path) -> None:
    (home / "digits").mkdir(parents=True)
    (home / "digits" / "mine").touch()
    with pytest.raises(UserError, match=f"{home}/digits is in the way"):
        examples.main("images", "~/digits")


def test_a_job(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.main(["submit", "--dry_run", "--recipe=quickstart", "--output=~/runs/x"])
    told = capsys.readouterr().out
    assert f"OUTPUT={home}/runs/x" in told
    assert f"--output={home}/runs/x/slurm/all-%j.log" in told
