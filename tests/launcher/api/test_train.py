"""`selfdistill train`: the run, a quiet terminal, the exit code of the ranks."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfdistill.data.errors import TryAgain
from selfdistill.engine.runtime.preemption import AGAIN
from selfdistill.launcher.api import training
from selfdistill.launcher.train import Launch
from tests.kit import warm
from tests.kit.launches import COMMON, ROOT, environment, make_world, metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("train"))


def words(root: Path, name: str, **more: object) -> list[str]:
    table = COMMON | {"data": root / "shards", "model": root / "base", "output": root / name} | more
    return [f"--{key}={value}" for key, value in table.items()]


TRAIN = ("-m", "selfdistill", "train")


def call(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [warm.executable(), *TRAIN, *map(str, words)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.multi
def test_the_terminal_has_this_programs_lines_and_the_log_the_others(root: Path) -> None:
    given = words(root, "run", **{"stage": "pretrain", "zero": "zero1"})
    done = call("--num_gpus", "2", *given)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    run = root / "run"
    assert lines[0] == (
        f"{run}: stage pretrain, model {root / 'base'}, data {root / 'shards'}, 2 processes on"
        " cpu, fp32, zero1; libraries' messages: log.txt"
    )
    own = re.compile(
        rf"pretrain |pretrain: |{root / 'base'}: no preprocessor|  |next:$"
        r"|note: of no use to --stage pretrain: --distill.batch, --distill.steps, --finetune"
        r"|pretrain, step \d: rank \d on \S+ holds the others up: "  # so it may, beside other work
    )
    assert not [line for line in lines[1:] if not own.match(line)]
    assert [line.strip() for line in lines[lines.index("next:") + 1 :]] == [
        f"python -m selfdistill train --stage distill --output {run} ...",
        f"tensorboard --logdir {run}",
    ]
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert all(line in log for line in lines[: lines.index("next:")])
    assert json.loads((run / "pretrain" / "result.json").read_text())["world"] == 2


def test_mistakes_are_told_before_anything_starts(root: Path) -> None:
    for given, line in (
        (["--pretrain.stepz", "3"], "error: unknown option --pretrain.stepz. Did you mean"),
        (["--num_gpu", "3"], "error: unknown option --num_gpu"),
        (["--num_gpus", "0"], "error: --num_gpus 0: Input should be greater than or equal to 1"),
        (["--stage", "pretrain"], "error: --output is missing: name the run folder"),
        (words(root, "x", stage="distil"), "error: command line: --stage distil: "),
    ):
        done = call(*given)
        assert done.returncode == 2, given
        assert done.stderr.startswith(line), done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert done.stdout == ""
    assert not (root / "x").exists()
    assert "--num_gpus" in call("--help").stdout
    assert "--distill.feature" in call().stdout


@pytest.mark.multi
def test_ctrl_c_reaches_the_ranks_which_save(root: Path) -> None:
    """As a terminal sends it: to the whole group of processes of the command."""
    given = words(root, "cut", **{"stage": "pretrain", "pretrain.steps": 4000, "save_every": 9999})
    process = subprocess.Popen(
        [warm.executable(), *TRAIN, "--num_gpus", "2", *given],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    stage, until = root / "cut" / "pretrain", time.monotonic() + 200
    while not (stage / "metrics.jsonl").exists() or len(metrics(stage)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == AGAIN, err
    assert err == ""
    last = out.splitlines()[-1]
    assert re.match(r"interrupted \(SIGINT\) at pretrain, step \d+ of 4000: launch again", last)
    assert list((stage / "checkpoints").glob("step-*"))


#: A launcher with one rank, and with a child that has ended and that nobody has waited for.
TREE = """
import subprocess, sys, time
gone = subprocess.Popen(["true"])
rank = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print("up", flush=True)
rank.wait()
sys.exit(rank.returncode)
"""
RANK = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("up", flush=True)
time.sleep(60)
"""


def test_an_ended_process_among_them_hides_no_rank_from_a_signal() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TREE, RANK, "deepspeed.launcher.launch"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline(), process.stdout.readline()] == ["up\n", "up\n"]
    launch = Launch(process)
    launch.signal(signal.SIGTERM)
    assert launch.code() == AGAIN


@pytest.mark.parametrize("code", [75, 137, 247])
def test_a_killed_rank_asks_for_the_same_call(code: int) -> None:
    """247 is how DeepSpeed's launcher ends where SIGKILL ended a rank, as for memory."""
    assert isinstance(training._reason(code, [], asked=False), TryAgain)
    assert isinstance(training._reason(1, ["boom"], asked=False), RuntimeError)


def test_a_terminal_may_go_under_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGHUP)
    process: Any = SimpleNamespace(pid=0)
    try:
        for handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, handler)
            with Launch(process).forwarding():
                forwarded = signal.getsignal(signal.SIGHUP) not in (signal.SIG_IGN, signal.SIG_DFL)
                assert forwarded == (handler == signal.SIG_DFL)
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
