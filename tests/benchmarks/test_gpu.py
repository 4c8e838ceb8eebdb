"""The script for a GPU that is there for ten minutes, at the tiny size on whatever is here."""

import io
import json
import re
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from benchmarks.gpu import steps
from benchmarks.gpu.__main__ import Results, _listen
from benchmarks.gpu.parts import FIRST, LONG
from benchmarks.gpu.say import MARK
from benchmarks.gpu.table import table
from tests.kit.launches import ROOT, environment

SCRIPT = ROOT / "benchmarks" / "gpu.sh"

#: What images made for torch have of what this project declares.
THERE = {"torch", "torchvision", "transformers", "timm", "fsspec", "tensorboard", "jinja2"}
THERE |= {"matplotlib", "rich", "scikit-learn", "scipy", "safetensors", "numpy", "psutil"}
THERE |= {"packaging", "pillow", "ninja", "setuptools"}


def call(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *map(str, words)],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
        timeout=600,
    )


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_the_plan_fits_its_time() -> None:
    assert sum(part.seconds for part in LONG) <= 540
    assert sum(part.seconds for part in FIRST) <= 100


def test_wheels_are_of_all_that_the_machine_lacks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = (ROOT / "benchmarks" / "wheels.sh").read_text()
    carried = {
        n
        for words in re.findall(r'^(?:pure|compiled)="(.*)"$', script, re.M)
        for n in words.split()
    }
    assert {Requirement(one).name for one in project["dependencies"]} - THERE <= carried


def test_a_figure_that_was_cut_off_ends_nothing(tmp_path: Path) -> None:
    figure = {"name": "a", "unit": "s", "value": 1.0, "min": 1.0, "max": 1.0, "n": 1}
    results = Results(tmp_path)
    said = f'{MARK}{{"name": "b\n{MARK}{json.dumps(figure)}\n'
    _listen(LONG[0], io.StringIO(said), results)
    results.close(LONG)
    assert [record["name"] for record in records(tmp_path)] == ["a"]
    assert '"b' in (tmp_path / "log.txt").read_text()


def test_a_variant_that_fails_in_any_way_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def one(title: str, *_: Any) -> None:
        raise TypeError(title)

    monkeypatch.setattr(steps, "_one", one)
    steps.main("distill", tiny=True)
    told = capsys.readouterr().out
    assert told.count("TypeError") == len(steps.SHIPPED | steps.SWITCHES) + 1


def test_parts_leave_figures_a_table_and_few_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = call(out, "--tiny", "true", "--only", "machine,deterministic,texts,loader,checkpoint")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(out)
    assert all(r["state"] == "done" for r in found if r["name"] == "state"), found
    assert not [r for r in found if "failed" in r]
    names = {f"{r['part']}: {r['name']}" for r in found}
    assert "machine: copy on the device, read and written" in names
    assert "deterministic: distill, batch 256, deterministic" in names
    assert "texts: distill, batch 8, several in a row" in names
    assert "loader: a run: speed/data_wait_percent" in names
    assert "checkpoint: save" in names
    page = (out / "results.md").read_text()
    assert "## checkpoint save and load (checkpoint): done" in page
    assert sorted(p.name for p in out.iterdir()) == ["log.txt", "results.jsonl", "results.md"]
    again = call(out, "--tiny", "true")
    assert again.returncode == 2
    assert "is there: name another folder" in again.stderr


def test_time_that_is_up_and_a_signal_leave_what_there_is(tmp_path: Path) -> None:
    short = call(tmp_path / "short", "--tiny", "true", "--seconds", "8")
    assert short.returncode == 1, short.stdout + short.stderr
    states = [r["state"] for r in records(tmp_path / "short") if r["name"] == "state"]
    assert len(states) == len(LONG)
    assert states[-1] == "no time left"
    assert "no time left" in (tmp_path / "short" / "results.md").read_text()
    words = [SCRIPT, tmp_path / "ended", "--tiny", "true"]
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tests: "):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    found = records(tmp_path / "ended")
    assert found[-1]["state"] == "interrupted"
    assert "copy on the device" in (tmp_path / "ended" / "results.md").read_text()


def test_a_figure_is_set_against_its_base() -> None:
    rows = [
        {"part": "plain", "name": "a", "unit": "x/s", "value": 2.0, "min": 1.0, "max": 3.0, "n": 4},
        {"part": "ours", "name": "b", "unit": "x/s", "value": 5.0, "min": 5.0, "max": 5.0, "n": 1}
        | {"base": "plain: a", "MFU %": 35.5},
        {"part": "ours", "name": "c", "unit": "", "failed": "RuntimeError: no | room"},
        {"part": "ours", "name": "state", "state": "exit code 1", "seconds": 3.0},
    ]
    page = table(rows, {"ours": "Ours"})
    assert "| a | 2 (1 to 3) | x/s | 4 |" in page
    assert "| b | 5 | x/s | 1 | 2.50 x plain: a | MFU % 35.5 |" in page
    assert "failed: RuntimeError: no / room" in page
    assert "## Ours (ours): exit code 1, 3 s" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no folder for the results"),
        (("x", "--only", "distil"), "did you mean distill?"),
        (("x", "--tyny", "true"), "did you mean --tiny?"),
    ],
)
def test_mistakes_are_one_line(words: tuple[str, ...], said: str) -> None:
    done = call(*words)
    assert done.returncode == 2
    assert said.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
