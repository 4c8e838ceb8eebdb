"""The wheel holds what a clone holds."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("data", "engine", "experiments", "launcher", "ds_configs", "recipes", "slurm")


def test_the_wheel_holds_every_file(tmp_path):
    own = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=own)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools import build_meta as b; print(b.build_wheel('.'))"
    told = subprocess.run(
        [sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    wheel = tmp_path / told.stdout.split()[-1]
    there = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(FOLDERS)}
    wanted = {
        str(path.relative_to(ROOT))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there == wanted
