"""A world of tiny experiments: packed data, a base model, specs of one's own."""

import json
import subprocess
from pathlib import Path

from tests.kit import warm
from tests.kit.launches import COMMON, ROOT, environment, make_world

PROFILE = """title = "small enough for tests"

[image]
recipe = "vit_small"

[image.options]
{options}

{search}
[text]
recipe = "roberta_small"
"""

SEARCH = '[image.search]\n"finetune.lr" = [1e-3, 2e-3]\n'

DATASET = 'title = "three colours"\nkind = "image"\npaper = "Flower"\n'


def make_specs(root: Path, data: tuple[str, ...] = ("colours",)) -> Path:
    """Specs with two profiles and data sets, in root/my; shards in root/shards/NAME."""
    make_world(root / "world")
    my = root / "my"
    for part in ("methods", "datasets", "tables", "profiles"):
        (my / part).mkdir(parents=True)
    options = COMMON | {"model.path": str(root / "world" / "base"), "finetune.steps": 4}
    options |= {"save_every": 2, "finetune.warmup": 1}
    lines = [f'"{k}" = {json.dumps(v)}' for k, v in options.items()]
    # A launch takes ten seconds: what is run for real has no search but its own.
    for name, search in (("tiny", SEARCH), ("quick", "")):
        text = PROFILE.format(options="\n".join(lines), search=search)
        (my / "profiles" / f"{name}.toml").write_text(text)
    (root / "shards").mkdir()
    for name in data:
        (my / "datasets" / f"{name}.toml").write_text(DATASET)
        (root / "shards" / name).symlink_to(root / "world" / "shards")
    return my


def make_table(my: Path, name: str, rows: list[str], datasets: list[str], seeds: int = 2) -> None:
    """A table of methods."""
    told = [f'title = "{name}"', f"datasets = {json.dumps(datasets)}", f"seeds = {seeds}"]
    told += [f'\n[[rows]]\nmethod = "{method}"' for method in rows]
    (my / "tables" / f"{name}.toml").write_text("\n".join(told) + "\n")


def command(root: Path, *words: str, module: str = "run", python: str | None = None) -> list[str]:
    """Words of experiments.run with the tiny specs; it starts warm, unless a Python is named."""
    head = [python or str(warm.executable()), "-m", f"experiments.{module}", *words]
    known = {
        "data_root": root / "shards",
        "specs": root / "my",
        "profile": "quick",
        "output": root / "sweep",
    }
    return [*head, *(word for k, v in known.items() for word in (f"--{k}", str(v)))]


def run(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs experiments.run."""
    return subprocess.run(
        command(root, *words), cwd=ROOT, env=environment(), capture_output=True, text=True
    )
