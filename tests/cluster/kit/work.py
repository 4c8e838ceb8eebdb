"""Real training jobs on the cluster of a test: submitted, watched, signalled."""

import json
import re
from pathlib import Path

from tests.cluster.kit.lab import LOGIN, Cluster
from tests.kit.launches import COMMON, ROOT, environment, make_world

FOLDERS = (
    "selfdistill",
    "slurm",
    "engine",
    "launcher",
    "data",
    "recipes",
    "ds_configs",
    ".venv",
)


def clone(root: Path, *, but: tuple[str, ...] = (), other: int = 5) -> Path:
    """What a clone holds, with small data, a base model and a teacher beside it."""
    make_world(root, other=other)
    for name in FOLDERS:
        if name not in but:
            (root / name).symlink_to(ROOT / name)
    return root


def submit(
    cluster: Cluster,
    root: Path,
    name: str,
    *words: str,
    script: str = "stage.sh",
    stage: str = "pretrain",
    env: dict[str, str] | None = None,
    **options: object,
) -> str:
    """Queues a job that trains into runs/NAME; returns its id.

    Args:
        cluster: where.
        root: what `clone` made.
        name: of the run.
        words: of sbatch.
        script: the template.
        stage: for stage.sh.
        env: more variables.
        options: of engine/run.py, a dot written as two underscores.
    """
    told = COMMON | {"log_samples": "true"} | {k.replace("__", "."): v for k, v in options.items()}
    args = " ".join(f"--{k} {v}" for k, v in told.items())
    known = {"RECIPE": "", "DATA": "shards", "MODEL": "base", "OUTPUT": f"runs/{name}"}
    env = environment(**known, STAGE=stage, ARGS=args) | (env or {})
    return cluster.sbatch(*words, f"slurm/{script}", cwd=root, env=env)


def signal(cluster: Cluster, job: str) -> None:
    """SLURM's warning, to every rank of a job."""
    cluster.run(LOGIN, "scancel", "--signal=USR2", job)


def last(stage: Path) -> tuple[int, float]:
    """The last logged step, and the time when it was logged."""
    try:
        line = json.loads((stage / "metrics.jsonl").read_text().split("\n")[-2])
    except (OSError, ValueError, IndexError):
        return 0, 0.0
    return int(line["step"]), float(line["time"])


def pulse(stage: Path, rank: int) -> int:
    """Pid of a rank, as its own host numbers it."""
    file = stage.parent / ".pulse" / f"rank-{rank:05d}.json"
    return int(json.loads(file.read_text())["pid"])


def resumed(cluster: Cluster, job: str) -> list[int]:
    """Steps at which a job's restarts went on."""
    return [int(step) for step in re.findall(r": resumed at step (\d+)", cluster.log(job))]
