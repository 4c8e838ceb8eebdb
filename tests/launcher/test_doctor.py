"""`python -m launcher.doctor`: each check of a machine passing and failing for real."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import filelock
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from selfdistill.data.errors import UserError
from selfdistill.launcher.doctor import __main__ as doctor
from selfdistill.launcher.doctor import checks, machine, storage
from tests.kit.command import call
from tests.kit.launches import free_port
from tests.kit.shards import uneven

ROOT = Path(__file__).resolve().parents[2]


# Python and packages


def test_python_and_packages_of_this_environment_are_right() -> None:
    assert checks.python().state == "ok"
    assert checks.packages().state == "ok", checks.packages()


def test_python_of_another_version() -> None:
    line = checks.python({"requires-python": ">=3.99", "dependencies": []})
    assert line.state == "FAILED"
    assert ">=3.99" in line.found


def test_packages_missing_too_old_and_untested(tmp_path: Path) -> None:
    def of(*needs: str, lock: str = "") -> checks.Line:
        (tmp_path / "lock").write_text(lock)
        project = {"requires-python": ">=3.11", "dependencies": list(needs)}
        return checks.packages(project, tmp_path / "lock")

    assert of("rich>=1").state == "ok"
    assert of("rich>=1", "no-such-thing; extra == 'x'").state == "ok"
    old = of("rich>=999")
    assert (old.state, "rich is " in old.found, ">=999" in old.found) == ("FAILED", True, True)
    gone = of("rich>=1", "no-such-thing>=2")
    assert (gone.state, "no-such-thing is missing" in gone.found) == ("FAILED", True)
    other = of("rich>=1", lock="# comment\nrich==1.0.0\n")
    assert (other.state, "not 1.0.0" in other.found) == ("warning", True)
    rich = checks.versions()["rich"]
    assert of("rich>=1", lock=f"Rich=={rich}+cu130  # one build of it\n").state == "ok"


def test_a_check_that_breaks_is_a_line() -> None:
    def fall() -> checks.Line:
        raise RuntimeError("two\nlines")

    (line,) = checks.attempt("x", fall)
    assert line.state == "FAILED"
    assert "two lines" in str(line)
    assert "\n" not in str(line)


# The machine


def test_devices_of_this_machine() -> None:
    line = machine.devices(driver=False)
    assert line.state == "ok"
    assert "cores" in line.found or "GiB" in line.found


def test_a_driver_without_gpus_is_a_warning() -> None:
    none = SimpleNamespace(is_available=lambda: False)
    assert machine.devices(none, driver=False).state == "ok"
    line = machine.devices(none, driver=True)
    assert (line.state, "torch sees no GPU" in line.found) == ("warning", True)


def test_a_gpu_that_cannot_compute_fails() -> None:
    about = SimpleNamespace(name="Toy", total_memory=2**30, major=9, minor=0)
    many = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 99, get_device_properties=lambda _: about
    )
    line = machine.devices(many)
    assert (line.state, "(Toy) cannot compute" in line.found) == ("FAILED", True)


def test_gpus_are_counted_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda n, device: ones(n))
    about = [
        SimpleNamespace(name=name, total_memory=80 * 2**30, major=major, minor=0)
        for name, major in (("Toy", 9), ("Toy", 9), ("Old", 7))
    ]
    three = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 3,
        get_device_properties=about.__getitem__,
        is_bf16_supported=lambda including_emulation: False,
    )
    line = machine.devices(three)
    assert line.state == "ok"
    assert line.found == (
        "2 x Toy, 80 GiB, compute capability 9.0; 1 x Old, 80 GiB, compute capability 7.0;"
        " no bf16: take fp32"
    )


@pytest.mark.gpu
def test_devices_with_a_gpu() -> None:
    line = machine.devices()
    assert line.state == "ok"
    assert re.search(r"1 x .*GiB, compute capability \d+\.\d+; (no )?bf16", line.found)


def test_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert machine.compiler().state == "ok"
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    line = machine.compiler()
    assert (line.state, "exit code 3" in line.found) == ("FAILED", True)
    monkeypatch.setenv("PATH", str(tmp_path))
    line = machine.compiler()
    assert (line.state, line.found.startswith("ninja not on PATH")) == ("warning", True)
    monkeypatch.setenv("CXX", "g++-none")
    assert machine.compiler().found.startswith("g++-none (g++) and ninja not on PATH")


@pytest.mark.parametrize("below", ["op", "py311_cpu/op"])
def test_a_lock_that_an_older_torch_would_wait_for(tmp_path: Path, below: str) -> None:
    assert machine.builds(tmp_path, by_existence=True).state == "ok"
    lock = tmp_path / below / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert machine.builds(tmp_path, by_existence=True).state == "warning"
    os.utime(lock, times=(time.time() - 700,) * 2)
    line = machine.builds(tmp_path, by_existence=True)
    assert (line.state, line.cure) == ("FAILED", f"rm {lock}")


def test_a_lock_that_a_newer_torch_left_counts_only_while_it_is_held(tmp_path: Path) -> None:
    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, times=(time.time() - 700,) * 2)
    assert machine.builds(tmp_path, by_existence=False).state == "ok"
    with filelock.FileLock(lock):
        line = machine.builds(tmp_path, by_existence=False)
        assert (line.state, str(lock) in line.found) == ("warning", True)
    assert machine.builds(tmp_path, by_existence=False).state == "ok"


def test_the_lock_that_the_installed_torch_leaves_is_read_as_it_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself either waits for an old lock file that nobody holds, or does not."""
    from torch.utils import cpp_extension

    lock = tmp_path / "op" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, times=(time.time() - 700,) * 2)
    reached = threading.Event()

    def build(*_: object, **__: object) -> None:
        reached.set()
        raise KeyError("far enough")

    monkeypatch.setattr(cpp_extension, "_write_ninja_file_and_build_library", build)
    source = tmp_path / "op.cpp"
    source.write_text("int one() { return 1; }")

    def load() -> None:
        with pytest.raises(KeyError):
            cpp_extension.load("doctor_op", [str(source)], build_directory=str(lock.parent))

    # A daemon: an older torch never comes back.
    threading.Thread(target=load, daemon=True).start()
    waits = not reached.wait(60)
    assert (machine.builds(tmp_path).state == "FAILED") == waits


