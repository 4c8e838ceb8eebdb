"""One GPU a task, as SLURM binds them; the devices are files that nothing answers (fakes)."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kit.lab import Cluster
from tests.kit.launches import COMMON, ROOT, environment, make_world

pytestmark = pytest.mark.cluster

WAIT = 600


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two hosts of two pretend GPUs each."""
    with Cluster(nodes=2, gpus=2, prefix="gpu", net="10.79.0") as started:
        yield started


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone whose engine/run.py is the one of pretend GPUs."""
    root = make_world(tmp_path_factory.mktemp("gpus"))
    for name in ("selfdistill", "slurm", "launcher", "data", "recipes", "ds_configs", ".venv"):
        (root / name).symlink_to(ROOT / name)
    (root / "engine").mkdir()
    (root / "engine" / "run.py").symlink_to(ROOT / "tests" / "cluster" / "kit" / "gpu_run.py")
    return root


def submit(cluster: Cluster, root: Path, name: str, *words: str) -> tuple[str, str]:
    """Runs stage 1 as a job; its state and its log."""
    args = " ".join(f"--{k} {v}" for k, v in COMMON.items())
    known = {"RECIPE": "", "DATA": "shards", "MODEL": "base", "OUTPUT": f"runs/{name}"}
    env = environment(REAL=str(ROOT), STAGE="pretrain", ARGS=args, **known)
    job = cluster.sbatch(*words, "slurm/stage.sh", cwd=root, env=env)
    return cluster.wait(job, WAIT), cluster.log(job)


@pytest.mark.parametrize("how", ["--gpus-per-task=1", "--gres=gpu:2"])
def test_two_tasks_a_host_have_a_gpu_each(how: str, cluster: Cluster, root: Path) -> None:
    """Bound, each task is shown its own as number 0; unbound, both see both."""
    words = ("--nodes=2", "--ntasks-per-node=2", how)
    state, log = submit(cluster, root, how.strip("-").replace("=", "-"), *words)
    assert state == "COMPLETED", log
    took = [json.loads(line) for line in re.findall(r"TOOK (.*)", log)]
    assert sorted(one["RANK"] for one in took) == ["0", "1", "2", "3"]
    assert len({(one["host"], one["gpu"]) for one in took}) == 4, took
    bound = how == "--gpus-per-task=1"
    for one in took:
        assert one["LOCAL_WORLD_SIZE"] == "2"
        assert one["LOCAL_RANK"] == ("0" if bound else one["SLURM_LOCALID"]), took
    assert "pretrain: done" in log


def test_two_tasks_of_one_gpu_are_told_so(cluster: Cluster, root: Path) -> None:
    words = ("--nodes=1", "--ntasks-per-node=2", "--gres=gpu:1")
    state, log = submit(cluster, root, "shared", *words)
    assert state == "FAILED", log
    (line,) = re.findall(r"^error: .*", log, re.M)
    assert "ranks 0 and 1 on node1 have the same GPU" in line or "ranks 1 and 0 on" in line
    assert "--gpus-per-node=2" in line
    assert "exit code 2" in log
    assert "back to the queue" not in log
