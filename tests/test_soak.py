"""Twenty interruptions of one run by real signals to real processes; `make test-faults` runs it.

Ten times SIGUSR2 and ten times SIGKILL, each at a random moment to a random one of two ranks.
"""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from engine.preemption import AGAIN
from tests.helpers import COMMON, ROOT, environment, free_port, make_world
from tests.test_preemption import figures, same_weights, samples

pytestmark = [pytest.mark.multi, pytest.mark.faults]

STEPS, EVERY, TIMES = 900, 15, 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("soak"))


def start(root: Path, name: str) -> "subprocess.Popen[bytes]":
    options = COMMON | {
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.steps": STEPS,
        "finetune.dropout": 0.3,
        "finetune.eval_every": 50,
        "zero": "zero2",
        "save_every": EVERY,
        "log_samples": True,
        "data": root / "shards",
        "model": root / "base",
        "output": root / "runs" / name,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    head = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "engine/run.py"]
    log = open(root / f"{name}.log", "ab")  # noqa: SIM115  the child's
    return subprocess.Popen(
        [*head, *words], cwd=ROOT, env=environment(), stdout=log, stderr=subprocess.STDOUT
    )


def steps(stage: Path) -> int:
    """Lines that the run has logged; a fault is due some of them later."""
    file = stage / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def test_twenty_interruptions_change_nothing(root: Path) -> None:
    assert start(root, "whole").wait() == 0
    whole, cut = (root / "runs" / name / "finetune-model" for name in ("whole", "cut"))
    chance = random.Random(7)
    kinds = [signal.SIGUSR2, signal.SIGKILL] * TIMES
    chance.shuffle(kinds)
    for kind in kinds:
        process, rank = start(root, "cut"), chance.randrange(2)
        seen, until = steps(cut), time.monotonic() + 300
        pulse = root / "runs" / "cut" / ".pulse" / f"rank-{rank:05d}.json"
        pulse.unlink(missing_ok=True)
        # An interval at least, so that the run gets on whatever is killed.
        more = chance.randint(EVERY + 2, 2 * EVERY)
        while not pulse.exists() or steps(cut) < min(seen, steps(cut)) + more:
            assert process.poll() is None, (root / "cut.log").read_text()[-3000:]
            assert time.monotonic() < until
            seen = min(seen, steps(cut))  # a resumed run cuts the lines that it does again
            time.sleep(0.01)
        os.kill(json.loads(pulse.read_text())["pid"], kind)
        code = process.wait(120)
        assert code == AGAIN if kind == signal.SIGUSR2 else code != 0, (kind, code)
    assert start(root, "cut").wait() == 0
    assert same_weights(whole, cut)
    assert figures(whole) == figures(cut)
    assert samples(whole) == samples(cut)
    assert list(samples(cut)) == list(range(1, STEPS + 1))
