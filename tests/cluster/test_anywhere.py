"""Real jobs of two hosts with two ranks each: preempted anywhere, resumed on other layouts."""

import json
import shutil

import pytest

from tests.cluster.kit.lab import Cluster
from tests.cluster.kit.work import clone, last, signal, submit
from tests.engine.runtime.test_preemption import STAGES, figures, same_weights, samples
from tests.kit.launches import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

#: In training, between stages, in the teacher's pass, while scoring in the middle and at the end.
PLACES = (
    "pretrain: step 7",
    "^distill-1$",
    "features, part 2",
    "distill-1: step 9",
    "^finetune$",
    "/val",
    "/test",
)


def test_preempted_at_every_kind_of_place(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = clone(tmp_path_factory.mktemp("places"), but=("engine",), other=16)
    notes = root / "notes"
    notes.mkdir()
    (root / "engine").mkdir()
    shutil.copy(ROOT / "tests" / "cluster" / "kit" / "lingering_run.py", root / "engine" / "run.py")

    def start(name: str, places: str) -> str:
        env = {"PLACES": places, "NOTES": str(notes), "CLONE": str(ROOT)}
        return submit(
            cluster,
            root,
            name,
            *("--nodes=2", "--ntasks-per-node=2"),
            script="selfdistill.sh",
            env=env,
            zero="zero1",
            save_every=5,
            teacher__mode="cached",
            pretrain__steps=12,
            distill__steps=12,
            finetune__steps=12,
            finetune__batch=4,  # several batches to score on each rank
            finetune__dropout=0.3,
            finetune__eval_every=4,
        )

    job = start("whole", "nowhere")
    assert cluster.wait(job, 400) == "COMPLETED", cluster.log(job)
    job = start("cut", "|".join(PLACES))
    for number in range(len(PLACES)):
        cluster.until((notes / str(number)).exists, 200, PLACES[number])
        assert cluster.state(job) == "RUNNING"
        signal(cluster, job)
    assert cluster.wait(job, 400) == "COMPLETED", cluster.log(job)
    print("\ninterrupted at", [(notes / str(n)).read_text() for n in range(len(PLACES))])
    assert cluster.jobs(job)[0]["Restarts"] == str(len(PLACES))
    whole, cut = (root / "runs" / name for name in ("whole", "cut"))
    for stage in STAGES:
        assert same_weights(whole / stage, cut / stage), stage
        assert figures(whole / stage) == figures(cut / stage), stage
        assert samples(whole / stage) == samples(cut / stage), stage
        assert list(samples(cut / stage)) == list(range(1, 13)), stage
        results = [json.loads((r / stage / "result.json").read_text()) for r in (whole, cut)]
        for key in ("losses", "metrics"):
            assert results[0].get(key) == results[1].get(key), (stage, key)


def test_jobs_of_other_sizes_go_on_at_the_same_sample(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """4 ranks on two hosts, then 2, 1, 3 (on two) and 4: five jobs of one run."""
    root = clone(tmp_path_factory.mktemp("elastic"))
    steps, leg = 300, 30
    plan = [(2, 4, "zero1"), (2, 2, "zero3"), (1, 1, "zero2"), (2, 3, "zero1"), (2, 4, "zero0")]

    def start(name: str, nodes: int, ranks: int, zero: str) -> str:
        return submit(
            cluster,
            root,
            name,
            *(f"--nodes={nodes}", f"--ntasks={ranks}", f"--ntasks-per-node={-(-ranks // nodes)}"),
            env={"MAX_RESTARTS": "0"},  # so that a signal ends the job
            zero=zero,
            pretrain__batch=24,
            pretrain__steps=steps,
            save_every=100,
        )

    job = start("whole", 2, 2, "zero1")
    assert cluster.wait(job, 600) == "COMPLETED", cluster.log(job)
    cut, reached = root / "runs" / "cut" / "pretrain", 0
    for number, (nodes, ranks, zero) in enumerate(plan):
        job = start("cut", nodes, ranks, zero)
        if number < len(plan) - 1:
            aim = reached + leg
            cluster.until(lambda aim=aim: last(cut)[0] >= aim, 300, f"step {aim}")
            signal(cluster, job)
            assert cluster.wait(job, 200) == "FAILED"
            assert "back to the queue" not in cluster.log(job)
            reached = last(cut)[0]
            print(f"\n{ranks} ranks at {zero} left at step {reached}")
            assert reached < steps
        else:
            assert cluster.wait(job, 600) == "COMPLETED", cluster.log(job)
        if number:
            assert f"saved by {plan[number - 1][1]} ranks" in cluster.log(job)
    whole = root / "runs" / "whole" / "pretrain"
    assert samples(whole) == samples(cut)
    assert list(samples(cut)) == list(range(1, steps + 1))
    worst = 0.0
    for one, other in zip(figures(whole), figures(cut), strict=True):
        assert one["step"] == other["step"]
        worst = max(worst, abs(one["loss/loss"] / other["loss/loss"] - 1))
    print(f"largest relative difference of the loss over {steps} steps: {worst:.1e}")
    # Other sums in another order: the difference grows with the steps, slowly.
    assert worst < 1e-4
