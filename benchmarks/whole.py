"""Time of a whole run against the plain loop: `python -m benchmarks.whole`.

Both make the same of the embedded digits: further pre-training, distillation, fine-tuning with
several seeds, scores of validation and test, weights on disk. Ours is what a user types, `deepspeed
engine/run.py --stage all --recipe quickstart`, with its checkpoints, TensorBoard, pictures and
analysis; the other is `benchmarks.peers.whole`. Runs alternate; all of a process's time counts.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks import record
from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.config import options as configuration
from selfdistill.launcher.examples import __main__ as example

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("pretrain", "distill", "finetune")


def lay_out(shards: Path, folder: Path) -> None:
    """Writes the shards' images into class folders: pool, train, val, test."""
    pool = "unlabelled" if (shards / "unlabelled" / "manifest.json").exists() else "train"
    for name, split in {"pool": pool, "train": "train", "val": "val", "test": "test"}.items():
        manifest = Manifest.load_split(str(shards), split)
        reader = Reader(manifest)
        for number in range(manifest.samples):
            sample = reader.record(number)
            label = manifest.classes[sample.label] if sample.label >= 0 else "none"
            (folder / name / label).mkdir(parents=True, exist_ok=True)
            (folder / name / label / f"{number:07d}.png").write_bytes(sample.input)
        reader.close()


def timed(command: list[str], log: Path) -> tuple[float, str]:
    """Seconds of a command, and what it said.

    Raises:
        UserError: it failed.
    """
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    seconds, said = time.perf_counter() - began, log.read_text(encoding="utf-8")
    if done.returncode:
        raise UserError(f"{' '.join(command[:4])} failed ({done.returncode}): {said[-400:]}")
    return seconds, said


def ours(shards: Path, out: Path, recipe: str) -> dict[str, float]:
    """Seconds of our run, in all and of each stage by its own count."""
    command = [
        *(str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1", "engine/run.py"),
        *("--stage", "all", "--recipe", recipe, "--data", str(shards), "--output", str(out)),
    ]
    total, said = timed(command, out.with_suffix(".log"))
    parts = re.findall(r"^(\w+)[\w/-]*: done in (\d+) s", said, re.MULTILINE)
    found = {s: float(sum(int(n) for name, n in parts if name == s)) for s in STAGES}
    return {"total": total, **found}


def plain(data: Path, out: Path, settings: Path, model: str, side: int) -> dict[str, float]:
    """Seconds of the plain loop's run, in all and of each stage."""
    words = {"folder": data, "model": model, "image_size": side, "settings": settings, "out": out}
    options = [f"--{k}={v}" for k, v in words.items()]
    command = [sys.executable, "-m", "benchmarks.peers.whole", *options]
    total, said = timed(command, out.with_suffix(".log"))
    ends = json.loads(said.strip().splitlines()[-1])["seconds"]
    marks = [ends["start"], *(ends[s] for s in STAGES)]
    return {"total": total} | {
        s: end - begin for s, begin, end in zip(STAGES, marks, marks[1:], strict=False)
    }


def main(rounds: int = 3, recipe: str = "quickstart", out: str | None = None) -> None:
    """Times whole runs.

    Args:
        rounds: alternating runs of each.
        recipe: of images.
        out: folder for whole.json and whole.md.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: give 1 or more")
    told = configuration.load({"recipe": recipe})
    if told.kind != "image":
        raise UserError(f"--recipe {recipe}: the plain loop knows images: take one of images")
    found: dict[str, list[dict[str, float]]] = {"plain loop": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="whole-") as name:
        folder = Path(name)
        example.main("images", str(folder / "shards"))
        lay_out(folder / "shards", folder / "raw")
        settings = folder / "settings.json"
        sections = {s: getattr(told, s).model_dump(mode="json") for s in STAGES}
        settings.write_text(json.dumps(sections), encoding="utf-8")
        base = str(ROOT / "recipes" / str(told.model.path))
        with Progress(transient=True) as progress:
            task = progress.add_task("runs", total=2 * rounds)
            for number in range(rounds):
                for who in found if number % 2 else reversed(found):
                    place = folder / f"{who.split()[0]}-{number}"
                    side = int(told.model.image_size or 64)
                    found[who].append(
                        ours(folder / "shards", place, recipe)
                        if who == "ours"
                        else plain(folder / "raw", place, settings, base, side)
                    )
                    progress.advance(task)
    pairs = list(zip(found["ours"], found["plain loop"], strict=True))
    ratio = record.spread([theirs["total"] / mine["total"] for mine, theirs in pairs])
    rows = []
    for who, runs in found.items():
        cells = [record.spread([run[k] for run in runs]) for k in ("total", *STAGES)]
        rows.append(
            [
                who,
                *(f"{c['median']:.0f} ({c['min']:.0f} to {c['max']:.0f})" for c in cells),
                str(rounds),
            ]
        )
    head = ["", "seconds in all", *STAGES, "n"]
    text = (
        f"`{record.machine()['command']}`\n\n{record.markdown(head, rows)}\n\nThe plain loop's time"
        f" over ours: {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}). Stages"
        " leave out what comes before the first and after the last."
    )
    figures: dict[str, Any] = {"recipe": recipe, "runs": found, "ratio": ratio}
    record.write(Path(out) if out else None, "whole", figures, text)


if __name__ == "__main__":
    cli.run(main)
