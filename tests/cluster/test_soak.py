"""Twenty interruptions of one job of two hosts with two ranks each; `make test-faults` runs it.

Ten times SIGUSR2 through SLURM and ten times SIGKILL to one of the ranks, at random moments.
"""

import random
from pathlib import Path

import pytest

from tests.cluster.kit.lab import Cluster
from tests.cluster.kit.work import clone, last, pulse, resumed, signal, submit
from tests.engine.runtime.test_preemption import figures, same_weights, samples

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

STEPS, EVERY, TIMES = 900, 15, 10


def start(cluster: Cluster, root: Path, name: str) -> str:
    return submit(
        cluster,
        root,
        name,
        *("--nodes=2", "--ntasks-per-node=2"),
        stage="finetune",
        finetune__start="model",
        finetune__steps=STEPS,
        finetune__dropout=0.3,
        finetune__eval_every=50,
        zero="zero2",
        save_every=EVERY,
    )


def test_twenty_interruptions_change_nothing(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = clone(tmp_path_factory.mktemp("soak"))
    whole, cut = (root / "runs" / name / "finetune-model" for name in ("whole", "cut"))
    first = start(cluster, root, "whole")
    assert cluster.wait(first, 600) == "COMPLETED", cluster.log(first)
    chance = random.Random(7)
    kinds = ["USR2", "KILL"] * TIMES
    chance.shuffle(kinds)
    job, redone = start(cluster, root, "cut"), 0
    for number, kind in enumerate(kinds):
        cluster.until(lambda n=number: len(resumed(cluster, job)) == n, 300, f"restart {number}")
        # An interval at least, so that the run gets on whatever is killed.
        began = (0, *resumed(cluster, job))[-1]
        aim = began + chance.randint(EVERY + 2, 2 * EVERY)
        # Lines of the launch before are less than an interval ahead of what it saved.
        cluster.until(lambda aim=aim: last(cut)[0] >= aim, 300, f"step {aim}")
        if kind == "USR2":
            signal(cluster, job)
        else:
            rank = chance.randrange(4)
            cluster.run(f"node{rank // 2 + 1}", "kill", "-KILL", str(pulse(cut, rank)))
        at = last(cut)[0]
        cluster.until(lambda n=number: len(resumed(cluster, job)) > n, 300, "the next launch")
        redone += max(0, at - resumed(cluster, job)[-1])
    assert cluster.wait(job, 600) == "COMPLETED", cluster.log(job)
    print(f"\n{len(kinds)} interruptions, {redone} steps done twice")
    assert len(resumed(cluster, job)) == 2 * TIMES
    assert same_weights(whole, cut)
    assert figures(whole) == figures(cut)
    assert samples(whole) == samples(cut)
    assert list(samples(cut)) == list(range(1, STEPS + 1))
