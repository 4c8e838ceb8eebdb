"""What happens to clusters, done to a real job of two hosts; each ends as if it had not happened.

`make test-faults` runs these and prints the table of docs/faults.md.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.kit.lab import LOGIN, Cluster
from tests.cluster.kit.work import clone, last, pulse, resumed, signal, submit
from tests.engine.runtime.test_preemption import figures, same_weights, samples

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

STEPS, EVERY = 600, 20


@dataclass
class Came:
    """What became of a disturbed job."""

    fault: str
    down: float
    redone: int
    restarts: str


TABLE: list[Came] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print("\n\n| what was done | back at work after | steps redone | restarts |")
    print("|---|---|---|---|")
    for row in TABLE:
        print(f"| {row.fault} | {row.down:.0f} s | {row.redone} | {row.restarts} |")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("faults"))


def start(cluster: Cluster, root: Path, name: str, *words: str) -> str:
    return submit(
        cluster,
        root,
        name,
        *("--nodes=2", "--ntasks-per-node=1", *words),
        pretrain__steps=STEPS,
        pretrain__batch=32,
        zero="zero1",
        save_every=EVERY,
        watchdog=20,
    )


@pytest.fixture(scope="module")
def whole(cluster: Cluster, root: Path) -> Path:
    """A run that nobody disturbs."""
    job = start(cluster, root, "whole")
    assert cluster.wait(job, 400) == "COMPLETED", cluster.log(job)
    return root / "runs" / "whole" / "pretrain"


def disturb(
    cluster: Cluster,
    root: Path,
    whole: Path,
    name: str,
    action: Callable[[str, Path], None],
    *words: str,
) -> None:
    """Starts a job, does something to it, and compares its end with the undisturbed one."""
    job = start(cluster, root, name.replace(" ", "-"), *words)
    stage = root / "runs" / name.replace(" ", "-") / "pretrain"
    cluster.until(lambda: last(stage)[0] >= 3 * EVERY + 7, 240, "the first steps")
    began, reached = time.time(), 0
    action(job, stage)
    end = time.monotonic() + 300
    while not (went_on := resumed(cluster, job)):
        reached = max(reached, last(stage)[0])
        assert time.monotonic() < end, cluster.log(job)
        time.sleep(0.1)
    assert cluster.wait(job, 600) == "COMPLETED", cluster.log(job)
    step = went_on[0]
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    back = next(line["time"] for line in lines if line["step"] == step + 1)
    redone = max(0, reached - step)
    TABLE.append(Came(name, back - began, redone, cluster.jobs(job)[0]["Restarts"]))
    assert redone <= EVERY, "no more than an interval is lost"
    assert same_weights(whole, stage)
    assert figures(whole) == figures(stage)
    assert samples(whole) == samples(stage)
    assert list(samples(stage)) == list(range(1, STEPS + 1))


def test_requeue_by_hand(cluster: Cluster, root: Path, whole: Path) -> None:
    def action(job: str, stage: Path) -> None:
        cluster.run(LOGIN, "scontrol", "requeue", job)

    disturb(cluster, root, whole, "scontrol requeue", action)


def test_the_warning_signal(cluster: Cluster, root: Path, whole: Path) -> None:
    def action(job: str, stage: Path) -> None:
        signal(cluster, job)

    disturb(cluster, root, whole, "SIGUSR2", action)


@pytest.mark.parametrize(
    ("name", "partition"),
    [("preempted without grace", "low"), ("preempted with 15 s of grace", "lowgrace")],
)
def test_preemption(cluster: Cluster, root: Path, whole: Path, name: str, partition: str) -> None:
    def action(job: str, stage: Path) -> None:
        cluster.sbatch("--nodes=2", "--exclusive", "--wrap=sleep 5", cwd=root)

    disturb(cluster, root, whole, name, action, f"--partition={partition}", "--exclusive")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(cluster: Cluster, root: Path, whole: Path, rank: int) -> None:
    def action(job: str, stage: Path) -> None:
        cluster.run(f"node{rank + 1}", "kill", "-KILL", str(pulse(stage, rank)))

    disturb(cluster, root, whole, f"SIGKILL of rank {rank}", action)


def test_a_rank_is_stopped(cluster: Cluster, root: Path, whole: Path) -> None:
    """The watchdog (20 s here) finds it."""

    def action(job: str, stage: Path) -> None:
        cluster.run("node2", "kill", "-STOP", str(pulse(stage, 1)))

    disturb(cluster, root, whole, "SIGSTOP of rank 1 with watchdog 20 s", action)
    hang = root / "runs" / "SIGSTOP-of-rank-1-with-watchdog-20-s" / "hang-00000.txt"
    assert "no progress" in hang.read_text()


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_power_cut(cluster: Cluster, root: Path, whole: Path, node: str) -> None:
    def action(job: str, stage: Path) -> None:
        cluster.power_off(node)
        # A host that comes back sooner tells slurmctld of its boot; these share one kernel.
        cluster.until(lambda: cluster.node_states()[node].startswith("down"), 60, "down")
        cluster.power_on(node)

    disturb(cluster, root, whole, f"power cut of {node}", action)


@pytest.mark.parametrize("node", ["node1", "node2"])
def test_network_cut(cluster: Cluster, root: Path, whole: Path, node: str) -> None:
    def action(job: str, stage: Path) -> None:
        cluster.link(node, up=False)
        cluster.until(lambda: cluster.node_states()[node].startswith("down"), 60, "down")
        cluster.link(node, up=True)

    disturb(cluster, root, whole, f"network cut of {node}", action)


def test_time_limit(cluster: Cluster, root: Path, whole: Path) -> None:
    """SLURM's limits are minutes; its warning may come up to a minute early."""

    def action(job: str, stage: Path) -> None:
        cluster.run(LOGIN, "scontrol", "update", f"jobid={job}", "TimeLimit=1")

    disturb(cluster, root, whole, "time limit", action, "--signal=USR2@20", "--time=30")
