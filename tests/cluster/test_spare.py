"""Spare nodes: a node of a running job loses its power, and the job goes on without leaving."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kit.lab import Cluster
from tests.cluster.kit.work import clone, last, resumed, submit
from tests.engine.runtime.test_preemption import figures, same_weights, samples

pytestmark = pytest.mark.cluster

STEPS, EVERY = 300, 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three hosts: more than the shared ones."""
    with Cluster(nodes=3) as started:
        yield started


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("spare"))


def start(cluster: Cluster, root: Path, name: str, *words: str, **env: str) -> str:
    return submit(
        cluster,
        root,
        name,
        *("--ntasks-per-node=1", *words),
        env=env,
        pretrain__steps=STEPS,
        pretrain__batch=8,
        zero="zero1",
        save_every=EVERY,
        watchdog=60,
    )


def test_it_goes_on_on_the_spare_node_and_then_on_fewer(cluster: Cluster, root: Path) -> None:
    whole = start(cluster, root, "whole", "--nodes=2")
    assert cluster.wait(whole, 600) == "COMPLETED", cluster.log(whole)
    job = start(*(cluster, root, "cut", "--nodes=3", "--no-kill"), USED_NODES="2", MIN_NODES="1")
    stage = root / "runs" / "cut" / "pretrain"

    def loses(node: str, step: int) -> None:
        cluster.until(lambda: last(stage)[0] >= step, 300, f"step {step}")
        cluster.power_off(node)

    loses("node2", EVERY + 7)
    cluster.until(lambda: len(resumed(cluster, job)) == 1, 300, "back at work")
    first = resumed(cluster, job)[0]
    loses("node3", first + EVERY + 7)
    assert cluster.wait(job, 600) == "COMPLETED", cluster.log(job)
    said = cluster.log(job)
    assert "node2 does not answer: 2 nodes are left\ngoing on with 2 of them\n" in said
    assert "node3 does not answer: 1 nodes are left\ngoing on with 1 of them\n" in said
    assert ", saved by 2 ranks" in said  # the last launch is of one
    assert cluster.jobs(job)[0]["Restarts"] == "0"
    steps = [resumed(cluster, job)[1], STEPS]
    pairs = [figures(root / "runs" / name / "pretrain") for name in ("whole", "cut")]
    assert pairs[0][: steps[0]] == pairs[1][: steps[0]], "two ranks, bit for bit"
    assert samples(root / "runs" / "whole" / "pretrain") == samples(stage)
    assert not same_weights(root / "runs" / "whole" / "pretrain", stage)  # one rank sums otherwise
    for name in ("node2", "node3"):
        cluster.power_on(name)
    cluster.until(lambda: set(cluster.node_states().values()) == {"idle"}, 60, "idle")


def test_below_the_least_it_goes_back_to_the_queue(cluster: Cluster, root: Path) -> None:
    job = start(cluster, root, "least", "--nodes=2", "--no-kill", USED_NODES="2")
    stage = root / "runs" / "least" / "pretrain"
    cluster.until(lambda: last(stage)[0] >= EVERY + 7, 300, "the first steps")
    cluster.power_off("node2")
    cluster.until(lambda: "back to the queue" in cluster.log(job), 120, "the queue")
    cluster.power_on("node2")
    assert cluster.wait(job, 600) == "COMPLETED", cluster.log(job)
    # Once by the script, and once more by SLURM itself where it meets the lost node first.
    assert cluster.jobs(job)[0]["Restarts"] in ("1", "2")


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"USED_NODES": "4"}, "error: USED_NODES=4: give a number of nodes from 1 to 3"),
        ({"USED_NODES": "x"}, "error: USED_NODES=x: give a number of nodes from 1 to 3"),
        ({"MAX_RESTARTS": "2O"}, "error: MAX_RESTARTS=2O: give a number"),
        (
            {"USED_NODES": "2", "MIN_NODES": "3"},
            "error: MIN_NODES=3: give a number of nodes from 1 to 2",
        ),
    ],
)
def test_mistakes(cluster: Cluster, root: Path, env: dict[str, str], told: str) -> None:
    job = start(cluster, root, "mistake", "--nodes=3", **env)
    assert cluster.wait(job, 60) == "FAILED"
    assert cluster.log(job).splitlines()[-1] == told
    assert cluster.jobs(job)[0]["ExitCode"] == "2:0"
