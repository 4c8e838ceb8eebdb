"""Trains on this machine: `python -m launcher.train --recipe NAME --data DIR --output DIR`.

The deepspeed launcher starts the ranks, as in `deepspeed engine/run.py ...`. Its own lines stay off
the terminal, mistakes are told before it starts, Ctrl-C reaches the ranks, which save, and the exit
code is theirs. At the end stand the table, and what can be typed next.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import site
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import no_set
from selfdistill.engine.checkpoints.results import RESULT, numbered
from selfdistill.engine.config import options as configuration
from selfdistill.engine.config.schema import Config
from selfdistill.engine.runtime.preemption import AGAIN
from selfdistill.engine.runtime.rendezvous import free_port
from selfdistill.launcher import options as command_line

USAGE = "selfdistill train --recipe NAME --data DIR --model NAME --output DIR"

#: Under which the package is imported, and the folder in which it lies.
PACKAGE, HOME = "selfdistill", Path(__file__).resolve().parents[1]

#: What DeepSpeed's launcher is told beside: the ranks say what went wrong.
_SILENT = ("--log_level", "critical")

#: Of a machine with GPUs: NVIDIA's, those of WSL, AMD's.
GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")

#: Where the launcher looks for other machines by itself.
_HOSTFILE = "/job/hostfile"

#: Signals that ask the ranks to save and leave.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


class Options(BaseModel):
    """What is told to the deepspeed launcher, under its own names."""

    model_config = ConfigDict(extra="forbid")

    num_gpus: int | None = Field(
        None, ge=1, description="processes of each machine (none = one a GPU, without GPUs one)"
    )
    include: str | None = Field(None, description="GPUs to use, such as localhost:0,2")
    exclude: str | None = Field(None, description="GPUs to leave alone")
    hostfile: str | None = Field(None, description="machines and their slots, for several machines")
    num_nodes: int | None = Field(None, ge=1, description="machines of the hostfile to use")
    master_addr: str | None = Field(None, description="address of the first machine")
    master_port: int | None = Field(
        None, ge=1, le=65535, description="at which the ranks meet (none = a free one)"
    )


@dataclass
class Launch:
    """A training on its way.

    Attributes:
        process: the deepspeed launcher.
        asked: signals that were passed on.
    """

    process: subprocess.Popen[str]
    asked: int = 0

    def signal(self, number: int) -> None:
        """Passes a signal on to the ranks, which save and leave.

        The launcher itself would end at once, or end them.
        """
        import psutil

        self.asked += 1
        with suppress(psutil.Error):
            started = psutil.Process(self.process.pid)
            whole = [started, *started.children(recursive=True)]
            local: list[psutil.Process] = []
            for one in whole:
                with suppress(psutil.Error):  # of a process that has just ended
                    if "deepspeed.launcher.launch" in one.cmdline():
                        local.append(one)
            ranks = [rank for one in local for rank in one.children()]
            for one in ranks or whole[::-1]:
                with suppress(psutil.Error):
                    one.send_signal(number if ranks else signal.SIGTERM)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Within it, what asks this process to leave asks the ranks."""

        def forward(number: int, _: FrameType | None) -> None:
            self.signal(number)

        kept = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # nohup: a terminal may go
        numbers = [one for one in _SIGNALS if one != signal.SIGHUP or not kept]
        before = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def code(self) -> int:
        """Waits for the end; the exit code of the ranks."""
        code = self.process.wait()
        if self.asked and code not in (0, 2, AGAIN):
            return 130  # before the ranks could listen, or for the second time
        return 128 - code if code < 0 else code


def split(words: Sequence[str]) -> tuple[Options, Config, list[str]]:
    """Parts a command line, and checks it.

    Args:
        words: options of the deepspeed launcher, and of engine/run.py.

    Returns:
        The launcher's options; the run's configuration; the words from which it was made.

    Raises:
        UserError: an unknown option, a wrong value, an unreadable recipe, no --output.
    """
    options, others = command_line.split(Options, words)
    rest = [word for option in others.values() for word in option.words]
    config = configuration.load(configuration.parse(rest))
    config.check_warmups()
    config.check_judges()
    config.place()
    if config.data.path is not None and (missing := no_set(config.data.path)):
        raise UserError(missing)
    return options, config, rest


def start(options: Options, words: Sequence[str], **streams: Any) -> Launch:
    """Starts the ranks.

    Args:
        options: of the launcher.
        words: of engine/run.py.
        streams: of `subprocess.Popen`.
    """
    gpus = any(map(os.path.exists, GPUS))
    process = subprocess.Popen(
        [*launcher(options, gpus), "--module", f"{PACKAGE}.engine.run", *words],
        env=environment(gpus),
        stdin=subprocess.DEVNULL,
        text=True,
        errors="backslashreplace",
        start_new_session=True,  # a terminal's Ctrl-C is for this process, which passes it on
        **streams,
    )
    return Launch(process)


