"""`python -m launcher.slurm submit` without SLURM: what it would do, and mistakes."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfdistill.launcher import slurm
from selfdistill.launcher.examples import __main__ as example
from selfdistill.launcher.slurm import ROOT
from tests.kit import command as command_line

GIVEN = ["submit", "--recipe=vit_base", "--model=m", "--output=runs/x", "--data", "my data"]
CHAIN = ["--stages", "pretrain,distill,finetune"]


def call(*words: str) -> int:
    try:
        slurm.main(words)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def commands(printed: str) -> list[tuple[dict[str, str], list[str]]]:
    """Variables and words of each sbatch that a dry run prints."""
    found = []
    for part in printed.replace("\\\n", " ").split("\n"):
        words = shlex.split(part) if "sbatch --parsable" in part else []
        if words:
            at = words.index("sbatch")
            found.append((dict(w.split("=", 1) for w in words[:at]), words[at:]))
    return found


def test_one_job(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--nodes", "4", "--gpus", "8", "--time", "1-00:00:00", "--mae.ratio", "0.5"]
    assert call(*GIVEN, *more, "--compare", "--dry_run") == 0
    printed = capsys.readouterr().out
    assert (ROOT / "slurm" / "selfdistill.sh").read_text() in printed
    ((variables, words),) = commands(printed)
    assert variables["DATA"] == "my data"
    assert variables["ARGS"] == "--mae.ratio 0.5 --compare"
    assert {"--nodes=4", "--gpus-per-node=8", "--ntasks-per-node=8", "--time=1-00:00:00"} < {*words}


def test_a_chain_waits_stage_by_stage_and_fine_tunes_as_an_array(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(*GIVEN, *CHAIN, "--seeds", "5", "--seed=7", "--dry_run") == 0
    found = commands(capsys.readouterr().out)
    assert [variables["STAGE"] for variables, _ in found] == ["decoder", *CHAIN[1].split(",")]
    assert "--dependency" not in " ".join(found[0][1])
    for (_, words), before in zip(found[1:], ("decoder", "pretrain", "distill"), strict=True):
        assert f"--dependency=afterok:<id of {before}>" in words
        assert "--kill-on-invalid-dep=yes" in words
    assert "--array=0-4" in found[3][1]
    assert found[3][0]["SEED"] == "7"
    assert "--seed" not in found[3][0]["ARGS"]  # each task gives its own
    assert all(variables["ARGS"].endswith("--seed=7") for variables, _ in found[:3])


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["--stages", "decoder,pretrain"], "decoder"),  # once
        (["--stages", "pretrain", "--decoder.auto", "false"], "pretrain"),
        (["--stages", "distill,finetune"], "distill"),
    ],
)
def test_where_a_chain_begins(
    capsys: pytest.CaptureFixture[str], words: list[str], first: str
) -> None:
    assert call(*GIVEN, *words, "--dry_run") == 0
    stages = [variables["STAGE"] for variables, _ in commands(capsys.readouterr().out)]
    assert stages[0] == first
    assert stages.count(first) == 1


def test_a_model_from_scratch_has_a_decoder(capsys: pytest.CaptureFixture[str]) -> None:
    words = [w for w in GIVEN if not w.startswith("--model")]
    assert call(*words, "--model=scratch", "--stages", "pretrain", "--dry_run") == 0
    ((variables, _),) = commands(capsys.readouterr().out)
    assert variables["STAGE"] == "pretrain"


def test_without_a_recipe_the_default_of_the_templates_is_not_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("submit", "--data", "d", "--output", "o", "--dry_run") == 0
    ((variables, _),) = commands(capsys.readouterr().out)
    assert variables["RECIPE"] == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "write python -m launcher.slurm submit"),
        ([*GIVEN, "--node", "3"], "unknown option --node. Did you mean --nodes?"),
        ([*GIVEN, "--mae.ration", "3"], "Did you mean --mae.ratio?"),
        ([*GIVEN, "--mae.ratio", "3"], "--mae.ratio 3: Input should be less than 1"),
        ([*GIVEN, "--nodes", "none"], "--nodes none: Input should be a valid integer"),
        ([*GIVEN, "--nodes"], "--nodes has no value"),
        ([*GIVEN, "--data", "x"], "--data is given twice"),
        ([*GIVEN, "--stage", "distill"], "write --stages"),
        ([*GIVEN, "--stages", "distill,pretrain"], "in this order"),
        ([*GIVEN, "--stages", "pretrain,distill", "--compare"], "compare is for --stage all"),
        ([*GIVEN, "--finetune.keep", "best"], "--finetune.eval_every"),
        ([*GIVEN, "--seeds", "3"], "add --stages pretrain,distill,finetune"),
        (["submit", "--recipe", "vit_base", "--data", "d"], "--output is missing"),
        (["submit", "--recipe", "vit_base", "--output", "o"], "--data is missing"),
        (["submit", "--recipe", "vit_bas", "--output", "o"], "did you mean vit_base?"),
        (["submit", "quickstart"], "'quickstart' belongs to no option"),
    ],
)
def test_a_mistake_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert call(*words, *(["--dry_run"] if words else [])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1


def test_without_slurm_it_says_so_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert call(*GIVEN) == 2
    assert capsys.readouterr().err.startswith("error: there is no sbatch on PATH")
    assert os.listdir(tmp_path) == []


def test_the_templates_are_whole() -> None:
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        assert subprocess.run(["bash", "-n", script]).returncode == 0, script
        if script.name != "common.sh":
            lines = script.read_text().splitlines()
            commands = [n for n, line in enumerate(lines) if line and not line.startswith("#")]
            # sbatch reads its directives up to the first command.
            directives = [n for n, line in enumerate(lines) if line.startswith("#SBATCH")]
            assert max(directives) < min(commands), script
            # Ranks save first; a part of a set keeps what is written anyway.
            assert ("#SBATCH --signal=USR2@180" in lines) == (script.name != "pack.sh")


def test_the_example_is_packed_once_by_whoever_is_first(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "launcher.examples", "images", str(tmp_path / "digits")]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(line.count(str(tmp_path / "digits")) for line in said) == [0, 3]
    assert os.listdir(tmp_path) == ["digits"]
    assert sorted(os.listdir(tmp_path / "digits")) == ["test", "train", "val"]


def test_the_example_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").touch()
    assert command_line.call(example.main, "images", tmp_path) == 2
    assert "is in the way" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]


LAUNCH = "source slurm/common.sh; one_seed() { :; }; launch --stage pretrain"


def launched(
    tmp_path: Path, script: str = LAUNCH, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a piece of the templates; there is no srun behind it."""
    env = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1"}
    env |= {"RECIPE": "", "DATA": "d", "OUTPUT": str(tmp_path / "run"), **variables}
    return subprocess.run(
        ["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("args", ["--a 'b", '--a "b', "--a b\\"])
def test_quotes_that_are_not_balanced_are_refused(args: str, tmp_path: Path) -> None:
    done = launched(tmp_path, ARGS=args)
    assert done.returncode == 2
    assert f"error: ARGS={args}: its quotes are not balanced" in done.stderr


def test_variables_of_a_job_run_no_commands(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    done = launched(tmp_path, ARGS=f"--a $(touch {canary}) --b `touch {canary}`; touch {canary}")
    assert "not balanced" not in done.stderr
    array = {"SLURM_ARRAY_TASK_ID": "1", "SEED": f"x[$(touch {canary})]"}
    done = launched(tmp_path, "source slurm/common.sh; one_seed", **array)
    assert done.returncode == 2
    assert "is no whole number" in done.stderr
    assert not canary.exists()


def test_a_folder_of_compiled_code_is_ones_own(tmp_path: Path) -> None:
    """Whoever made it, or made it a link, could have the ranks run his code."""
    canary, place = tmp_path / "ran", tmp_path / "own"
    words = f"source slurm/common.sh; OWN={place}; TORCH_EXTENSIONS_DIR=$OWN/torch_extensions"
    words += f"; rank touch {canary}"
    more = {"SLURMD_NODENAME": "node1", "SLURM_PROCID": "0", "FIRST": str(tmp_path / "first")}
    (tmp_path / "theirs").mkdir()
    place.symlink_to(tmp_path / "theirs")
    done = launched(tmp_path, words, **more)
    assert done.returncode == 2
    assert f"error: {place} on node1 is another user's" in done.stderr
    assert not canary.exists()
    place.unlink()
    place.mkdir(mode=0o777)
    assert launched(tmp_path, words, **more).returncode == 0
    assert place.stat().st_mode & 0o777 == 0o700
    assert canary.exists()


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_the_tasks_shell_alone_reaches_the_rank(
    number: signal.Signals, tmp_path: Path
) -> None:
    """SLURM's proctrack/cgroup signals the process that srun started, and none of its children."""
    says = "import signal, sys, time; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75));"
    says += "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('there', flush=True)"
    script = f'source slurm/common.sh; rank {sys.executable} -c "{says}; time.sleep(60)"'
    place = {"OWN": str(tmp_path / "own"), "TORCH_EXTENSIONS_DIR": str(tmp_path / "own" / "ops")}
    more = {"SLURMD_NODENAME": "node1", "SLURM_PROCID": "0", "FIRST": str(tmp_path / "first")}
    env = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1"}
    env |= {"RECIPE": "", "DATA": "d", "OUTPUT": str(tmp_path / "run"), **place, **more}
    task = subprocess.Popen(
        ["bash", "-c", script], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
    )
    assert task.stdout is not None
    assert task.stdout.readline() == "there\n"
    task.send_signal(number)
    assert task.wait(timeout=30) == 75
    assert (tmp_path / "first").read_text() == "75 0 node1\n"


def test_without_python_a_job_says_so(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "id"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    where = {"PATH": str(tmp_path / "bin"), "SELFDISTILL_ROOT": str(tmp_path)}
    done = launched(tmp_path, SLURMD_NODENAME="node1", ARGS="--seed 1", **where)
    assert done.returncode == 2
    assert "error: there is no python on node1" in done.stderr
    assert "quotes" not in done.stderr


def test_a_percent_sign_in_the_run_folder_is_not_sbatchs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [w for w in GIVEN if not w.startswith("--output")]
    assert call(*words, "--output", "runs/50%j", *CHAIN, "--dry_run") == 0
    for variables, options in commands(capsys.readouterr().out):
        assert variables["OUTPUT"] == "runs/50%j"
        assert any(o.startswith("--output=runs/50%%j/slurm/") for o in options)
