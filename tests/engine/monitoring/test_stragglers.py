"""A rank that is slower than the others has a name, on the terminal and in TensorBoard."""

import json
import re
import socket
from pathlib import Path

import pytest

from tests.kit.launches import COMMON, launch, make_world, metrics, read_events

pytestmark = pytest.mark.multi

#: Ranks of which one sleeps in each forward: real ones, with a real cause.
SCRIPT = """
import os, sys, time
sys.path[0] = {root!r}
from selfdistill.engine.training import objectives
from tests.kit import run_cases

forward = objectives.MaskedObjective.forward

def slow(self, *words, **options):
    time.sleep(2 if os.environ["RANK"] == "1" else 0)
    return forward(self, *words, **options)

objectives.MaskedObjective.forward = slow
run_cases.main()
sys.stdout.flush()
os._exit(0)
"""


def test_a_slow_rank_is_named_once(tmp_path: Path) -> None:
    root = make_world(tmp_path)
    case = COMMON | {
        "stage": "pretrain",
        "pretrain.steps": 6,
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "output": str(root / "run"),
        "zero": "zero1",
    }
    (root / "cases.json").write_text(json.dumps([case]))
    (root / "slow.py").write_text(SCRIPT.format(root=str(Path(__file__).parents[3])))
    done = launch(root / "slow.py", root / "cases.json", ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(r"pretrain, step (\d+): (rank .*)", done.stdout)
    [(step, line)] = told
    assert 3 <= int(step) <= 6  # the first steps have a start in them, which all wait for
    assert line.startswith(f"rank 1 on {socket.gethostname()} holds the others up: of a step of ")
    records = metrics(root / "run" / "pretrain")
    late = records[int(step) - 3 : int(step)]
    assert {record["ranks/slowest"] for record in late} == {1.0}
    for record in late:
        least, middle, most = (
            record[f"ranks/own_seconds_{name}"] for name in ("min", "median", "max")
        )
        assert least == middle < most - 0.1
        assert most >= 2
        share = 100 * (most - middle) / record["speed/step_seconds"]
        assert record["ranks/held_up_percent"] == pytest.approx(share)
    assert read_events(root / "run" / "pretrain").texts["straggler"] == [(int(step), line)]
