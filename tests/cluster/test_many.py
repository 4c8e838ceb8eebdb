"""Many ranks over several hosts: how long they take to begin, and that they do what few do.

`SELFDISTILL_HOSTS=4 SELFDISTILL_TASKS=8 make test-cluster ARGS="-k many -s"` is the long form, of
32 ranks, for a machine with 20 GB to spare.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kit.lab import Cluster
from tests.cluster.kit.work import clone, last, resumed, submit
from tests.engine.runtime.test_preemption import figures, samples
from tests.kit.launches import metrics

pytestmark = pytest.mark.cluster

HOSTS = int(os.environ.get("SELFDISTILL_HOSTS", "2"))
TASKS = int(os.environ.get("SELFDISTILL_TASKS", "4"))
STEPS, BATCH = 60, 32


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(nodes=HOSTS) as started:
        yield started


def test_many_ranks_do_what_few_do(cluster: Cluster, tmp_path: Path) -> None:
    root = clone(tmp_path)

    def run(name: str, hosts: int, tasks: int, lost: str | None = None) -> tuple[Path, str]:
        began = time.time()
        job = submit(
            *(cluster, root, name, f"--nodes={hosts}", f"--ntasks-per-node={tasks}"),
            pretrain__steps=STEPS,
            pretrain__batch=BATCH,
            zero="zero1",
            save_every=20,
            watchdog=120,
        )
        stage = root / "runs" / name / "pretrain"
        if lost is not None:
            cluster.until(lambda: last(stage)[0] >= 25, 1200, "step 25")
            off = time.time()
            cluster.power_off(lost)
            cluster.until(lambda: cluster.node_states()[lost].startswith("down"), 300, "down")
            cluster.power_on(lost)
        assert cluster.wait(job, 1800) == "COMPLETED", cluster.log(job)
        at = {line["step"]: line["time"] for line in metrics(stage)}
        told = f"{hosts * tasks} ranks on {hosts} hosts: first step after {at[1] - began:.0f} s"
        told += f", then {1000 * (at[20] - at[1]) / 19:.0f} ms a step"
        if lost is not None:
            step = resumed(cluster, job)[0] + 1
            told += f"; a host lost, back at step {step} after {at[step] - off:.0f} s"
        print(f"\n{told}; {time.time() - began:.0f} s in all")
        return stage, cluster.log(job)

    few, _ = run("few", 2, 2)
    many, said = run("many", HOSTS, TASKS, lost=f"node{HOSTS}")
    assert samples(few) == samples(many), "each step has the same samples"
    assert list(samples(many)) == list(range(1, STEPS + 1))
    for one, other in zip(figures(few), figures(many), strict=True):
        assert one == pytest.approx(other, rel=2e-4), "sums in another order, and nothing else"
    assert len(re.findall("Traceback", said)) == 0
