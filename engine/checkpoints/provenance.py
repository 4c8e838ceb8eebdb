"""Where a result comes from: the code, the command, the machine, the packages."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from selfdistill.data.errors import redacted

#: The clone, or where the package is installed.
ROOT = Path(__file__).resolve().parents[2]
_DRIVER = Path("/proc/driver/nvidia/version")


def provenance() -> dict[str, Any]:
    """What is the same for all stages of a launch.

    Returns:
        ``git`` (``commit``, and ``dirty``: whether tracked files differ from it; None where the
        program is no clone), ``command`` (without secrets of addresses), ``host``, ``python``,
        ``driver`` (NVIDIA's, None without), and ``packages``, a hash of all names and versions.
    """
    words = [word for word in sys.argv if not word.startswith("--local_rank")]
    return process() | {"command": redacted(shlex.join(words))}


@functools.cache
def process() -> dict[str, Any]:
    """What is the same for all launches of a process; made at its start, as the code was read then.

    Returns:
        `provenance`, without the command.
    """
    return {
        "git": git(ROOT),
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "driver": driver(),
        "packages": packages(),
    }


def git(folder: Path) -> dict[str, Any] | None:
    """Commit of a clone, and whether its tracked files differ from it; None where it is none."""
    if not (folder / ".git").exists():  # a folder above may be another project's
        return None
    ask = ["git", "-C", str(folder)]
    try:
        commit, changes = (
            subprocess.run(
                [*ask, *words], capture_output=True, text=True, check=True, timeout=20
            ).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.SubprocessError):  # no git here, or another owner's clone
        return None
    return {"commit": commit, "dirty": bool(changes)}


def driver() -> str | None:
    """The version of NVIDIA's driver, or None."""
    try:
        found = re.search(r"(\d+\.\d+(\.\d+)*)", _DRIVER.read_text(encoding="ascii"))
    except (OSError, UnicodeDecodeError):
        return None
    return found[1] if found else None


def packages() -> str:
    """sha256 over ``name==version`` of all installed packages, a line each, in order."""
    lines = {f"{str(d.name).lower()}=={d.version}\n" for d in importlib.metadata.distributions()}
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