def test_builds_need_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "file" / "x"))
    line = machine.builds()
    assert (line.state, "TORCH_EXTENSIONS_DIR" in line.cure) == ("FAILED", True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "new" / "x"))
    assert machine.builds().state == "ok"
    assert not (tmp_path / "new").exists()


# Disks: on a real file system of one megabyte, in a mount namespace of its own

_SMALL = """
import sys
from pathlib import Path
from selfdistill.launcher.doctor import machine, storage
disk, large = Path(sys.argv[1]), sys.argv[2]
print(machine.open_files())
print(machine.shared_memory(disk))
print(storage.run_folder(disk / "run"))
print(storage.run_folder(disk / "run", large))
try:
    (disk / "full").write_bytes(bytes(2**21))
except OSError:
    print(storage.run_folder(disk / "run"))
"""


def test_little_space_and_few_files(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "small.py").write_text(_SMALL)
    inner = f"mount -t tmpfs -o size=1m tmpfs {disk} && ulimit -n 256 && "
    inner += f"{sys.executable} {tmp_path}/small.py {disk} {ROOT}/recipes/vit_small"
    flags = ["-m"] if os.geteuid() == 0 else ["-rm"]
    done = subprocess.run(
        ["unshare", *flags, "sh", "-c", inner],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    limit, memory, little, model, full = done.stdout.splitlines()
    assert limit.startswith("warning  open files: at most 256")
    assert memory.startswith("warning  shared memory: 0.0 of 0.0 GB free")
    assert little.startswith("warning  run folder: ")
    assert model.startswith("FAILED   run folder: ")
    assert "GB are needed (12 bytes x 3.0 M parameters x 3 checkpoints)" in model
    assert full.startswith("FAILED   run folder: ")
    assert "No space left on device" in full


def test_limits_that_suffice() -> None:
    assert machine.open_files(1024).state == "ok"
    assert machine.open_files(1023).state == "warning"
    assert machine.open_files(-1).state == "ok"


def test_a_run_folder_leaves_no_trace(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 5), np.float32), "b": np.zeros(4, np.float16)}, tmp_path / "m.st")
    (tmp_path / "model").mkdir()
    (tmp_path / "m.st").rename(tmp_path / "model" / "m-1.safetensors")
    save_file({"c": np.zeros(7, np.float32)}, tmp_path / "model" / "m-2.safetensors")
    assert storage.parameters(tmp_path / "model") == 15 + 4 + 7
    line = storage.run_folder(tmp_path / "runs" / "x", str(tmp_path / "model"), keep=4)
    assert line.state == "ok"
    assert "x 5 checkpoints" in line.found
    assert not (tmp_path / "runs").exists()


