"""The jobs of a sweep as SLURM arrays: one array a level, each after the level before.

A task whose needs failed says so and ends; the others of its level go on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.experiments import state
from selfdistill.experiments.plan import Plan

ROOT = Path(__file__).resolve().parent.parent
#: Ids of the arrays that were queued last.
QUEUED = "slurm.json"


def check(root: Path) -> None:
    """Refuses to queue anything; before the sweep is changed, by which queued tasks go.

    Raises:
        UserError: SLURM is not here, or arrays of an earlier call have not ended.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on PATH: run this on a login node of the cluster")
    if left := _queued(root):
        raise UserError(
            f"{root}: arrays {', '.join(left)} of an earlier call are still queued or running:"
            f" wait for them, or scancel {' '.join(left)}"
        )


def submit(root: Path, plan: Plan) -> list[str]:
    """Queues what is open; returns the arrays' ids.

    Raises:
        UserError: SLURM refuses an array.
    """
    names = {job.name for job in state.wanted(root, plan)}
    levels = [[job.name for job in level if job.name in names] for level in plan.levels()]
    levels = [level for level in levels if level]
    if not levels:
        print("everything is complete")
        return []
    # A file of its own: a task that is requeued later must find the jobs of its own array.
    plan_file = root / "slurm" / f"levels-{time.time_ns()}.json"
    plan_file.parent.mkdir(exist_ok=True)
    write_text(plan_file, json.dumps(levels, indent=1) + "\n")
    (root / "logs").mkdir(exist_ok=True)
    ids: list[str] = []
    environment = os.environ | {
        "SWEEP": str(root),
        "LEVELS": str(plan_file),
        "SELFDISTILL_ROOT": str(ROOT),
        # All that the templates would take from these is told to each task.
        **dict.fromkeys(("RECIPE", "DATA", "DATASETS", "MODEL", "ARGS"), ""),
    }
    for number, level in enumerate(levels):
        # Not afterok: one failed task must not stop those that do not need it.
        wait = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        command = [
            # Whatever SBATCH_EXPORT says: the tasks live on these variables.
            *("sbatch", "--parsable", "--export=ALL", f"--array=0-{len(level) - 1}", *wait),
            *(f"--output={root}/logs/%x-%A_%a.log", f"--job-name=level-{number}"),
            str(ROOT / "slurm" / "experiments.sh"),
        ]
        done = subprocess.run(
            command,
            env=environment | {"LEVEL": str(number)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            if ids:
                subprocess.run(["scancel", *ids], check=False)
            raise UserError(f"sbatch refuses level {number}: {done.stderr}: nothing stays queued")
        ids.append(done.stdout.strip().partition(";")[0])
        print(f"{ids[-1]}  level {number}: {', '.join(level)}")
    write_text(root / QUEUED, json.dumps(ids) + "\n")
    print(f"follow: squeue --jobs {','.join(ids)}; python -m experiments.report {root}")
    print(f"stop:   scancel {' '.join(ids)}")
    return ids


def _queued(root: Path) -> list[str]:
    """Arrays of the last call that have not ended."""
    try:
        ids = [str(one) for one in json.loads((root / QUEUED).read_text(encoding="utf-8"))]
    except (OSError, ValueError):
        return []
    listed = subprocess.run(
        ["squeue", "-h", "-o", "%F"], capture_output=True, text=True, check=False
    )
    return [one for one in ids if one in listed.stdout.split()]
