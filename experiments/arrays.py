"""The jobs of a sweep as SLURM arrays: one array a level, each after the level before.

A task whose needs failed says so and ends; the others of its level go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from data.errors import UserError
from engine.files import write_text
from experiments import state
from experiments.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
LEVELS = "levels.json"


def submit(root: Path, plan: Plan) -> list[str]:
    """Queues what is open; returns the arrays' ids.

    Raises:
        UserError: SLURM is not here, or refuses an array.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on PATH: run this on a login node of the cluster")
    levels = [
        [job.name for job in level if state.status(root, job) != "done"] for level in plan.levels()
    ]
    levels = [level for level in levels if level]
    if not levels:
        print("everything is complete")
        return []
    write_text(root / LEVELS, json.dumps(levels, indent=1) + "\n")
    (root / "logs").mkdir(exist_ok=True)
    ids: list[str] = []
    told = os.environ | {"SWEEP": str(root), "SELFDISTILL_ROOT": str(ROOT)}
    for number, level in enumerate(levels):
        # Not afterok: one failed task must not stop those that do not need it.
        wait = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        command = [
            *("sbatch", "--parsable", f"--array=0-{len(level) - 1}", *wait),
            *(f"--output={root}/logs/%x-%A_%a.log", f"--job-name=level-{number}"),
            str(ROOT / "slurm" / "experiments.sh"),
        ]
        done = subprocess.run(
            command, env=told | {"LEVEL": str(number)}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            if ids:
                subprocess.run(["scancel", *ids], check=False)
            raise UserError(f"sbatch refuses level {number}: {done.stderr}: nothing stays queued")
        ids.append(done.stdout.strip().partition(";")[0])
        print(f"{ids[-1]}  level {number}: {', '.join(level)}")
    print(f"follow: squeue --jobs {','.join(ids)}; python -m experiments.report {root}")
    print(f"stop:   scancel {' '.join(ids)}")
    return ids
