"""The wheel holds what a clone holds, under one name, and its commands work."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from selfdistill.__main__ import NAMES
from selfdistill.data.errors import TYPED, commands_as_typed
from tests.kit.launches import BIN, COMMON, ROOT, environment, free_port, make_base, make_images

FOLDERS = ("data", "engine", "experiments", "launcher", "ds_configs", "recipes", "slurm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of what is tracked, since the build writes beside its sources."""
    copy = tmp_path_factory.mktemp("clone")
    own = shutil.ignore_patterns("__pycache__")
    for folder in (*FOLDERS, "selfdistill"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=own, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools import build_meta as b; print(b.build_wheel('.'))"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=True
    )
    return zipfile.ZipFile(copy / done.stdout.split()[-1])


@pytest.fixture(scope="module")
def installed(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project that has the wheel on its Python path, and folders of the same names of its own."""
    folder = tmp_path_factory.mktemp("installed")
    wheel.extractall(folder / "site")
    for name in ("data", "engine", "launcher", "experiments"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise SystemExit('the project’s own')")
    return folder


def run(installed: Path, *words: str | Path) -> str:
    """Runs a command of the installed copy, away from the clone; what it printed."""
    return run_in(installed, *words, path=installed / "site")


def run_in(folder: Path, *words: str | Path, path: Path | None = None) -> str:
    done = subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=environment(PYTHONPATH=str(path or folder)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_the_wheel_holds_every_file_under_one_name(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    expected = {
        f"selfdistill/{path.relative_to(ROOT)}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected | {"selfdistill/__init__.py", "selfdistill/__main__.py"}
    (entries,) = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    scripts = wheel.read(entries).decode().split()
    assert scripts == ["[console_scripts]", "selfdistill", "=", "selfdistill.__main__:main"]


def test_commands_of_an_installed_copy(installed: Path) -> None:
    command = (sys.executable, "-m", "selfdistill")
    listed = run(installed, *command, "--help")
    named = {line.split()[1] for line in listed.splitlines() if line.startswith("  selfdistill ")}
    commands = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for room in ("data", "engine", "launcher", "experiments")
        for path in (ROOT / room).rglob("*.py")
        if '\nif __name__ == "__main__":\n' in path.read_text(encoding="utf-8")
    }
    # experiments.task and engine.run are what launchers start.
    assert set(NAMES.values()) == commands - {
        "experiments.task",
        "experiments.worker",
        "engine.run",
    }
    assert named == NAMES.keys()
    assert all(line.split(maxsplit=2)[2] for line in listed.splitlines() if line.startswith("  s"))
    for name in ("pack", "data.pack"):
        page = run(installed, *command, name, "--help")
        assert page.startswith(f"python -m selfdistill {name} SOURCE OUT")
    wrong = subprocess.run([*command, "pak"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "Did you mean pack?" in wrong.stderr


def test_messages_name_commands_as_they_were_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "pack it (python -m data.pack IN OUT --data.mix a:1), or data.index; then deepspeed"
    long += " --master_port 9 engine/run.py --stage all. See data/pack.py, launcher.predict."
    monkeypatch.delenv(TYPED, raising=False)
    assert commands_as_typed(long) == long
    monkeypatch.setenv(TYPED, "selfdistill")
    assert commands_as_typed(long) == (
        "pack it (selfdistill pack IN OUT --data.mix a:1), or selfdistill index; then selfdistill"
        " train --master_port 9 --stage all. See data/pack.py, selfdistill predict."
    )
    for short, module in NAMES.items():
        assert commands_as_typed(f"python -m {module} --help") == f"selfdistill {short} --help"
        assert commands_as_typed(f"selfdistill {module} --help") == f"selfdistill {module} --help"


def test_mistakes_are_told_before_the_ranks_start(tmp_path: Path) -> None:
    """In the words of the command that was typed, in a second or two, without a folder left."""
    make_images(tmp_path / "images")
    told = {
        "nowhere": "error: no data set at nowhere: pack it first (python -m selfdistill pack SOURCE"
        " nowhere)\n",
        "images": "error: images holds images, not shards: python -m selfdistill pack images"
        " shards/NAME, then --data shards/NAME\n",
    }
    for data, line in told.items():
        done = subprocess.run(
            [sys.executable, "-m", "selfdistill", "train", "--data", data, "--output", "run"],
            cwd=tmp_path,
            env=environment(PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (2, line)
        assert not (tmp_path / "run").exists()


@pytest.mark.multi
def test_an_installed_copy_trains(installed: Path) -> None:
    make_images(installed / "images")
    make_base(installed / "base")
    command = (sys.executable, "-m", "selfdistill")
    run(installed, *command, "pack", "images", "shards")
    options = COMMON | {"pretrain.steps": 2, "data": "shards", "model": "base", "output": "run"}
    run(
        installed,
        *(BIN / "deepspeed", "--num_gpus", "2", "--master_port", str(free_port())),
        *("--module", "selfdistill.engine.run", "--stage", "pretrain"),
        *(f"--{name}={value}" for name, value in options.items()),
    )
    assert (installed / "run" / "pretrain" / "result.json").exists()
    # The same by its own command, which goes on from there.
    words = [f"--{name}={value}" for name, value in options.items()]
    said = run(installed, *command, "train", "--stage", "all", *words)
    assert "pretrain: complete, skipped" in said
    assert (installed / "run" / "finetune" / "result.json").exists()
    code = "import selfdistill as sd; print(sd.Run('run').metrics['test_accuracy'])"
    score = json.loads((installed / "run" / "finetune" / "result.json").read_text())["metrics"]
    assert float(run(installed, sys.executable, "-c", code)) == score["test_accuracy"]


def test_a_clone_whose_links_were_not_kept(tmp_path: Path) -> None:
    """Git without symbolic links writes a file with the link's text in its place."""
    (tmp_path / "selfdistill").mkdir()
    shutil.copy(ROOT / "selfdistill" / "__init__.py", tmp_path / "selfdistill")
    for folder in FOLDERS:
        (tmp_path / folder).symlink_to(ROOT / folder)
        (tmp_path / "selfdistill" / folder).write_text(f"../{folder}")
    code = "from selfdistill.engine.config import schema; print(schema.__file__)"
    assert run_in(tmp_path, sys.executable, "-c", code).startswith(str(tmp_path))
