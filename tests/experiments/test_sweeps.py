"""A sweep's folder: what may be mixed, what goes on, real launches."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.experiments import results, state
from selfdistill.experiments import run as experiments_run
from selfdistill.experiments.local import Local
from selfdistill.experiments.state import Asked, Sweep
from tests.experiments.test_experiments import plan
from tests.kit.experiments import command, make_specs, make_table, run
from tests.kit.launches import ROOT, environment


def test_what_was_made_otherwise_is_refused(root: Path, tmp_path: Path) -> None:
    planned = plan(root, "table1")
    job = next(c.job for c in planned.cells if c.method.name == "further_pretraining")
    shards = root / "shards"
    words = ["--stage", "finetune", "--finetune.lr", "0.001", "--finetune.seeds", "3"]
    words += ["--finetune.weights", str(tmp_path / "here")]

    def begin(*changed: str) -> None:
        told = list(words)
        for name, value in zip(changed[::2], changed[1::2], strict=True):
            told[told.index(name) + 1] = value
        state.begin(tmp_path, job, told, shards)

    begin()
    begin("--finetune.lr", "0.002")  # nothing is there yet
    (tmp_path / job.leaves / "checkpoints" / "step-1").mkdir(parents=True)
    begin("--finetune.lr", "0.001")  # a launch that was refused leaves a folder
    begin("--finetune.lr", "0.002")
    (tmp_path / job.leaves / "checkpoints" / "step-1" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"made with --finetune\.lr 0\.002, now it is 0\.001"):
        begin()
    begin("--finetune.lr", "0.002", "--finetune.seeds", "5")
    with pytest.raises(UserError, match=r"made with --finetune\.weights here, now it is there"):
        begin("--finetune.lr", "0.002", "--finetune.weights", str(tmp_path / "there"))
    result = {
        "manifest": "of other data",
        "metric": "accuracy",
        "metrics": {},
        "n": 5,
        "seconds": 1.0,
    }
    (tmp_path / job.leaves / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="learnt from other data"):
        begin("--finetune.lr", "0.002")
    # Of several seeds each tells it, and their summary does not.
    (tmp_path / job.leaves / "result.json").unlink()
    seed = tmp_path / job.leaves / "seed-0" / "result.json"
    seed.parent.mkdir()
    seed.write_text(json.dumps(result))
    with pytest.raises(UserError, match="learnt from other data"):
        begin("--finetune.lr", "0.002")
    result["manifest"] = Manifest.load_split(str(shards / job.dataset.name), "train").hash
    seed.write_text(json.dumps(result | {"record": {"test split": "another"}}))
    with pytest.raises(UserError, match="scored on another test split than"):
        begin("--finetune.lr", "0.002")
    seed.unlink()
    result["manifest"] = "of other data"
    # A first stage that was made of a set that has been packed anew since.
    (first,) = job.needs
    state.begin(tmp_path, first, ["--stage", "pretrain"], shards)
    (tmp_path / first.leaves).mkdir(parents=True)
    (tmp_path / first.leaves / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="learnt from other data"):
        state.check(tmp_path, first, ["--stage", "pretrain"], shards)
    (tmp_path / first.leaves / "result.json").unlink()
    (tmp_path / first.leaves).rmdir()
    time.sleep(0.01)
    state.begin(tmp_path, job.needs[0], ["--stage", "pretrain"], shards)
    with pytest.raises(UserError, match="before it was made anew"):
        begin("--finetune.lr", "0.002")


def test_an_old_error_is_not_told_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    first = f"{state.LAUNCH}--a 1\nerror: an old mistake\n"
    log.write_text(first)
    assert state.error_of(log, 2) == "an old mistake"
    log.write_text(first + f"{state.LAUNCH}--a 2\nstep 1\n")
    assert state.error_of(log, -9) == "killed by signal 9"
    assert state.error_of(log, 137) == "killed by signal 9"
    assert state.error_of(log, 1) == "step 1"


def test_two_calls_are_not_at_work_at_once(tmp_path: Path) -> None:
    second = experiments_run.alone(tmp_path)
    with experiments_run.alone(tmp_path), pytest.raises(UserError, match="another call"), second:
        pass
    with experiments_run.alone(tmp_path):
        pass


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"asked": [{}]}'])
def test_a_broken_record_of_the_sweep_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match="is not what experiments"):
        Sweep.open(tmp_path)


def test_tables_that_are_asked_for_again_join(tmp_path: Path) -> None:
    sweep = Sweep(tmp_path, "tiny", tmp_path, None, [])
    sweep.ask([Asked("table1", (), ("cub",)), Asked("table2")])
    sweep.ask([Asked("table1", (), ("dtd", "cub")), Asked("table1", ("dogs",), ())])
    assert sweep.asked == [
        Asked("table2"),
        Asked("table1", (), ("cub", "dtd")),
        Asked("table1", ("dogs",), ()),
    ]
    sweep.ask([Asked("table1", seeds=3)])
    sweep.ask([Asked("table1", only=("cub",))])
    assert sweep.asked[-1] == Asked("table1", seeds=3)
    sweep.save()
    assert Sweep.open(tmp_path).asked == sweep.asked
    sweep.ask([Asked("table1", ("cub", "dogs")), Asked("table1", ("dtd",), seeds=5)])
    assert sweep.asked[-2:] == [Asked("table1", ("dogs", "cub")), Asked("table1", ("dtd",), (), 5)]
    # More seeds of some leave the whole as it is; of all, they are the whole's.
    sweep.asked = [Asked("table1", ("cub",), (), 5)]
    sweep.ask([Asked("table1", ("cub",), ("cub/mars",), 10)])
    assert sweep.asked == [
        Asked("table1", ("cub",), (), 5),
        Asked("table1", ("cub",), ("cub/mars",), 10),
    ]
    sweep.ask([Asked("table1", ("cub",), (), 10)])
    assert sweep.asked == [Asked("table1", ("cub",), (), 10)]


# --- mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no table is named"),
        (("tabel1",), "did you mean table1"),
        (("table1",), "none of its data sets can be taken"),
        (("table1", "--only", "recadm", "--datasets", "colours"), "Did you mean recadam?"),
        (("table1", "--ranks", "0", "--datasets", "colours"), "--ranks 0: give 1 or more"),
        (("table1", "--seeds", "1", "--datasets", "colours"), "--seeds 1: give 2 or more"),
        (("table1", "--slurm", "--ranks", "8"), "SLURM decides these"),
        (("table1", "--profil", "x"), "--profile"),
    ],
)
def test_mistakes(root: Path, words: tuple[str, ...], told: str) -> None:
    done = run(root, *words)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_sweep_starts_without_torch() -> None:
    """Its jobs import it: a mistake, a dry run and SLURM's arrays need not wait for seconds."""
    code = "import sys, selfdistill.experiments.run as _; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- real launches

