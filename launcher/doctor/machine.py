"""The machine as `python -m launcher.doctor` finds it: devices, compiler, builds, limits."""

import fcntl
import importlib.util
import os
import resource
import shutil
import stat
import subprocess
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.launcher.doctor.checks import Line
from selfdistill.launcher.doctor.storage import probe

#: Age in seconds at which the lock of a build is a killed one's; builds take one or two minutes.
STALE = 600


def devices(cuda: Any = None, driver: bool | None = None) -> Line:
    """The GPUs, each having computed a sum; or the cores, where there are none.

    Args:
        cuda: `torch.cuda`, or what stands for it.
        driver: whether this machine has an NVIDIA driver; by default that is looked up.
    """
    if cuda is None:
        import torch

        cuda = torch.cuda
    if driver is None:
        driver = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None
    with warnings.catch_warnings(record=True) as said:
        # torch gives the reason, such as a driver that is too old, as a warning only.
        warnings.simplefilter("always")
        there = cuda.is_available()
    if not there:
        cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
        if not driver:
            return Line("ok", "devices", f"no GPU; {cores}, ranks use them over gloo")
        reason = f" ({' '.join(str(said[-1].message).split())})" if said else ""
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = "" if hidden is None else f"; CUDA_VISIBLE_DEVICES is {hidden!r}"
        found = f"an NVIDIA driver is here, but torch sees no GPU{reason}{shown}; {cores}"
        cure = "install the torch that fits the driver, or ask SLURM for GPUs (--gpus-per-node)"
        return Line("warning", "devices", found, cure)
    kinds: Counter[str] = Counter()
    for number in range(cuda.device_count()):
        about = cuda.get_device_properties(number)
        try:
            import torch

            if torch.ones(8, device=f"cuda:{number}").sum().item() != 8:
                raise RuntimeError("eight ones do not add up to 8")
        except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
            found = f"GPU {number} ({about.name}) cannot compute: {cli.format_error(error)}"
            cure = "see nvidia-smi; leave it out with CUDA_VISIBLE_DEVICES"
            return Line("FAILED", "devices", found, cure)
        capability = f"compute capability {about.major}.{about.minor}"
        kinds[f"{about.name}, {about.total_memory / 2**30:.0f} GiB, {capability}"] += 1
    bf16 = "bf16" if cuda.is_bf16_supported(including_emulation=False) else "no bf16: take fp32"
    found = "; ".join(f"{count} x {kind}" for kind, count in kinds.items())
    return Line("ok", "devices", f"{found}; {bf16}")


def compiler() -> Line:
    """g++ and ninja, with which DeepSpeed builds its CPU optimiser, and `--compile` its kernels."""
    name = os.environ.get("CXX") or "c++"  # what torch.utils.cpp_extension takes
    path, ninja = shutil.which(name), shutil.which("ninja")
    gone = [tool for tool, there in ((f"{name} (g++)", path), ("ninja", ninja)) if not there]
    if gone:
        cure = "install g++, and put the environment's bin folder, which holds ninja, on PATH"
        found = f"{' and '.join(gone)} not on PATH: --zero zero3_offload and --compile cannot run"
        return Line("warning", "compiler", found, cure)
    versions = []
    for tool in (path, ninja):
        done = subprocess.run(
            [str(tool), "--version"], capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode:
            found = f"{tool} --version ends with exit code {done.returncode}"
            return Line("FAILED", "compiler", found, "install it anew")
        versions.append(done.stdout.splitlines()[0] if done.stdout else str(tool))
    return Line("ok", "compiler", f"{versions[0]}, ninja {versions[1]}")


def _held(lock: Path) -> bool:
    """Whether a living process holds this lock."""
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def locks(root: Path, by_existence: bool | None = None) -> Line | None:
    """A lock in the folder of builds for which the next start would wait, for ever if it is stale.

    An older torch waits while a file `lock` exists, so that of a killed build is waited for without
    end. A newer one (pytorch/pytorch#190543) leaves the file behind after every build and locks it
    in the kernel, which forgets the dead: there only a lock that is held counts.

    Args:
        root: the folder of builds.
        by_existence: whether torch waits for the file itself; by default torch is asked.
    """
    if by_existence is None:
        # Read, not imported: it logs what it finds of CUDA.
        module = importlib.util.find_spec("torch.utils.cpp_extension")
        assert module is not None
        assert module.origin is not None
        by_existence = "FileBaton(" in Path(module.origin).read_text(encoding="utf-8")
    # With TORCH_EXTENSIONS_DIR builds lie one folder deep, without it two.
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            age = time.time() - lock.stat().st_mtime
            waits = by_existence or _held(lock)
        except FileNotFoundError:
            continue  # that build has just ended
        if by_existence and age > STALE:
            found = f"{lock} is {age / 60:.0f} minutes old, of a build that was killed: every start"
            return Line("FAILED", "builds", f"{found} would wait for it for ever", f"rm {lock}")
        if waits:
            found = f"{lock} is held: a build is running, and other starts wait for it"
            return Line("warning", "builds", found, f"if it does not end, see fuser -v {lock}")
    return None


def _open_to_others(folder: Path) -> bool:
    """Whether everybody may replace what lies in a folder."""
    mode = folder.stat().st_mode
    return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def builds(root: Path | None = None, by_existence: bool | None = None) -> Line:
    """The folder into which DeepSpeed's parts are built: writable, and locked by no dead build.

    Args:
        root: by default the one that torch takes.
        by_existence: see `locks`.
    """
    if root is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    try:
        probe(root)
    except (OSError, UserError) as error:
        cure = "set TORCH_EXTENSIONS_DIR to a folder where you may write"
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        return Line("FAILED", "builds", f"{root} cannot be written to: {reason}", cure)
    others = [path for path in (root, root.parent) if path.exists() and _open_to_others(path)]
    if others:
        found = f"{others[0]} may be written by others, whose code every start would then run"
        cure = "chmod o-w it, or set TORCH_EXTENSIONS_DIR to a folder of your own"
        return Line("FAILED", "builds", found, cure)
    return locks(root, by_existence) or Line(
        "ok", "builds", f"{root} can be written to, no build holds it"
    )


def shared_memory(folder: Path = Path("/dev/shm")) -> Line:
    """/dev/shm, through which the loaders' processes pass batches."""
    usage = shutil.disk_usage(folder)
    found = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free in {folder}"
    if usage.free < 1e9:
        cure = "give more (docker --shm-size=8g), clear it, or give --data.workers 0"
        return Line("warning", "shared memory", found, cure)
    return Line("ok", "shared memory", found)


def open_files(limit: int | None = None) -> Line:
    """How many files a process may open; ranks, loaders and shards take some hundreds."""
    if limit is None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < 1024:
        return Line("warning", "open files", f"at most {limit} a process", "ulimit -n 65536")
    return Line("ok", "open files", f"at most {limit} a process" if limit >= 0 else "no limit")
