"""Interrupted by signals wherever a run may be, it ends as if nobody had disturbed it."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.engine.monitoring.monitor import read_metrics
from selfdistill.engine.runtime import preemption
from selfdistill.engine.runtime.preemption import AGAIN
from tests.kit import warm
from tests.kit.launches import COMMON, ROOT, environment, launch, make_world, metrics, samples

pytestmark = pytest.mark.multi

#: What a run's figures depend on; the others are times and rates.
TAGS = ("loss/", "feature/", "optimizer/", "val/", "test/")

STAGES = ("pretrain", "distill-1", "finetune")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("preemption"))


def options(root: Path) -> dict[str, object]:
    return COMMON | {
        "stage": "all",
        "zero": "zero1",
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "pretrain.steps": 12,
        "distill.steps": 12,
        "finetune.steps": 12,
        "finetune.eval_every": 4,
        "finetune.dropout": 0.3,
        "save_every": 5,
        "log_samples": True,
        "teacher.mode": "cached",
    }


def figures(stage: Path) -> list[dict[str, float]]:
    return [
        {k: v for k, v in line.items() if k == "step" or k.startswith(TAGS)}
        for line in metrics(stage)
    ]


def same_weights(*stages: Path) -> bool:
    a, b = (load_file(stage / "export" / "model.safetensors") for stage in stages)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.usefixtures("ranks")
def test_many_ranks_agree_every_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [preemption.interval(n) for n in (1, 2, 64, 65, 1000)] == [1, 1, 1, 2, 16]
    # What a thousand ranks spend a step stays at what 64 spend.
    assert preemption.seconds(1024) / preemption.interval(1024) < 1.05 * preemption.seconds(64)
    agreement = preemption.Agreement(1)
    agreement.group, agreement.every = torch.distributed.group.WORLD, 3
    assert not any(agreement.poll() for _ in range(6))
    monkeypatch.setattr(preemption, "_asked", [signal.SIGTERM])
    # At the ninth call the ranks begin to ask each other, at the twelfth they know.
    assert [agreement.poll() for _ in range(6)] == [False] * 5 + [True]
    assert agreement.ask()


def test_interrupted_anywhere_it_ends_bit_for_bit_the_same(root: Path) -> None:
    case = root / "case.json"
    whole, cut = root / "runs" / "whole", root / "runs" / "cut"
    content = {"options": options(root), "whole": str(whole), "cut": str(cut)}
    # Between stages, in the teacher's pass, while scoring in training and at its end.
    aims = ["distill-1", "features, part 3", "/val", "/test"]
    case.write_text(json.dumps(content | {"seed": 3, "most": 12, "aims": aims}))
    done = launch(ROOT / "tests" / "kit" / "interruptions.py", case, ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    found = re.search(r"interrupted at (\[.*\])", done.stdout)
    assert found is not None
    places = json.loads(found[1])
    assert len(places) >= 8, places
    for kind in ("pretrain, step", "distill-1", "features, part", "finetune, step 12 of 12"):
        assert any(kind in place for place in places), (kind, places)
    for stage in STAGES:
        assert same_weights(whole / stage, cut / stage), stage
        assert figures(whole / stage) == figures(cut / stage), stage
        steps = samples(cut / stage)
        assert list(steps) == list(range(1, 13)), stage
        assert steps == samples(whole / stage), stage
        results = [json.loads((r / stage / "result.json").read_text()) for r in (whole, cut)]
        for key in ("losses", "metrics"):
            assert results[0].get(key) == results[1].get(key), (stage, key)


def start(
    root: Path,
    name: str,
    env: dict[str, str] | None = None,
    python: str | Path = sys.executable,
    **more: object,
) -> tuple[subprocess.Popen[str], Path]:
    """A run of one process, until its fifth step, or one that it did itself."""
    folder, began = root / "runs" / name, time.time()
    # So many that a busy machine has time to send a signal before the last of them.
    words = options(root) | {"stage": "pretrain", "pretrain.steps": 4000, "save_every": 9000} | more
    process = subprocess.Popen(
        [python, "engine/run.py", "--output", str(folder)]
        + [word for key, value in words.items() for word in (f"--{key}", str(value))],
        cwd=ROOT,
        env=environment(**(env or {})),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 200
    file = folder / "pretrain" / "metrics.jsonl"
    while len(lines := read_metrics(file)) < 5 or lines[-1]["time"] < began:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return process, folder / "pretrain"


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_ends_with_the_code_that_asks_for_another_launch(
    root: Path, number: signal.Signals
) -> None:
    process, stage = start(root, number.name, python=warm.executable())
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == AGAIN, err
    assert "Traceback" not in err
    line = out.splitlines()[-1]
    at = re.fullmatch(
        rf"interrupted \({number.name}\) at pretrain, step (\d+) of 4000: launch again .*", line
    )
    assert at is not None, line
    (saved,) = (stage / "checkpoints").glob("step-*")
    assert int(saved.name.removeprefix("step-")) == int(at[1])


@pytest.mark.parametrize(
    ("job", "again"),
    [
        ({"SLURM_JOB_ID": "7"}, "SLURM_RESTART_COUNT"),
        ({"SLURM_JOB_ID": "7"}, "SELFDISTILL_AGAIN"),  # spare nodes, slurm/common.sh
        ({"TORCHELASTIC_RESTART_COUNT": "0"}, "TORCHELASTIC_RESTART_COUNT"),
    ],
)
def test_a_job_that_begins_again_does_not_overwrite_what_it_began(
    root: Path, job: dict[str, str], again: str
) -> None:
    process, stage = start(root, again, job, overwrite=True)
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=100)
    assert "(launch without --overwrite)" in out
    seen = len(metrics(stage))
    restarted = job | {again: "1"}
    process, _ = start(root, again, restarted, overwrite=True)
    process.send_signal(signal.SIGUSR2)
    out, _ = process.communicate(timeout=100)
    assert "resumed at step" in out
    assert "deleting" not in out
    assert len(metrics(stage)) >= seen
    if again != "SLURM_RESTART_COUNT":
        return
    other = restarted | {"SLURM_JOB_ID": "8"}  # another job means what it says
    process, _ = start(root, again, other, overwrite=True)
    process.kill()
    out, _ = process.communicate(timeout=100)
    assert "deleting" in out


def test_a_stopped_process_is_found_by_the_others(root: Path) -> None:
    """SIGSTOP on one of two ranks: the other one's watchdog names it and ends the run in time."""
    folder = root / "runs" / "stopped"
    more = {"stage": "pretrain", "pretrain.steps": 100_000, "log_every": 10**6, "watchdog": 20}
    words = options(root) | more | {"output": str(folder)}
    process = subprocess.Popen(
        ["torchrun", "--nproc_per_node=2", "--standalone", "engine/run.py"]
        + [word for key, value in words.items() for word in (f"--{key}", str(value))],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 200
        while not (folder / "pretrain" / "samples" / "rank-00001.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)
        time.sleep(3)
        pulse = json.loads((folder / ".pulse" / "rank-00001.json").read_text())
        os.kill(pulse["pid"], signal.SIGSTOP)
        began = time.monotonic()
        dump = folder / "hang-00000.txt"
        while not dump.exists():
            assert time.monotonic() - began < 100
            time.sleep(0.1)
        took = time.monotonic() - began
        assert 16 < took < 60, "20 s and a look every 4 s, and what the machine's load adds"
        os.kill(pulse["pid"], signal.SIGKILL)  # what torchrun does after half a minute
        _, err = process.communicate(timeout=100)
        assert "error: rank 0 on" in err
        assert re.search(r"rank 1 on \S+ \(pid \d+\) has given no sign of life", err), err
        assert re.search("all_(reduce|gather)|broadcast", dump.read_text())  # it waits in vain
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_torchrun_starts_the_ranks_again(root: Path) -> None:
    """--max_restarts: a rank is killed, and the same job goes on from its newest checkpoint."""
    folder = root / "runs" / "restarted"
    more = {"stage": "pretrain", "pretrain.steps": 150, "save_every": 5, "output": str(folder)}
    process = subprocess.Popen(
        ["torchrun", "--nproc_per_node=2", "--standalone", "--max_restarts=1", "engine/run.py"]
        + [
            word
            for key, value in (options(root) | more).items()
            for word in (f"--{key}", str(value))
        ],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until = time.monotonic() + 200
    while not list((folder / "pretrain" / "checkpoints").glob("step-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(json.loads((folder / ".pulse" / "rank-00001.json").read_text())["pid"], signal.SIGKILL)
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out[-4000:]
    assert "pretrain: resumed at step" in out
    assert list(samples(folder / "pretrain")) == list(range(1, 151))
    assert (folder / "pretrain" / "result.json").exists()


def test_a_launch_of_other_ranks_and_stages_goes_on_at_the_same_sample(root: Path) -> None:
    """2 ranks at ZeRO 1, then 3 at 3, 1 at 2: one stream, the same losses.

    tests/cluster/test_anywhere.py goes 4, 2, 1, 3, 4 on a cluster.
    """
    plan = [(2, "zero1"), (3, "zero3"), (1, "zero2")]
    base = options(root) | {"stage": "pretrain", "pretrain.batch": 24, "save_every": 1000}
    del base["zero"]
    whole, elastic = root / "runs" / "one-layout", root / "runs" / "elastic"

    def words(output: Path, zero: str, steps: int) -> list[str]:
        given = base | {"output": str(output), "zero": zero, "pretrain.steps": 12}
        # tests/kit/stops.py ends a launch by a signal to its last rank at a step.
        case = root / f"{output.name}-{steps}.json"
        case.write_text(json.dumps({"options": given, "stop": steps}))
        return [str(ROOT / "tests" / "kit" / "stops.py"), str(case)]

    done = launch(*words(whole, "zero1", 0), ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for number, (ranks, zero) in enumerate(plan):
        last = number == len(plan) - 1
        stop = 0 if last else 4 * (number + 1)
        done = launch(*words(elastic, zero, stop), ranks=ranks)
        assert done.returncode == (0 if last else AGAIN), (done.stdout + done.stderr)[-4000:]
        if number:
            assert f"saved by {plan[number - 1][0]} ranks" in done.stdout
    stages = (whole / "pretrain", elastic / "pretrain")
    assert samples(stages[0]) == samples(stages[1])
    assert list(samples(stages[1])) == list(range(1, 13))
    for one, other in zip(*map(figures, stages), strict=True):
        assert one["step"] == other["step"]
        assert math.isclose(one["loss/loss"], other["loss/loss"], rel_tol=1e-4)
