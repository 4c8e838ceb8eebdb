"""Jobs one after another in one process: what they leave is what separate launches leave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open

from selfdistill.data.errors import UserError
from selfdistill.experiments import run as experiments_run
from selfdistill.experiments import state, worker
from selfdistill.experiments.state import Sweep
from selfdistill.experiments.worker import Worker
from tests.kit.experiments import command, make_specs, make_table
from tests.kit.launches import COMMON, ROOT, environment, metrics
from tests.kit.texts import make_language, make_texts

#: Chance takes part: dropout, and for images augmentation.
CHANCE = COMMON | {"finetune.dropout": 0.1, "save_every": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Specs of an image and a text set, as small as can be."""
    root = tmp_path_factory.mktemp("in_process")
    my = make_specs(root)
    make_texts(root / "shards" / "words")
    make_language(root / "language")
    (my / "datasets" / "words.toml").write_text('title = "words"\nkind = "text"\n')
    images = CHANCE | {"model.path": str(root / "world" / "base"), "finetune.augment": "light"}
    texts = CHANCE | {"model.path": str(root / "language")}
    parts = ['title = "both"']
    for kind, recipe, options in (
        ("image", "vit_small", images),
        ("text", "roberta_small", texts),
    ):
        lines = [f'"{k}" = {json.dumps(v)}' for k, v in options.items()]
        parts += [f'[{kind}]\nrecipe = "{recipe}"\n[{kind}.options]', *lines]
    (my / "profiles" / "both.toml").write_text("\n".join(parts) + "\n")
    make_table(my, "three_stages", ["self_distillation"], ["colours", "words"])
    return root


def words_of(root: Path, output: Path, table: str, *more: str) -> list[str]:
    """Words of experiments.run, with the profile of this file's tests."""
    words = command(root, table, "--jobs", "1", *more)
    for name, value in (("--profile", "both"), ("--output", str(output))):
        words[words.index(name) + 1] = value
    return words


def weights(folder: Path) -> dict[str, bytes]:
    """Every tensor of every export below a folder, bit for bit."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                place = f"{path.relative_to(folder)}/{name}"
                found[place] = file.get_tensor(name).tobytes()
    return found


def figures(folder: Path, place: Path) -> dict[str, Any]:
    """All scalars and results below a folder, without those of time, memory and place.

    Args:
        folder: of a run.
        place: that paths in its results name.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("metrics.jsonl")):
        found[str(path.relative_to(folder))] = [
            {k: v for k, v in line.items() if not k.startswith(("speed/", "memory/", "time"))}
            for line in metrics(path.parent)
        ]
    for path in sorted(folder.rglob("result.json")):
        content = path.read_text().replace(str(place), "HERE")
        told = json.loads(re.sub(r'"(\w*seconds\w*)": [\d.e+-]+', r'"\1": 0', content))
        told.pop("git", None)  # somebody may commit meanwhile
        found[str(path.relative_to(folder))] = told
    return found


def same(name: str, one: Path, other: Path) -> None:
    """Refuses two folders that do not hold the same run of this name."""
    assert weights(one / name)
    assert weights(one / name) == weights(other / name), name
    assert figures(one / name, one) == figures(other / name, other), name


