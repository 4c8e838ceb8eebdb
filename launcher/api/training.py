"""A training in processes of its own: its lines, its interrupts, and how it ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from selfdistill.data.errors import TryAgain, UserError
from selfdistill.engine.config.options import options as known_options
from selfdistill.engine.runtime.preemption import AGAIN
from selfdistill.launcher import train as command
from selfdistill.launcher.api.inputs import place_of, plain
from selfdistill.launcher.api.mistakes import Ended, argument

#: Lines of a training that failed for no known reason that its exception shows.
_LAST = 30
#: Lines of which exceptions are made; a cell shows them once.
_RAISED = ("error: ", "interrupted (")


def train(options: Mapping[str, Any]) -> Path:
    """Trains to the end.

    Args:
        options: see `calls.train`.

    Returns:
        The run's folder.

    Raises:
        UserError: see `calls.train`, as of the others.
        TryAgain: a rank is gone, or something else than this process has interrupted them.
        KeyboardInterrupt: this process was interrupted; says where.
        RuntimeError: an error in this program.
    """
    _check(options)
    launcher, config, words = command.split(words_of(options))
    launch = command.start(launcher, words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    last: deque[str] = deque(maxlen=_LAST)
    try:
        with _interruptible(launch):
            _pass_on(launch, last)
            code = launch.code()
    finally:
        if launch.process.poll() is None:  # whatever came between: no training without a caller
            launch.signal(signal.SIGTERM)
    if code:
        raise _reason(code, list(last), asked=launch.asked > 0)
    return config.place()


#: Of the launcher where a rank ended by SIGKILL or SIGTERM: of a shell, and of DeepSpeed's (-9).
_KILLED = (137, 143, 247, 241)


def _reason(code: int, last: list[str], *, asked: bool) -> BaseException:
    """Why a training ended early, from its exit code and its last lines."""
    told = [line.removeprefix("error: ") for line in last if line.startswith("error: ")]
    if code == 2 and told:
        return UserError(told[0])
    said = [line for line in last if line.startswith("interrupted (")]
    if asked and code in (AGAIN, 130):
        where = re.search(r" at (.*?): ", said[0]) if said else None
        if where is None:
            return KeyboardInterrupt("interrupted before there was anything to save: launch again")
        return KeyboardInterrupt(f"interrupted at {where[1]}: launch again to go on from there")
    if code == AGAIN:
        return TryAgain([*told, *said, "interrupted: launch again to go on"][0])
    if code in _KILLED:
        return TryAgain("a rank was killed, perhaps for memory: launch again to go on")
    return Ended("\n".join([f"the training ended with exit code {code}:", *last]))


@contextmanager
def _interruptible(launch: command.Launch) -> Iterator[None]:
    """Within it the first interrupt asks the ranks to save, and no other one disturbs them.

    By a handler: a KeyboardInterrupt would come anywhere, also while the first one is dealt with.
    """

    def ask(number: int, _: FrameType | None) -> None:
        with suppress(RuntimeError):  # it came amid another print
            print("still saving, wait" if launch.asked else "interrupted: saving, wait", flush=True)
        if not launch.asked:
            launch.signal(number)

    try:
        before = signal.signal(signal.SIGINT, ask)
    except ValueError:  # not the main thread, which alone gets interrupts
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _pass_on(launch: command.Launch, last: deque[str]) -> None:
    """Prints what the ranks print, to the end of their output; after an interrupt it is kept."""
    assert launch.process.stdout is not None
    for line in launch.process.stdout:
        if not (launch.asked or line.startswith(_RAISED)):
            print(line, end="", flush=True)
        last.append(line.rstrip("\n"))


def _check(options: Mapping[str, Any]) -> None:
    """Refuses what looks right in Python and is not.

    Raises:
        UserError: says what is meant.
    """
    known = known_options()
    for name, value in options.items():
        if name == "device":
            raise UserError(
                "device is no option: a training takes the GPUs that are there (num_gpus and"
                " include choose), else the processor"
            )
        inner = [one for one in known if one.startswith(f"{name}.")]
        owners = [one for one in known if one.endswith(f".{name}")]
        if inner and name not in known and not isinstance(value, Mapping):
            first = f"{name}.epochs" if f"{name}.epochs" in inner else inner[0]
            raise UserError(f"{name} takes a dictionary, such as {argument(first, '3')}")
        if owners and name not in known and not isinstance(value, Mapping):
            # The stage that few train stands last.
            at = sorted(owners, key=lambda one: one.startswith("decoder."))
            sections = [one.removesuffix(f".{name}") for one in at]
            listed = " or ".join(filter(None, (", ".join(sections[:-1]), sections[-1])))
            said = argument(at[0], repr(plain(value, name)))
            raise UserError(f"{name} belongs to {listed}: {said}")
    if not isinstance(data := options.get("data", ""), Mapping | list | tuple):
        place_of(data, "data")


def words_of(options: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Keyword arguments as the words of a command line.

    Args:
        options: values by names; a dictionary holds the options below its name.
        prefix: written before the names.
    """
    words: list[str] = []
    for name, value in options.items():
        value = plain(value, name)
        if isinstance(value, Mapping):
            words += words_of(value, f"{prefix}{name}.")
        else:
            words.append(f"--{prefix}{name}={_typed(value)}")
    return words


def _typed(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(_typed, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
