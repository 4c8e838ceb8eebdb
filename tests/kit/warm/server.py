"""What the warm processes are forks of: `python -m tests.kit.warm.server DESCRIPTOR PROGRAM`."""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn, TypedDict

#: What launches import.
MODULES = (
    *("torch._dynamo", "deepspeed", "transformers", "timm", "sklearn.metrics", "tensorboard"),
    *("torch.utils.tensorboard", "torch.distributed.run", "deepspeed.launcher.runner"),
    *("selfdistill.engine.run", "selfdistill.engine.stages.finetune"),
    *("selfdistill.engine.stages.distill", "selfdistill.engine.stages.decoder"),
)
#: What a launch sets before it imports them, where it is not set; a test in this process may have.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
#: Beginnings of the variables that libraries read when they are imported.
IMPORTED = ("DS_", "HF_", "LD_", "MKL_", "OMP_", "TRANSFORMERS_", "TRITON_")


class Request(TypedDict):
    """A process to run."""

    words: list[str]
    folder: str
    environment: dict[str, str]


def serve(listener: socket.socket) -> tuple[socket.socket, Request, list[int]]:
    """Forks a process for each connection, until standard input ends.

    Returns:
        In a forked process: its connection, what to run, and descriptors of the standard streams.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the system itself forgets those that ended
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        caller, _ = listener.accept()
        if os.fork() == 0:
            break
        caller.close()
    listener.close()
    head, streams, _, _ = socket.recv_fds(caller, 8, 3)
    with caller.makefile("rb") as file:
        request: Request = json.loads(file.read(int.from_bytes(head)))
    return caller, request, list(streams)


def imported(environment: dict[str, str]) -> dict[str, str]:
    """Those variables of an environment that libraries read when they are imported."""
    return QUIET | {k: v for k, v in environment.items() if k.startswith(IMPORTED)}


def watch(caller: socket.socket, child: int) -> NoReturn:
    """Sends the caller's signals on, and ends the process when the caller is gone."""
    while number := caller.recv(1):
        os.kill(child, number[0])
    os.kill(child, signal.SIGKILL)
    os._exit(0)


def run(request: Request, streams: list[int]) -> None:
    """Becomes the process that was asked for."""
    os.setsid()  # else a signal to its group would meet the tests
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    paths = {os.environ.get("PYTHONPATH"), sys.path[0]}
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    tempfile.tempdir = None  # which was TMPDIR's when it was asked for first
    words = request["words"]
    unbuffered = words[0] == "-u"
    words = words[unbuffered:]
    unbuffered |= bool(os.environ.get("PYTHONUNBUFFERED"))
    # Anew: whether they can seek, and are a terminal, was asked when they were made.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - all three for the life of the process
    out = sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    out.reconfigure(line_buffering=out.isatty(), write_through=unbuffered)
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    module = words[0] == "-m"
    sys.argv = words[module:]
    first = request["folder"] if module else str(Path(words[0]).resolve().parent)
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path = [first, *more, *(path for path in sys.path if path not in paths)]
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        # Not runpy's run_path, which puts another name into sys.argv.
        main, path = ModuleType("__main__"), Path(words[0]).absolute()
        main.__file__ = str(path)
        sys.modules["__main__"] = main
        exec(compile(path.read_bytes(), path, "exec"), main.__dict__)


def leave(error: BaseException | None) -> NoReturn:
    """Ends as Python ends, but for taking all that was imported to pieces, which takes a second."""
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    elif error is not None:
        code = 1
        sys.excepthook(type(error), error, error.__traceback__)
    # What Python calls at its end, which has no public name: threads that are no daemons end first.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def main() -> None:
    """Imports, then forks; each fork returns from here at the end of what it ran."""
    import numpy as np

    listener, given = socket.socket(fileno=int(sys.argv[1])), imported(dict(os.environ))
    os.environ |= given
    for name in MODULES:
        importlib.import_module(name)
    assert threading.active_count() == 1, "of several threads a fork has one; others hold locks"
    sys.executable = sys.argv[2]
    gc.collect()
    gc.freeze()
    caller, request, streams = serve(listener)
    if imported(request["environment"]) != given:
        caller.sendall(b"cold")
        os._exit(0)

    def ended(_: int, __: FrameType | None) -> NoReturn:
        code = os.waitstatus_to_exitcode(os.wait()[1])
        caller.sendall(str(code).encode())
        os._exit(0)

    signal.signal(signal.SIGCHLD, ended)
    if child := os.fork():
        for stream in streams:
            os.close(stream)
        watch(caller, child)
    for number in (signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    caller.close()
    # NumPy draws the seed of its global state, the legacy one, once, when it is imported.
    np.random.seed()  # noqa: NPY002
    try:
        run(request, streams)
    except BaseException as error:  # whatever it is, Python would end with it
        leave(error)
    leave(None)


if __name__ == "__main__":
    main()