class Jobs:
    """Jobs one after another by one worker.

    Args:
        folder: of their runs and logs.
        root: where data and models are.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder, root
        self.worker: Worker | None = None

    def do(self, name: str, stage: str, kind: str, **changed: object) -> int:
        """Does a job; its exit code."""
        model, recipe, data = {
            "image": ("world/base", "vit_small", "colours"),
            "text": ("language", "roberta_small", "words"),
        }[kind]
        options: dict[str, object] = {"stage": stage, "recipe": recipe, **CHANCE}
        options |= {
            "model.path": self.root / model,
            "data": self.root / "shards" / data,
            "output": self.folder / name,
            "finetune.start": "model",
            "finetune.seeds": 1,
        } | {key.replace("__", "."): value for key, value in changed.items()}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        settings = worker.settings(words)
        assert settings
        log = self.folder / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(state.LAUNCH.encode() + b"\n")
            file.flush()
            if self.worker is None or not self.worker.serves(settings):
                self.worker = Worker(settings, file, cwd=ROOT, env=environment())
        self.worker.give(words, log)
        return waited(self.worker.poll)


def waited(ask: Callable[[], Any], seconds: float = 300) -> Any:
    """What is there in the end."""
    end = time.monotonic() + seconds
    while (found := ask()) is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    return found


@pytest.mark.multi
def test_in_process_equals_separate_launches_bit_for_bit(root: Path) -> None:
    for name, more in (("separate", ()), ("worker", ("--in_process",))):
        words = words_of(root, root / name, "three_stages", *more)
        done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    # Not those of logs and records, which hold times.
    for job in Sweep.open(root / "worker").plan().ordered():
        same(job.folder, root / "separate", root / "worker")
        told = [state.read(root / name, job) for name in ("separate", "worker")]
        assert [one["status"] for one in told] == ["done", "done"]
        assert told[0].keys() == told[1].keys()
    # What libraries say stands in the log of its own run, as does what the program says.
    for path in sorted((root / "worker").rglob("log.txt")):
        place = str(path.parent)
        said = [line for line in path.read_text().splitlines() if ": stage " in line]
        assert len(said) == 1
        assert place in said[0]
    for path in (root / "worker" / "logs").iterdir():
        separate = (root / "separate" / "logs" / path.name).read_text()
        assert len(path.read_text().splitlines()) == len(separate.splitlines()), path


@pytest.mark.multi
def test_the_order_of_jobs_does_not_matter_nor_do_those_that_fail(
    root: Path, tmp_path: Path
) -> None:
    jobs = Jobs(tmp_path, root)
    assert jobs.do("first/image", "finetune", "image") == 0
    process = jobs.worker and jobs.worker.process
    assert jobs.do("first/text", "pretrain", "text") == 0
    assert jobs.do("wrong", "finetune", "image", finetune__warmup=99) == 2
    assert jobs.do("diverged", "pretrain", "image", pretrain__lr=1e30, pretrain__warmup=0) == 2
    assert jobs.do("second/text", "pretrain", "text") == 0
    assert jobs.do("second/image", "finetune", "image") == 0
    assert jobs.worker
    assert jobs.worker.process is process, "one process did them all"
    assert not jobs.worker.over
    jobs.worker.close()
    assert jobs.worker.process.returncode == 0
    same("image", tmp_path / "first", tmp_path / "second")
    same("text", tmp_path / "first", tmp_path / "second")
    log = tmp_path / "wrong.log"
    assert "--finetune.warmup 99" in state.error_of(log, 2)
    assert state.error_of(tmp_path / "diverged.log", 2).startswith("the loss is not finite")
    result = tmp_path / "second" / "image" / "finetune-model" / "result.json"
    assert f"--output {tmp_path}/second/image" in json.loads(result.read_text())["command"]


@pytest.mark.multi
def test_a_killed_worker_ends_its_job_alone_and_separate_launches_go_on(
    root: Path, tmp_path: Path
) -> None:
    my, sweep = root / "my", tmp_path / "sweep"
    rows = "".join(
        f'[[rows]]\nmethod = "fine_tuning"\noptions = {{ "finetune.steps" = {steps} }}\n'
        for steps in (80, 3)
    )
    (my / "tables" / "long.toml").write_text(f'title = "l"\ndatasets = ["colours"]\n{rows}')
    words = words_of(root, sweep, "long", "--seeds", "2", "--in_process")
    words[0] = sys.executable  # the tree of processes is looked at
    first = sweep / "colours" / "fine_tuning,steps=80"

    def saved() -> set[Path]:
        return {*first.glob("finetune-model/*/checkpoints/step-*")}

    def started() -> subprocess.Popen[bytes]:
        before = saved()
        process = subprocess.Popen(words, cwd=ROOT, env=environment())
        waited(lambda: saved() - before or None)
        assert process.poll() is None
        return process

    killed = started()
    (one,) = psutil.Process(killed.pid).children()
    one.kill()
    assert killed.wait(300) == 2
    jobs = {job.folder: job for job in Sweep.open(sweep).plan().ordered()}
    long, short = jobs["colours/fine_tuning,steps=80"], jobs["colours/fine_tuning,steps=3"]
    assert state.read(sweep, long)["message"] == "killed by signal 9"
    assert state.read(sweep, long)["code"] == -signal.SIGKILL
    assert state.status(sweep, short) == "done"
    asked = started()
    asked.terminate()
    assert asked.wait(300) == os.EX_TEMPFAIL
    assert state.status(sweep, long) == "open"
    words.remove("--in_process")
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert state.status(sweep, long) == "done"
    log = (sweep / "logs" / "colours-fine_tuning,steps=80.log").read_text()
    assert log.count(state.LAUNCH) == 3
    assert "resumed at step" in log.rpartition(state.LAUNCH)[2]


@pytest.mark.parametrize(
    "more",
    [
        ("--zero", "zero3"),
        ("--zero", "zero3_offload"),
        ("--teacher.mode", "sharded"),
        ("--compile", "true"),
        ("--zero", "nothing"),
    ],
)
def test_what_a_process_would_remember_has_one_of_its_own(more: tuple[str, ...]) -> None:
    assert worker.settings(["--stage", "distill"]) is not None
    assert worker.settings(["--stage", "distill", *more]) is None


def test_jobs_of_other_settings_are_done_by_other_processes() -> None:
    plain = worker.settings(["--stage", "pretrain"])
    for more in (("--precision", "bf16"), ("--deterministic", "true"), ("--zero", "zero2")):
        other = worker.settings(["--stage", "pretrain", *more])
        assert other not in (None, plain), more


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"ranks": 2}, "--in_process with --ranks 2: one process does one rank's jobs"),
        ({"slurm": True}, "--ranks, --jobs, --hours or --in_process: SLURM decides these"),
    ],
)
def test_mistakes(more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        experiments_run.main("table1", in_process=True, **more)
