"""How the templates end a job, on a real SLURM: ranks are stubs that end as the test says."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.kit.lab import LOGIN, Cluster

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.cluster


class Stubs:
    """A clone whose engine/run.py is the stub, and a cluster to submit it to."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.cluster, self.root = cluster, root
        (root / "engine").mkdir()
        shutil.copy(ROOT / "tests" / "cluster" / "kit" / "stub_run.py", root / "engine" / "run.py")
        (root / "slurm").symlink_to(ROOT / "slurm")

    def submit(self, plan: str, *options: str, script: str = "selfdistill.sh", **env: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        told = {
            "PATH": path,
            "DATA": "none",
            "PLAN": plan,
            "OUTPUT": f"out-{time.monotonic_ns()}",
        } | env
        words = ("--nodes=2", "--ntasks-per-node=1", *options, f"slurm/{script}")
        return self.cluster.sbatch(*words, cwd=self.root, env=told)

    def end(self, job: str, timeout: float = 90) -> tuple[str, str, str]:
        """State, exit code (code:signal) and restarts of an ended job."""
        self.cluster.wait(job, timeout)
        told = self.cluster.jobs(job)[0]
        return told["JobState"], told["ExitCode"], told["Restarts"]

    def log(self, job: str) -> str:
        return self.cluster.log(job)

    def running(self, job: str) -> None:
        """Waits until both ranks of a job are up, in its first run."""
        started = [f"run 0 rank {rank}" for rank in (0, 1)]

        def met() -> bool:
            return self.cluster.state(job) == "RUNNING" and all(s in self.log(job) for s in started)

        self.cluster.until(met, 60, f"ranks of job {job}")

    def slurm(self, *words: str) -> None:
        self.cluster.run(LOGIN, *words)


@pytest.fixture(scope="module")
def stubs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Stubs:
    return Stubs(cluster, tmp_path_factory.mktemp("clone"))


# A requeued job waits for some 9 s: those that do not need each other wait together.


@pytest.fixture(scope="module")
def preempted(stubs: Stubs) -> dict[str, str]:
    """By partition: a job of low priority that one of higher took the node from."""
    here = {"low": "node1", "lowgrace": "node2"}
    one = ("--nodes=1", "--ntasks-per-node=2", "--exclusive")
    jobs = {p: stubs.submit("", *one, f"-p{p}", f"-w{here[p]}") for p in here}
    for job in jobs.values():
        stubs.running(job)
    for node in here.values():
        stubs.submit("0.*=0", *one, f"-w{node}")
    for job in jobs.values():
        stubs.end(job)
    return jobs


@pytest.fixture(scope="module")
def jobs(stubs: Stubs, preempted: dict[str, str]) -> dict[str, str]:
    """Jobs by what is done to them. After those of `preempted`, whose nodes they would take."""
    sets = {"DATASETS": "/s/a /s/b", "OUTPUT": "o"}
    found = {
        "well": stubs.submit("0.*=0"),
        "capped": stubs.submit("0.*=75,1.*=75,2.*=75", MAX_RESTARTS="1"),
        "killed": stubs.submit("0.1=-9"),
        "array": stubs.submit("0.*=75", "--array=1-2", "-N1", script="sweep.sh", **sets),
        "one of an array": stubs.submit(
            *("0/0.*=0,1/0.*=0,2/0.*=75", "--array=0-2", "-N1"),
            script="sweep.sh",
            **(sets | {"OUTPUT": "three"}),
        ),
        "array, cancelled": stubs.submit(
            *("", "--array=0-1", "-N1"), script="sweep.sh", **(sets | {"OUTPUT": "two"})
        ),
        "first": stubs.submit("0.*=75"),
        "no requeue": stubs.submit("0.*=75", "--no-requeue"),
    }
    after = (f"--dependency=afterok:{found['first']}", "--kill-on-invalid-dep=yes")
    found["after"] = stubs.submit("0.*=0", *after)
    signalled = {
        "usr2": ("scancel", "--signal=USR2"),
        "by hand": ("scontrol", "requeue"),
        "cancelled": ("scancel",),
    }
    for name, words in signalled.items():
        found[name] = stubs.submit("")
        stubs.running(found[name])
        stubs.slurm(*words, found[name])
    return found


@pytest.mark.parametrize("partition", ["low", "lowgrace"])
def test_a_preempted_job_comes_back_once(
    stubs: Stubs, preempted: dict[str, str], partition: str
) -> None:
    job = preempted[partition]
    assert stubs.end(job) == ("COMPLETED", "0:0", "1"), stubs.log(job)


@pytest.mark.parametrize("name", ["usr2", "by hand", "killed", "first"])
def test_a_job_that_can_go_on_comes_back_once(
    stubs: Stubs, jobs: dict[str, str], name: str
) -> None:
    assert stubs.end(jobs[name]) == ("COMPLETED", "0:0", "1"), stubs.log(jobs[name])
    if name == "killed":
        told = "rank 1 on node2 was the first to fail, with exit code 137"
        assert told in stubs.log(jobs[name])


def test_exit_code_75_is_requeued_until_the_cap(stubs: Stubs, jobs: dict[str, str]) -> None:
    assert stubs.end(jobs["capped"]) == ("FAILED", "75:0", "1"), stubs.log(jobs["capped"])
    assert "restart 1 of at most 1 without progress" in stubs.log(jobs["capped"])
    assert "75 after 1 restarts without progress, MAX_RESTARTS=1: no more" in stubs.log(
        jobs["capped"]
    )


def test_the_tasks_of_an_array_come_back_each(stubs: Stubs, jobs: dict[str, str]) -> None:
    # Each has an OUTPUT, DATA and seed of its own: index i is set i mod 2, seed i div 2.
    job = jobs["array"]
    assert stubs.cluster.wait(job, 90) == "COMPLETED"
    assert [one["Restarts"] for one in stubs.cluster.jobs(job)] == ["1", "1"]
    log = stubs.log(job)
    assert "--stage all --seed 0 --output o/b-seed-0 --recipe quickstart --data /s/b" in log
    assert "--stage all --seed 1 --output o/a-seed-1 --recipe quickstart --data /s/a" in log


def test_one_task_comes_back_and_leaves_the_others_alone(
    stubs: Stubs, jobs: dict[str, str]
) -> None:
    # The last task of an array has the array's own number, which to scontrol means all tasks.
    job = jobs["one of an array"]
    assert stubs.cluster.wait(job, 90) == "COMPLETED"
    told = {one["ArrayTaskId"]: one["Restarts"] for one in stubs.cluster.jobs(job)}
    assert told == {"0": "0", "1": "0", "2": "1"}


def test_a_cancelled_task_stays_cancelled(stubs: Stubs, jobs: dict[str, str]) -> None:
    job = jobs["array, cancelled"]

    def state(task: str) -> tuple[str, str]:
        (one,) = (j for j in stubs.cluster.jobs(job) if j["ArrayTaskId"] == task)
        return one["JobState"], one["Restarts"]

    stubs.cluster.until(lambda: stubs.log(job).count("run 0 rank 0") == 2, 60, "both tasks")
    stubs.slurm("scancel", f"{job}_1")
    stubs.cluster.until(lambda: "SLURM ends the job itself" in stubs.log(job), 30)
    stubs.cluster.until(lambda: state("1") == ("CANCELLED", "0"), 30)
    assert state("0") == ("RUNNING", "0")
    stubs.slurm("scancel", job)


def test_a_dependant_waits_for_the_requeued_job(stubs: Stubs, jobs: dict[str, str]) -> None:
    assert stubs.end(jobs["after"]) == ("COMPLETED", "0:0", "0")
    first, after = (stubs.cluster.jobs(jobs[name])[0] for name in ("first", "after"))
    assert (first["Restarts"], first["JobState"]) == ("1", "COMPLETED")
    assert first["EndTime"] <= after["StartTime"]


def test_a_cancelled_job_stays_cancelled(stubs: Stubs, jobs: dict[str, str]) -> None:
    job = jobs["cancelled"]
    assert stubs.end(job)[::2] == ("CANCELLED", "0"), stubs.log(job)
    stubs.cluster.until(lambda: "SLURM ends the job itself" in stubs.log(job), 20)
    assert stubs.end(job)[::2] == ("CANCELLED", "0"), stubs.log(job)


def test_a_job_that_may_not_be_requeued_ends_with_its_code(
    stubs: Stubs, jobs: dict[str, str]
) -> None:
    job = jobs["no requeue"]
    assert stubs.end(job) == ("FAILED", "75:0", "0"), stubs.log(job)


def test_a_job_that_ends_well_is_complete(stubs: Stubs, jobs: dict[str, str]) -> None:
    assert stubs.end(jobs["well"]) == ("COMPLETED", "0:0", "0")
    assert "error" not in stubs.log(jobs["well"])


@pytest.mark.parametrize("code", ["1", "2"])
def test_the_first_rank_to_fail_gives_the_exit_code_and_no_requeue(stubs: Stubs, code: str) -> None:
    # srun ends rank 0 then, which gives 75: no reason to try again.
    job = stubs.submit(f"0.1={code}")
    assert stubs.end(job) == ("FAILED", f"{code}:0", "0"), stubs.log(job)
    assert f"rank 1 on node2 was the first to fail, with exit code {code}" in stubs.log(job)


def test_an_output_that_cannot_be_written_is_told_at_once(stubs: Stubs) -> None:
    (stubs.root / "file").touch()
    job = stubs.submit("", OUTPUT="file/run")
    assert stubs.end(job) == ("FAILED", "2:0", "0")
    assert "error: OUTPUT=file/run cannot be written" in stubs.log(job)


def test_only_the_lock_of_a_build_that_is_gone_is_removed(stubs: Stubs, tmp_path: Path) -> None:
    locks = [tmp_path / name / "lock" for name in ("old", "new")]
    for lock in locks:
        lock.parent.mkdir()
        lock.touch()
    os.utime(locks[0], (time.time() - 900,) * 2)
    job = stubs.submit("0.*=0", TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert stubs.end(job)[0] == "COMPLETED"
    assert [lock.exists() for lock in locks] == [False, True]