#: One start for all jobs, where it is not the launches that are looked at.
ONE = ("--in_process", "--jobs", "1")


def finished(sweep: Path) -> dict[str, int]:
    """Every result that is there, and when it was made."""
    return {
        str(path.relative_to(sweep)): path.stat().st_mtime_ns
        for path in sorted(sweep.rglob("result.json"))
    }


@pytest.mark.multi
def test_a_killed_sweep_goes_on_and_a_failed_cell_stops_only_itself(root: Path) -> None:
    my = root / "my"
    broken = 'title = "broken"\nstart = "model"\n[options]\n"finetune.warmup" = 99\n'
    (my / "methods" / "broken.toml").write_text(broken)
    make_table(my, "core", ["further_pretraining", "broken"], ["colours"])
    sweep, words = root / "sweep", command(root, "core", "--jobs", "1")
    process = subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while not (sweep / "colours" / "further_pretraining" / "finetune" / "seed-0").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = finished(sweep)
    assert "colours/pretrain/pretrain/result.json" in before
    done = run(root, "core", "--jobs", "2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "1 of the jobs failed" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    after = finished(sweep)
    assert before.items() <= after.items(), "nothing that was finished is done again"
    outcomes = {c.method.name: results.outcome(sweep, c) for c in Sweep.open(sweep).plan().cells}
    assert outcomes["broken"].status == "failed"
    assert "--finetune.warmup 99" in outcomes["broken"].message
    good = outcomes["further_pretraining"]
    assert good.status == "done"
    assert sorted(good.results) == [0, 1]
    assert good.sample("score").n == good.sample("analysis.test_loss").n == 2
    assert good.sample("seconds").values[0] > good.results[0]["seconds"]  # the stages before
    again = run(root, "core", "--only", "further_pretraining")
    assert again.returncode == 0
    assert finished(sweep) == after


@pytest.mark.multi
def test_a_record_goes_on_without_its_weights(tmp_path: Path) -> None:
    """Another machine has the JSON files alone: it trains again what a new row starts from."""
    my, sweep = make_specs(tmp_path), tmp_path / "sweep"
    make_table(my, "kept", ["further_pretraining"], ["colours"])
    assert run(tmp_path, "kept", *ONE).returncode == 0
    sweep.rename(tmp_path / "first")
    for path in (tmp_path / "first").rglob("*.json"):
        if path.name in ("result.json", "job.json", "sweep.json"):
            kept = sweep / path.relative_to(tmp_path / "first")
            kept.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, kept)
    before = finished(sweep)
    done = run(tmp_path, "kept")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 jobs, 2 of them complete" in done.stdout
    assert finished(sweep) == before, "nothing needs the weights that are gone"
    make_table(my, "kept", ["further_pretraining", "self_distillation"], ["colours"])
    done = run(tmp_path, "kept", *ONE)
    assert done.returncode == 0, done.stdout + done.stderr
    after, anew = finished(sweep), "colours/pretrain/pretrain/result.json"
    assert {name for name in before if before[name] != after[name]} == {anew}
    assert (sweep / anew).with_name("export").is_dir()
    assert "colours/self_distillation/finetune/result.json" in after
    again = run(tmp_path, "kept")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "4 jobs, 4 of them complete" in again.stdout


