"""Time from command to first step, by its parts: `python -m benchmarks.startup`.

Further pre-training of the embedded base on the embedded digits, launched by `deepspeed` as a user
does and by `python` alone, and its distillation, in which the teacher first looks at every image;
rounds alternate. The first round, which fills caches, is not counted.
"""

import json
import os
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
from selfdistill.launcher.examples import __main__ as example

ROOT = Path(__file__).resolve().parent.parent
MARK = "@@ "
PYTHON = [sys.executable]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "1"]
STARTS = {
    "deepspeed": (DEEPSPEED, "pretrain"),
    "python": (PYTHON, "pretrain"),
    "python, --stage distill": (PYTHON, "distill"),
}


def once(launcher: list[str], stage: str, shards: Path, out: Path) -> dict[str, float]:
    """Seconds of each part of one start, and of the whole.

    Raises:
        UserError: it failed.
    """
    words = ["--stage", stage, "--recipe", "vit_small", f"--{stage}.steps", "1"]
    words += [f"--{stage}.batch", "8", "--data", str(shards), "--output", str(out)]
    words += ["--model.image_size", "32"]
    if stage == "distill":  # any model of its shape; the base itself
        words += ["--teacher", str(ROOT / "recipes" / "vit_small"), "--teacher.mode", "cached"]
    environment = os.environ | {"STARTUP_BEGAN": repr(time.time())}
    done = subprocess.run(
        [*launcher, "benchmarks/phases.py", *words],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    told = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not told:
        raise UserError(f"the start failed ({done.returncode}): {done.stderr[-400:]}")
    ends: list[tuple[str, float]] = json.loads(told[0][len(MARK) :])
    before = [0.0, *(end for _, end in ends)]
    parts = {part: end - begin for (part, end), begin in zip(ends, before, strict=False)}
    return parts | {"in all": ends[-1][1]}


def main(rounds: int = 5, out: str | None = None) -> None:
    """Times starts.

    Args:
        rounds: that are counted, of each launcher.
        out: folder for startup.json and startup.md.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds}: give 1 or more")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in STARTS}
    with tempfile.TemporaryDirectory(prefix="startup-") as name:
        folder = Path(name)
        example.main("images", str(folder / "shards"))
        with Progress(transient=True) as progress:
            task = progress.add_task("starts", total=len(STARTS) * (rounds + 1))
            for number in range(rounds + 1):
                for column, (who, (launcher, stage)) in enumerate(STARTS.items()):
                    out_folder = folder / f"{column}-{number}"
                    parts = once(launcher, stage, folder / "shards", out_folder)
                    if number:
                        found[who].append(parts)
                    progress.advance(task)
    rows: list[list[str]] = []
    spreads: dict[str, dict[str, Any]] = {
        who: {part: record.spread([run[part] for run in runs]) for part in runs[0]}
        for who, runs in found.items()
    }
    for part in list(spreads.values())[-1]:  # the stage that has all parts
        cells = [spreads[who].get(part) for who in STARTS]
        rows.append(
            [
                part,
                *(
                    f"{c['median']:.2f} ({c['min']:.2f} to {c['max']:.2f})" if c else ""
                    for c in cells
                ),
            ]
        )
    text = f"`{record.machine()['command']}`: seconds, median (min to max), n = {rounds}\n\n"
    text += record.markdown(["", *(f"`{name}`" for name in STARTS)], rows)
    record.write(Path(out) if out else None, "startup", {"parts": spreads}, text)


if __name__ == "__main__":
    cli.run(main)
