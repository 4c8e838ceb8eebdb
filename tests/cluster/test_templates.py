"""The templates and launcher.slurm with real ranks: two hosts, an array, a chain, a mistake."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from selfdistill.data.pack import pack
from tests.cluster.kit.lab import LOGIN, Cluster
from tests.cluster.kit.work import clone
from tests.kit.launches import COMMON, environment, metrics
from tests.kit.shards import class_folders

pytestmark = pytest.mark.cluster

#: Seconds; a busy machine needs minutes for what takes a free one 20 s.
WAIT = 600


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny world, a recipe for it, and a clone: the folder that jobs are submitted from."""
    root = clone(tmp_path_factory.mktemp("jobs"))
    tree: dict[str, object] = {}
    for name, value in COMMON.items():
        section, _, leaf = name.rpartition(".")
        node = tree.setdefault(section, {}) if section else tree
        assert isinstance(node, dict)
        node[leaf] = value
    (root / "tiny.toml").write_text(tomli_w.dumps(tree))
    return root


def env(**more: str) -> dict[str, str]:
    """Of a submission: the recipe, data and model of the tiny world."""
    return environment(RECIPE="tiny.toml", DATA="shards", MODEL="base", **more)


def submit(
    cluster: Cluster, root: Path, *words: str, data: str = "shards", check: bool = True
) -> tuple[list[str], str]:
    """Runs launcher.slurm on the login host; returns the ids and what it printed."""
    command = ["python", "-m", "launcher.slurm", "submit", "--recipe", "tiny.toml"]
    where = ["--data", data, "--model", "base"]
    done = cluster.run(
        LOGIN, *command, *where, *words, cwd=root, env=environment(), check=check, timeout=120
    )
    return re.findall(r"^(\d+)  ", done.stdout, re.M), done.stdout + done.stderr


def test_all_stages_over_two_hosts_of_two_ranks(cluster: Cluster, root: Path) -> None:
    job = cluster.sbatch(
        *("--nodes=2", "--ntasks-per-node=2", "slurm/selfdistill.sh"),
        cwd=root,
        env=env(OUTPUT="runs/all", ARGS="--finetune.seeds '1'"),
    )
    assert cluster.wait(job, WAIT) == "COMPLETED", cluster.log(job)
    assert cluster.jobs(job)[0]["NodeList"] == "node[1-2]"
    for stage in ("pretrain", "distill-1", "finetune"):
        assert (root / "runs" / "all" / stage / "result.json").exists()
    assert len(metrics(root / "runs" / "all" / "pretrain")) == COMMON["pretrain.steps"]
    # Lines are rank 0's: four single processes would print four of each.
    assert cluster.log(job).count("pretrain: done") == 1
    assert not list((root / "runs" / "all").glob(".first-exit*"))


def test_the_unedited_template_runs_the_embedded_default(cluster: Cluster, root: Path) -> None:
    short = " ".join(f"--{stage}.steps 2" for stage in ("pretrain", "distill", "finetune"))
    more = environment(ARGS=f"{short} --finetune.warmup 0 --finetune.seeds 1")
    job = cluster.sbatch("slurm/selfdistill.sh", cwd=root, env=more)
    assert cluster.wait(job, WAIT) == "COMPLETED", cluster.log(job)
    assert cluster.jobs(job)[0]["NumTasks"] == "2"
    result = json.loads((root / "runs" / "slurm" / "run" / "finetune" / "result.json").read_text())
    assert 0 <= result["metrics"]["test_accuracy"] <= 1
    assert (root / "runs" / "slurm" / "example-images" / "test" / "manifest.json").exists()


def test_a_set_is_packed_by_an_array(cluster: Cluster, root: Path) -> None:
    class_folders(root / "pictures", {"ant": 40, "bee": 20})
    pack(str(root / "pictures"), str(root / "one" / "zoo"), samples_per_shard=4)
    words = ["slurm/pack.sh", "pictures", "parts/zoo", "--samples_per_shard", "4"]
    gaps = cluster.sbatch("--array=1,3", *words, cwd=root, env=environment())
    assert cluster.wait(gaps, WAIT) == "FAILED"
    assert "error: the array has gaps" in (root / f"selfdistill-pack-{gaps}_1.log").read_text()
    job = cluster.sbatch("--array=5-7", *words, cwd=root, env=environment())
    assert cluster.wait(job, WAIT) == "COMPLETED"
    logs = [(root / f"selfdistill-pack-{job}_{n}.log").read_text() for n in (5, 6, 7)]
    assert sum("parts/zoo/train: 48 samples, 2 classes, 12 shards" in log for log in logs) == 1
    for shard in (root / "one").rglob("*.*"):
        assert (root / "parts" / shard.relative_to(root / "one")).read_bytes() == shard.read_bytes()


