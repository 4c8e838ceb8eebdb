"""The terminal keeps this program's lines; those of libraries go to the run's log.

Errors stay where they were: a traceback, an abort of CUDA or NCCL, and records of level ERROR reach
stderr, which nobody redirects.
"""

from __future__ import annotations

import io
import logging
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from selfdistill.data.errors import commands_as_typed, printable
from selfdistill.data.files import nofollow

#: In a run's folder: what libraries said, and this program among it.
LOG = "log.txt"

_FORMAT = "[%(asctime)s] [%(levelname)s] [%(name)s] %(message)s"


class Log(io.TextIOBase):
    """Takes what libraries write: in memory at first, then into a file.

    A disk that is full costs the log, and not the run.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = io.StringIO()

    def begin(self) -> None:
        """From now on in memory: what another launch says waits for its folder."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        self._file = io.StringIO()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed: an attribute
        """See `io.TextIOBase`; some libraries ask."""
        return "utf-8"

    def write(self, text: str) -> int:
        """See `io.TextIOBase`."""
        if self._file is not None:
            try:
                self._file.write(text)
            except (OSError, ValueError):  # full; closed by Python at its exit
                self._file = None
        return len(text)

    def flush(self) -> None:
        """See `io.TextIOBase`: the file has each line at once."""

    def keep(self, path: Path | None) -> None:
        """From now on into a file, behind what it holds; into none on a rank without one.

        Raises:
            UserError: a link or no regular file is in its place.
        """
        early = self._file.getvalue() if isinstance(self._file, io.StringIO) else ""
        self._file = None
        if path is not None:
            with suppress(OSError):
                # Held till exit; a line at a time.
                self._file = open(  # noqa: SIM115
                    path, "a", 1, "utf-8", "backslashreplace", opener=nofollow
                )
            self.write(early)


_log: Log | None = None
_terminal: TextIO | None = None


def out() -> TextIO:
    """Where this program's own lines go."""
    return _terminal or sys.stdout


def say(line: str, to: TextIO | None = None) -> None:
    """Prints a line of this program's own, and notes it in the log.

    Args:
        line: one of ours.
        to: where; by default the terminal.
    """
    text = commands_as_typed(printable(line))
    # In one piece: to an unbuffered stream, as under DeepSpeed's launcher, print writes the end of
    # line apart, and another rank's line may come between.
    print(f"{text}\n", end="", file=to or out(), flush=True)
    if _log is not None:
        _log.write(f"[{time.strftime('%F %T')}] {text}\n")


def diverted() -> bool:
    """Whether libraries' lines go to the log."""
    return _log is not None


def divert() -> None:
    """From now on what libraries print and log goes to the log of the launch that begins."""
    global _log, _terminal
    if _log is not None:
        _log.begin()
        # Nothing new: but what warned in a launch before warns again, and into this one's log.
        warnings.simplefilter("default", append=True)
        return
    _log, _terminal = Log(), sys.stdout
    sys.stdout = _log  # DeepSpeed's logger takes it as it is imported
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    listen(logging.getLogger())


def listen(logger: logging.Logger) -> None:
    """Has a logger write to the log from level INFO, and errors to stderr as well."""
    if _log is None:
        return
    logger.handlers.clear()
    handlers: list[tuple[logging.Handler, int]] = [
        (logging.StreamHandler(_log), logging.INFO),
        (logging.StreamHandler(sys.stderr), logging.ERROR),
    ]
    for handler, level in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.setLevel(level)
        logger.addHandler(handler)


def keep(folder: Path | None) -> None:
    """Gives the log its file in a run's folder; a rank that writes none passes None."""
    if _log is not None:
        _log.keep(folder and folder / LOG)