@pytest.mark.multi
def test_the_documents_example_runs(tmp_path: Path) -> None:
    """docs/experiments.md: a data set, a method and a table of one's own, a file each."""
    my = make_specs(tmp_path, ("leaves",))
    (my / "datasets" / "leaves.toml").unlink()
    page = (ROOT / "docs" / "experiments.md").read_text()
    found = re.findall(r"`my/((?!claims/)\S+\.toml)`:\n\n```toml\n(.*?)```", page, re.S)
    assert [name for name, _ in found] == [
        "datasets/leaves.toml",
        "methods/gentle_start.toml",
        "tables/mine.toml",
    ]
    for name, text in found:
        # Five steps of warm-up are all that the tiny schedule has.
        (my / name).write_text(text.replace('"finetune.warmup" = 5', '"finetune.warmup" = 2'))
    done = run(tmp_path, "mine", *ONE)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = Sweep.open(tmp_path / "sweep").plan().cells
    sweep = tmp_path / "sweep"
    assert [state.status(sweep, c.job) for c in cells] == ["done", "done"]
    # What validation chose is what the reported runs were given.
    (choice,) = cells[1].job.choices
    chosen = choice.best(sweep)["finetune.dropout"]
    config = (sweep / cells[1].job.leaves / "seed-0" / "config.toml").read_text()
    assert tomllib.loads(config)["finetune"]["dropout"] == chosen


def test_a_job_that_is_being_started_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    nothing: Any = SimpleNamespace(data_root=tmp_path, models=None)
    local = Local(tmp_path, nothing, ranks=1, slots=1, hours=0)

    def start(*_: object) -> Any:
        local._stop(signal.SIGTERM, None)  # it comes before the process is known
        return SimpleNamespace(send_signal=told.append)

    monkeypatch.setattr(state, "begin", lambda *_: ["--stage", "all"])
    monkeypatch.setattr(local, "_process", start)
    job: Any = SimpleNamespace(name="x", command=lambda *_: ["--stage", "all"])
    local._start(job, {})
    assert told == [signal.SIGTERM]


def test_a_sweep_takes_the_gpus_that_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of a host's eight; the others are somebody else's. (There is no GPU here.)"""
    nothing: Any = SimpleNamespace(data_root=tmp_path, models=None)
    local = Local(tmp_path, nothing, ranks=1, slots=2, hours=0)
    monkeypatch.setattr(local, "devices", 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert [local._environment(k)["CUDA_VISIBLE_DEVICES"] for k in range(3)] == ["2", "5", "2"]
    monkeypatch.setattr(local, "ranks", 2)
    assert "localhost:2,5" in local._launcher(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "localhost:0,1" in local._launcher(0)
