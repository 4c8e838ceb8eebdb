"""A Python that starts warm: its processes are forks of one that has imported all libraries.

To import torch, DeepSpeed, transformers and timm takes a process some five seconds of a core, nine
on a slow one, and the tests start hundreds. `executable()` is a program to put in the place of
`sys.executable`, with `deepspeed` and `torchrun` beside it: `SCRIPT ...` and `-m MODULE ...` run in
a fork, with the caller's words, folder, environment, standard streams, signals and exit code. What
such a process starts by `sys.executable` starts warm, too: DeepSpeed's own launcher does so with
its ranks. All else is done by the real Python, as is a process whose environment differs in what
libraries read when they are imported.

Not for tests of what a process is to the system: its parent, its session, SIGSTOP.
"""

import atexit
import functools
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


@functools.cache
def executable() -> Path:
    """The program. What it forks from starts at the first call, and ends with this process."""
    # Not where a test may look for what was left; and a socket's path has 107 bytes.
    folder = tempfile.TemporaryDirectory(prefix="warm-", dir="/tmp")
    program, address = Path(folder.name, "python"), Path(folder.name, "socket")
    client = Path(__file__).with_name("client.py")
    words = shlex.join([sys.executable, "-IS", str(client), str(address), sys.executable])
    program.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    for name in ("deepspeed", "torchrun"):
        script = Path(sys.executable).with_name(name)
        program.with_name(name).write_text(f'#!/bin/sh\nexec {program} {script} "$@"\n')
    for one in program.parent.glob("*"):
        one.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)  # who comes before the imports are done waits
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.kit.warm.server", str(listener.fileno()), str(program)],
        cwd=Path(__file__).resolve().parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,  # its end tells that this process has ended, however that may be
        pass_fds=[listener.fileno()],
    )
    listener.close()
    atexit.register(folder.cleanup)
    atexit.register(server.communicate)
    return program