def test_a_run_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (line,) = checks.attempt("run folder", lambda: storage.run_folder(tmp_path / "file" / "x"))
    assert line.state == "FAILED"
    assert "is not a folder" in line.found
    refused = storage.run_folder(Path("/sys/selfdistill"))
    assert (refused.state, "may write" in refused.cure) == ("FAILED", True)


def test_a_model_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x20\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="fetch it again"):
        storage.parameters(tmp_path)


# Data


def test_shards_whole_cut_off_missing_and_flipped(tmp_path: Path) -> None:
    uneven(tmp_path / "train", [3, 2, 4])
    for full in (False, True):
        line = storage.shards(str(tmp_path), full)
        assert line.state == "ok"
        assert "9 samples in 3 shards" in line.found
    tars = sorted((tmp_path / "train").glob("*.tar"))
    whole = tars[1].read_bytes()

    changed = bytearray(whole)
    changed[len(whole) // 3] ^= 0xFF
    tars[1].write_bytes(changed)
    assert storage.shards(str(tmp_path)).state == "ok"  # sizes only
    line = storage.shards(str(tmp_path), full=True)
    assert (line.state, tars[1].name in line.found) == ("FAILED", True)

    tars[1].write_bytes(whole[:-512])
    tars[2].unlink()
    for full in (False, True):
        line = storage.shards(str(tmp_path), full)
        assert (line.state, tars[1].name in line.found) == ("FAILED", True)
        assert "and 1 more" in line.found


def test_no_data(tmp_path: Path) -> None:
    for data in (tmp_path, tmp_path / "nowhere"):
        (line,) = checks.attempt("data", lambda data=data: storage.shards(str(data)))
        assert (line.state, "data.pack" in line.found) == ("FAILED", True)


# The command


def test_the_command_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uneven(tmp_path / "shards" / "train", [3, 2])
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "builds"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    words = ("--data", tmp_path / "shards", "--output", tmp_path / "run", "--recipe", "vit_small")
    assert call(doctor.main, *words) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line[9:].split(":")[0] for line in lines]
    assert names == [
        *("Python", "packages", "run folder", "port", "devices"),
        *("compiler", "builds", "shared memory", "open files", "data"),
    ]
    assert "3.0 M parameters x 3 checkpoints" in lines[2]
    assert not any(line.startswith("FAILED") for line in lines)

    shutil.rmtree(tmp_path / "shards")
    assert call(doctor.main, *words) == 2
    assert sum(x.startswith("FAILED") for x in capsys.readouterr().out.splitlines()) == 1
    assert call(doctor.main, "--recipe", "vit_smal") == 2
    assert "did you mean vit_small" in capsys.readouterr().err


def test_without_the_packages_it_still_speaks() -> None:
    """As by a system's Python, which has none of them."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "launcher.doctor"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout.startswith("FAILED   packages: No module named ")
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
