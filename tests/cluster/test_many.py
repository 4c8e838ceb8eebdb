"""Many ranks over several hosts, which do what few do, and many records.

`SELFDISTILL_HOSTS=4 SELFDISTILL_TASKS=8 make test-cluster ARGS="-k many_ranks -s"` is the long form
of the first, of 32 ranks, for a machine with 20 GB to spare;
`SELFDISTILL_RECORDS=10000000 make test-cluster ARGS="-k many_records -s"` that of the second, for
20 GB of disk.
"""

import contextlib
import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from selfdistill.data.shards.manifest import Manifest
from tests.cluster.kit.lab import LOGIN, Cluster
from tests.cluster.kit.work import clone, last, pulse, resumed, submit
from tests.engine.runtime.test_preemption import figures, samples
from tests.kit.launches import environment, metrics
from tests.kit.texts import make_language

pytestmark = pytest.mark.cluster

HOSTS = int(os.environ.get("SELFDISTILL_HOSTS", "2"))
TASKS = int(os.environ.get("SELFDISTILL_TASKS", "4"))
STEPS, BATCH = 60, 32

RECORDS = int(os.environ.get("SELFDISTILL_RECORDS", "20000"))
PARTS, SHARDS = 8, 1000 if RECORDS >= 1_000_000 else 40
RECORDS_BATCH = max(16, RECORDS // 1250)
RECORDS_STEPS, SAVED, KILLED = 400, 50, 320  # step 320 stands a quarter into the set
WAIT = 300 + RECORDS // 500
WORDS = ("cell", "stain", "edge", "leaf", "field", "node", "light", "bone", "lung", "scan")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Two cores that start 32 ranks do not answer within ten seconds.
    with Cluster(nodes=HOSTS, patience=10 if HOSTS * TASKS <= 8 else 100) as started:
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


class Phases:
    """Prints what a phase took: time, processor time of the machine, memory of one process."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @contextlib.contextmanager
    def phase(self, name: str, word: str) -> Iterator[None]:
        """A phase, whose work is done by processes in root that are called so."""
        most = [0]
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                for process in psutil.process_iter(["cmdline", "cwd", "memory_info"]):
                    known = process.info
                    named = any(part.endswith(word) for part in known["cmdline"] or ())
                    if named and known["cwd"] == str(self.root):
                        most[0] = max(most[0], known["memory_info"].rss)

        watching = threading.Thread(target=watch)
        watching.start()
        began = time.time()
        try:
            yield
        finally:
            ended.set()
            watching.join()
        told = f"{name}: {time.time() - began:.0f} s, a process at most {most[0] / 2**20:.0f} MiB"
        print(told, flush=True)


def test_many_records(cluster: Cluster, tmp_path: Path) -> None:
    root = clone(tmp_path)
    phase = Phases(root).phase
    draw = random.Random(0)
    with (root / "records.txt").open("w") as file:
        for number in range(RECORDS):
            file.write(f"{number} {' '.join(draw.choices(WORDS, k=2))}\n")

    with phase(f"{RECORDS:,} records packed in {PARTS} parts", "data.pack"):
        words = ["slurm/pack.sh", "records.txt", "big", "--split", "train", "--unlabelled", "true"]
        words += ["--samples_per_shard", str(-(-RECORDS // SHARDS))]
        job = cluster.sbatch(f"--array=1-{PARTS}", *words, cwd=root, env=environment())
        assert cluster.wait(job, WAIT) == "COMPLETED", next(root.glob("*.log")).read_text()
    packed = Manifest.load(str(root / "big" / "train"))
    assert (packed.samples, len(packed.shards)) == (RECORDS, SHARDS)

    with phase("verified", "data.verify"):
        words = ["python", "-m", "data.verify", "big", "--workers", "2"]
        told = environment(PYTHONPATH=str(root))
        cluster.run(LOGIN, *words, cwd=root, env=told, timeout=WAIT)

    make_language(root / "language")
    began = time.time()
    with phase(
        f"trained for {RECORDS_STEPS} steps of {RECORDS_BATCH}, one rank killed", "engine/run.py"
    ):
        told = {"RECIPE": "roberta_small", "DATA": "big", "MODEL": "language"}
        job = submit(
            *(cluster, root, "run", "--nodes=2", "--ntasks-per-node=1"),
            env=told,
            pretrain__steps=RECORDS_STEPS,
            pretrain__batch=RECORDS_BATCH,
            pretrain__warmup=10,
            save_every=SAVED,
            log_samples=False,
            text__max_length=16,
        )
        stage = root / "runs" / "run" / "pretrain"

        def reaches(step: int) -> None:
            def there() -> bool:
                assert cluster.state(job) in ("PENDING", "RUNNING"), cluster.log(job)
                return last(stage)[0] >= step

            cluster.until(there, WAIT, f"step {step}")

        reaches(1)
        print(f"first step after {last(stage)[1] - began:.0f} s")
        reaches(KILLED)
        before = {line["step"]: line["loss/loss"] for line in metrics(stage)}
        killed = time.time()
        cluster.run("node2", "kill", f"-{int(signal.SIGKILL)}", str(pulse(stage, 1)))
        assert cluster.wait(job, WAIT) == "COMPLETED", cluster.log(job)
    after = {line["step"]: line for line in metrics(stage)}
    (step,) = resumed(cluster, job)
    assert step % SAVED == 0
    assert KILLED - step < 2 * SAVED
    print(f"back at step {step + 1} after {after[step + 1]['time'] - killed:.0f} s")
    again = {number: after[number]["loss/loss"] for number in before}
    assert again == before, "the same samples, to the last bit of every loss"
    assert sorted(after) == list(range(1, RECORDS_STEPS + 1))
