"""What goes wrong where srun starts ranks.

It goes on with the table of tests/engine/runtime/test_starts.py.
A real SLURM of two hosts.
"""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.kit.lab import LOGIN, Cluster
from tests.cluster.kit.work import clone
from tests.kit.launches import environment

pytestmark = [pytest.mark.cluster, pytest.mark.faults]

RUN = (
    "python engine/run.py --stage pretrain --pretrain.steps 2 --pretrain.batch 8 --data shards"
    " --model base --output runs/"
)
TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    yield
    print("\n\n" + "\n".join(TABLE))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("starts"))


def note(what: str, printed: str, began: float, code: int) -> str:
    """A row of the table: the first line of the run's own that tells something."""
    told = re.findall(r"^(?:error: |interrupted |rank \d+ of ).*", printed, re.MULTILINE)
    said = (told or [line for line in printed.splitlines() if line.strip()] or [""])[0].strip()
    TABLE.append(f"| srun | {what} | {said} | {time.monotonic() - began:.0f} s | {code} |")
    return said


def shell(
    cluster: Cluster, root: Path, command: str, timeout: float = 120, **env: str
) -> tuple[int, str]:
    done = cluster.run(
        *(LOGIN, "bash", "-c", command),
        cwd=root,
        env=environment(**env),
        check=False,
        timeout=timeout,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_port_that_is_taken(cluster: Cluster, root: Path) -> None:
    began = time.monotonic()
    listen = "import socket, time; s = socket.create_server(('', 23456)); time.sleep(60)"
    command = (
        f'srun --overlap -N1 -n1 -w node1 python -c "{listen}" & sleep 3;'
        f" srun --overlap -N2 -n2 --kill-on-bad-exit=1 {RUN}taken; code=$?; kill %1; exit $code"
    )
    code, printed = shell(cluster, root, command, MASTER_PORT="23456")
    said = note("the port is taken", printed, began, code)
    assert "port 23456 of node1" in said
    assert "MASTER_PORT=" in said
    assert "srun ..." in said
    assert code == 75


def test_a_name_that_nobody_knows(cluster: Cluster, root: Path) -> None:
    began = time.monotonic()
    code, printed = shell(
        cluster, root, f"srun -N2 -n2 {RUN}name", MASTER_ADDR="no-such-host.invalid"
    )
    said = note("MASTER_ADDR does not resolve", printed, began, code)
    assert "does not know no-such-host.invalid" in said
    assert code == 2


def test_a_task_that_dies_as_it_starts(cluster: Cluster, root: Path) -> None:
    """Without --kill-on-bad-exit srun lets the others wait: they say for whom until it is ended."""
    began = time.monotonic()
    die = 'if [ $SLURM_PROCID = 1 ]; then exit 9; else exec "$@"; fi'
    srun = f"srun -N2 -n2 --kill-on-bad-exit=0 bash -c '{die}' - {RUN}die"
    command = f"timeout --signal=TERM -k 20 40 {srun}"
    code, printed = shell(cluster, root, command)
    said = note("task 1 of 2 dies as it starts; SIGTERM to srun after 40 s", printed, began, code)
    assert "waiting for rank 1" in printed, printed
    assert "rank 0 of 2, 15 s" in said


def test_an_interactive_shell_of_several_tasks(cluster: Cluster, root: Path) -> None:
    """`srun --pty bash` with two tasks: the second has no terminal, and its shell ends at once."""
    began = time.monotonic()
    typed = f"(timeout --signal=TERM 40 {RUN}pty); exit\\n"
    command = f"printf '{typed}' | script -qec 'srun -N1 -n2 --pty bash --norc' /dev/null"
    code, printed = shell(cluster, root, command)
    said = note("`srun -n 2 --pty bash`, plain python; SIGTERM after 40 s", printed, began, code)
    assert "this shell is one task of `srun --pty`" in said, printed


def test_two_jobs_on_a_node(cluster: Cluster, root: Path) -> None:
    """Each step has a port of its own: both are done."""
    began = time.monotonic()
    both = " & ".join(
        f"srun -N1 -n1 -w node1 --exact --mem=0 {RUN}pair-{n} > pair-{n}.log 2>&1" for n in "ab"
    )
    command = f"{both} & wait; cat pair-a.log pair-b.log"
    _, printed = shell(cluster, root, command)
    assert printed.count("pretrain: done in") == 2, printed
    TABLE.append(
        f"| srun | two jobs on one node | both are done | {time.monotonic() - began:.0f} s | 0 |"
    )