def test_a_sweep_runs_each_seed_in_a_folder_of_its_own(cluster: Cluster, root: Path) -> None:
    job = cluster.sbatch(
        *("--array=0-1", "--ntasks-per-node=1", "slurm/sweep.sh"),
        cwd=root,
        env=env(OUTPUT="runs/sweep"),
    )
    assert cluster.wait(job, WAIT) == "COMPLETED", cluster.log(job)
    for seed in (0, 1):
        run = root / "runs" / "sweep" / f"shards-seed-{seed}"
        assert tomllib.loads((run / "config.toml").read_text())["seed"] == seed
        assert (run / "finetune" / "result.json").exists()


def test_a_chain_with_seeds_completes_in_order(cluster: Cluster, root: Path) -> None:
    words = ["--stages", "pretrain,distill,finetune", "--seeds", "2", "--seed", "3", "--ranks", "1"]
    ids, told = submit(cluster, root, *words, "--output", "runs/chain")
    assert len(ids) == 4, told
    assert f"scancel {' '.join(ids)}" in told
    for job in ids:
        assert cluster.wait(job, WAIT) == "COMPLETED", cluster.log(job)
    ends = [max(one["EndTime"] for one in cluster.jobs(job)) for job in ids]
    begins = [min(one["StartTime"] for one in cluster.jobs(job)) for job in ids]
    assert "has one: nothing to do" in cluster.log(ids[0])
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))
    for seed in (3, 4):
        result = root / "runs" / "chain" / "seeds" / str(seed) / "finetune" / "result.json"
        assert json.loads(result.read_text())["seed"] == seed
    log = root / "runs" / "chain" / "slurm" / f"finetune-{ids[3]}_1.log"
    assert "test_accuracy" in log.read_text()


def test_a_failing_stage_stops_the_chain(cluster: Cluster, root: Path) -> None:
    words = ["--stages", "pretrain,distill,finetune", "--nodes", "2", "--ranks", "1"]
    ids, told = submit(cluster, root, *words, "--output", "runs/failing", data="nowhere")
    assert len(ids) == 4, told
    assert cluster.wait(ids[0], WAIT) == "FAILED"
    first = cluster.jobs(ids[0])[0]
    assert (first["ExitCode"], first["Restarts"]) == ("2:0", "0"), cluster.log(ids[0])
    assert "error: " in cluster.log(ids[0])
    assert "nowhere" in cluster.log(ids[0])
    assert [cluster.wait(job, 30) for job in ids[1:]] == ["CANCELLED"] * 3


def test_a_dry_run_queues_nothing(cluster: Cluster, root: Path) -> None:
    before = len(cluster.jobs())
    ids, told = submit(cluster, root, "--output", "runs/dry", "--dry_run")
    assert ids == []
    assert "sbatch --parsable --nodes=1" in told
    assert len(cluster.jobs()) == before
    assert not (root / "runs" / "dry").exists()


def test_what_slurm_refuses_leaves_nothing_queued(cluster: Cluster, root: Path) -> None:
    before = len(cluster.jobs())
    words = ["--output", "runs/many", "--nodes", "3"]
    _, told = submit(cluster, root, *words, check=False)
    assert told.startswith("error: sbatch refuses all: ")
    assert len(told.splitlines()) == 1
    assert len(cluster.jobs()) == before


def test_a_warned_job_saves_comes_back_and_ends_as_if_nothing_had_been(
    cluster: Cluster, root: Path
) -> None:
    job = cluster.sbatch(
        "slurm/stage.sh",
        cwd=root,
        env=env(STAGE="pretrain", OUTPUT="runs/warned", ARGS="--pretrain.steps 150"),
    )
    stage = root / "runs" / "warned" / "pretrain"
    log = stage / "metrics.jsonl"
    cluster.until(lambda: log.exists() and len(log.read_text().splitlines()) > 5, WAIT, "steps")
    cluster.run(LOGIN, "scancel", "--signal=USR2", job)  # what --signal=USR2@180 sends
    assert cluster.wait(job, WAIT) == "COMPLETED", cluster.log(job)
    assert cluster.jobs(job)[0]["Restarts"] == "1"
    assert "exit code 75: back to the queue, restart 1 of at most 20" in cluster.log(job)
    assert "resumed at step" in cluster.log(job)
    assert [line["step"] for line in metrics(stage)] == list(range(1, 151))
