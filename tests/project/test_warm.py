"""A process that starts warm is to its parent what a process of the real Python is."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit import warm
from tests.kit.launches import environment
from tests.kit.warm.server import QUIET

#: What a process sees of itself.
LOOK = """
import json, os, sys, tempfile
found = dict(words=sys.argv, name=__name__, folder=os.getcwd(), paths=sys.path[:2])
found |= dict(variable=os.environ.get("VARIABLE"), rank=os.environ.get("RANK"))
found |= dict(place=tempfile.gettempdir())
found |= dict(read=sys.stdin.read(), terminal=sys.stdout.isatty(), file=__file__)
found |= dict(through=sys.stdout.write_through, errors=sys.stderr.errors)
print(json.dumps(found))
print("to the other", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
#: Waits for a signal, and tells that it came.
WAIT = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
print(os.getpid(), "torch" in sys.modules, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [("look.py", "3"), ("-u", "look.py", "0"), ("-m", "look", "5")])
def test_it_is_what_the_real_one_is(tmp_path: Path, how: tuple[str, ...]) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    seen = []
    for python in (sys.executable, warm.executable()):
        done = subprocess.run(
            [python, *how],
            input="given",
            cwd=tmp_path,
            env=environment(
                VARIABLE="here",
                TMPDIR=str(tmp_path),
                PYTHONPATH=f"{tmp_path}/more",
                PYTHONUNBUFFERED="",
            ),
            capture_output=True,
            text=True,
        )
        seen.append((json.loads(done.stdout), done.stderr, done.returncode))
    assert seen[0] == seen[1]
    assert seen[1][2] == int(how[-1])


def test_faults(tmp_path: Path) -> None:
    (tmp_path / "fault.py").write_text(
        "import sys\nsys.exit('a word') if sys.argv[1:] else 1 / 0\n"
    )
    for more, told in ((), "ZeroDivisionError: division by zero"), (("x",), "a word"):
        done = subprocess.run(
            [warm.executable(), tmp_path / "fault.py", *more],
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1] == told


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_signals_reach_it(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "wait.py").write_text(WAIT)
    process = subprocess.Popen(
        # As of a shell's background job: a program that listens hears it all the same.
        ["sh", "-c", 'trap "" USR1; exec "$@"', "", warm.executable(), tmp_path / "wait.py"],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    pid, imported = process.stdout.readline().split()
    assert imported == "True"
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (75 if number == signal.SIGUSR1 else -number)
    end = time.monotonic() + 10
    while Path("/proc", pid).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path("/proc", pid).exists()


def test_the_real_one_does_the_rest(tmp_path: Path) -> None:
    """Code of the command line, what libraries read when imported, and other descriptors."""
    (tmp_path / "look.py").write_text("import sys; print('torch' in sys.modules)")
    read, write = os.pipe()
    for words, fds, more, told in (
        (["-c", "import sys; print('torch' in sys.modules)"], (), {}, False),
        ([tmp_path / "look.py"], (), {"HF_HOME": str(tmp_path)}, False),
        ([tmp_path / "look.py"], (write,), {}, False),
        ([tmp_path / "look.py"], (), QUIET, True),
    ):
        done = subprocess.run(
            [warm.executable(), *words],
            env=environment(**more),
            pass_fds=fds,
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"{told}\n"
    os.close(read)
    os.close(write)
