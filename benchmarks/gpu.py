"""The long jobs for a machine with a GPU: `python -m benchmarks.gpu JOB --out DIR`.

    base       pre-train a small base of the embedded default from scratch, on images or on texts
    tests      the tests marked gpu
    bench      the benchmark of the distillation step
    reproduce  the paper's experiments on packed data sets, as far as --hours reach, and the report

Each leaves its log, its figures and JOB-machine.json (date, device, versions, commands) in DIR.
"""

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from data import cli, pack
from data.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "deepspeed", "transformers", "timm", "webdataset")


class Job:
    """Runs commands, keeps their output, and records what ran where."""

    def __init__(self, name: str, out: Path) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.name, self.out = name, out
        self.commands: list[dict[str, object]] = []

    def run(self, *words: str) -> None:
        """Runs a command to its end, its output both on the terminal and in the log.

        Raises:
            UserError: it failed.
        """
        shown = " ".join(Path(w).name if w == words[0] else w for w in words)
        print("$ " + shown, flush=True)
        began = time.monotonic()
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with (self.out / f"{self.name}.log").open("a", encoding="utf-8") as log:
            log.write(f"$ {shown}\n")
            process = subprocess.Popen(
                words,
                cwd=ROOT,
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                log.write(line)
        code = process.wait()
        self.commands.append({"command": shown, "seconds": round(time.monotonic() - began, 1)})
        self.record()
        if code:
            raise UserError(f"{shown}: exit code {code}; see {self.out / f'{self.name}.log'}")

    def record(self) -> None:
        """Writes JOB-machine.json."""
        cuda = torch.cuda.is_available()
        (self.out / f"{self.name}-machine.json").write_text(
            json.dumps(
                {
                    "date": datetime.date.today().isoformat(),
                    "device": torch.cuda.get_device_name() if cuda else "cpu",
                    "devices": torch.cuda.device_count(),
                    "versions": {name: version(name) for name in PACKAGES},
                    "commands": self.commands,
                },
                indent=1,
            )
            + "\n"
        )

    def train(self, *words: str) -> None:
        """Runs engine/run.py under the deepspeed launcher, a rank for each GPU."""
        ranks = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
        launcher = shutil.which("deepspeed") or str(Path(sys.executable).with_name("deepspeed"))
        self.run(launcher, "--num_gpus", str(ranks), "engine/run.py", *words)


def main(
    job: Literal["base", "tests", "bench", "reproduce"],
    out: str,
    images: str | None = None,
    texts: str | None = None,
    shards: str | None = None,
    work: str = "runs/gpu",
    steps: int | None = None,
    precision: str = "bf16",
    recipe: str | None = None,
    tables: str = "table1,table2",
    datasets: str | None = None,
    hours: float = 0.13,
    sizes: str = "small:64,vit_base:64,vit_base:256",
    stages: str = "pretrain,distill",
) -> None:
    """Runs one of the long jobs.

    Args:
        job: base, tests, bench or reproduce.
        out: gets logs, figures and weights.
        images: base: folder of images to pre-train on; labels are not used.
        texts: base: file of texts to pre-train on, one a line, instead of images.
        shards: reproduce: folder of packed data sets.
        work: for shards, checkpoints and runs.
        steps: base: optimiser steps, in place of the recipe's.
        precision: of base.
        recipe: of base (default vit_small_base or roberta_small_base).
        tables: reproduce: which, between commas.
        datasets: reproduce: in place of the tables' own.
        hours: reproduce: after which nothing new is started.
        sizes: bench: SIZE:BATCH of benchmarks.step, between commas.
        stages: bench: of the training, between commas.
    """
    here, folder = Job(job, Path(out).resolve()), Path(work).resolve()
    if job == "tests":
        here.run(sys.executable, "-m", "pytest", "-m", "gpu", "-v")
    elif job == "bench":
        for size in sizes.split(","):
            name, _, batch = size.partition(":")
            if not batch.isdigit():
                raise UserError(f"--sizes {size}: give SIZE:BATCH, such as vit_base:256")
            words = ["--size", name, "--batch", batch, "--rounds", "5", "--steps", "5"]
            more = ["teacher=replicated", "compiled=true"]
            words += ["--stages", stages, "--variants", ",".join(more), "--profile", "true"]
            # Folders apart: both of vit_base would be step-vit_base.
            words += ["--out", str(here.out / f"batch-{batch}")]
            here.run(sys.executable, "-m", "benchmarks.step", *words)
    elif job == "base":
        if (images is None) == (texts is None):
            raise UserError("base: give --images FOLDER or --texts FILE, one of the two")
        packed = folder / "base-shards"
        if not (packed / "train" / "manifest.json").exists():
            if images is not None:
                pack.pack(images, str(packed), unlabelled=True, keep_original=True, splits="1")
            else:
                pack.pack(str(texts), str(packed), split="train", samples_per_shard=10_000)
        known = "vit_small_base" if images is not None else "roberta_small_base"
        words = ["--stage", "pretrain", "--recipe", recipe or known]
        words += ["--data", str(packed), "--output", str(folder / "base")]
        words += ["--precision", precision, "--data.workers", str(min(12, os.cpu_count() or 1))]
        if steps:
            words += ["--pretrain.steps", str(steps)]
        here.train(*words)
        stage = folder / "base" / "pretrain"
        shutil.copytree(stage / "export", here.out / "base", dirs_exist_ok=True)
        for name in ("result.json", "metrics.jsonl"):
            shutil.copy(stage / name, here.out / f"base-{name}")
    else:
        if shards is None:
            raise UserError("reproduce: --shards is missing: the folder of packed data sets")
        sweep = str(folder / "experiments")
        words = ["--data_root", shards, "--output", sweep, "--hours", str(hours), "--jobs", "4"]
        words += ["--datasets", datasets] if datasets else []
        try:
            # A GPU has room for several of the small models.
            here.run(sys.executable, "-m", "experiments.run", *tables.split(","), *words)
        finally:
            report = ["-m", "experiments.report", sweep, "--output", str(here.out / "report")]
            here.run(sys.executable, *report)
    here.record()


if __name__ == "__main__":
    cli.run(main)