def run(words: Sequence[str]) -> Path:
    """Trains to the end.

    Args:
        words: of the command line.

    Returns:
        The run's folder.

    Raises:
        UserError: see `split`.
        SystemExit: the ranks ended otherwise; with their exit code, and they have said why.
    """
    options, config, rest = split(words)
    if options.include and not any(map(os.path.exists, GPUS)):
        print("note: no GPU here: the processes run on the CPU", file=sys.stderr)
    launch = start(options, rest)
    with launch.forwarding():
        code = launch.code()
    if code:
        sys.exit(code)
    return config.place()


def launcher(options: Options, gpus: bool) -> list[str]:
    """The command line of DeepSpeed's launcher, up to what it starts; it prints errors alone.

    Where the processes are known, that of this machine is started at once: `deepspeed` itself would
    first import itself to find them, for seconds.

    Args:
        options: of the command line.
        gpus: whether this machine has some.
    """
    several = options.hostfile is not None or os.path.exists(_HOSTFILE)
    given: dict[str, Any] = {} if several else {"master_port": free_port()}
    given |= options.model_dump(exclude_none=True)
    number = given.pop("num_gpus", None if gpus else 1)
    module, told = "runner", given
    if number is not None and given.keys() == {"master_port"} and not several:
        world = base64.urlsafe_b64encode(json.dumps({"localhost": [*range(number)]}).encode())
        module, told = "launch", {"world_info": world.decode()} | given
    elif number is not None and "num_gpus" in options.model_fields_set:
        told = {"num_gpus": number} | given
    words = [f"--{name}={value}" for name, value in told.items()]
    # -u: what the ranks print is there when they have printed it.
    return [sys.executable, "-u", "-m", f"deepspeed.launcher.{module}", *words, *_SILENT]


def environment(gpus: bool) -> dict[str, str]:
    """That of the ranks: they find this package, wherever it was imported from.

    Args:
        gpus: whether this machine has some.
    """
    found = os.environ | {"PYTHONSAFEPATH": "1"}  # not what lies in the folder of the caller
    home = str(Path(sys.modules[PACKAGE].__file__ or "").resolve().parents[1])
    if home not in (*site.getsitepackages(), site.getusersitepackages()):
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (home, found.get("PYTHONPATH"))))
    # The launcher looks for this environment's tools, ninja among them.
    found["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), found.get("PATH", "")))
    if not gpus:
        found.setdefault("DS_ACCELERATOR", "cpu")  # else each process warns that it finds no GPU
    return found


def program() -> str:
    """How this package's command is typed here."""
    return cli.program.rpartition(" ")[0] if cli.program else f"python -m {PACKAGE}"


def conclude(run: Path) -> None:
    """Prints the table of a run that has scores, and what can be typed next."""
    from selfdistill.launcher import compare

    if _scored(run):
        with suppress(UserError):  # neither val nor test: nothing was scored
            compare.show(run)
    say_next(run)


def say_next(run: Path) -> None:
    """Prints command lines that use what a run left."""
    from rich.console import Console

    console = Console(emoji=False, markup=False, highlight=False, soft_wrap=True)
    folder, command = shlex.quote(str(run)), program()
    lines = [f"tensorboard --logdir {folder}"]
    if _scored(run):
        lines = [
            f"{command} predict {folder} INPUTS labels.csv",
            f"{command} evaluate {folder} LABELLED --out page",
            *lines,
        ]
    elif (run / "pretrain" / RESULT).is_file():
        stage = "finetune" if numbered(run, "distill-") else "distill"
        lines.insert(0, f"{command} train --stage {stage} --output {folder} ...")
    console.print("next:", style="bold")
    for line in lines:
        console.print(f"  {line}")


def _scored(run: Path) -> bool:
    """Whether a fine-tuning is complete."""
    return any(run.glob(f"finetune*/{RESULT}"))


def main(argv: Sequence[str] | None = None) -> None:
    """Trains; a user's mistake is one line and exit code 2.

    Args:
        argv: words of the command line; those of the process when None.
    """
    given = list(sys.argv[1:] if argv is None else argv)

    def train() -> None:
        if not given or {"--help", "-h"} & set(given):
            print(command_line.help_text(Options, USAGE, given))
            return
        conclude(run(given))

    cli.run(train, [])


if __name__ == "__main__":
    main()
