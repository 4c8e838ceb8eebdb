"""Feeds a reader of foreign files for some seconds, and says what it must never do.

A reader gives a right result, or raises UserError with one line that can be printed; within 10
seconds, and without a gigabyte more of memory. Whatever else it does ends the test with the input,
which is kept beside it in found/: every later run begins with those.
"""

from __future__ import annotations

import hashlib
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import hypothesis
from hypothesis import strategies as st

from selfdistill.data.cli import format_error, machine_error
from selfdistill.data.errors import UserError

FOUND = Path(__file__).parent / "found"
HANG = 10.0
GROWTH = 2**30
_BATCH = 500


class Target(NamedTuple):
    """One reader.

    Attributes:
        name: In messages, and of its folder in found/.
        read: Takes the file's bytes, and a folder that it may use.
        inputs: Makes such files.
    """

    name: str
    read: Callable[[bytes, Path], object]
    inputs: st.SearchStrategy[bytes]


def check(target: Target, content: bytes, folder: Path) -> None:
    """One input.

    Raises:
        AssertionError: What came out is no line.
        TimeoutError: It took too long.
    """
    try:
        target.read(content, folder)
    except (UserError, OSError) as caught:
        # A name of 300 characters, a full disk: every command makes a line of it.
        error = machine_error(caught) if isinstance(caught, OSError) else caught
        if error is None:
            raise
        line = format_error(error)
        assert line, "an empty error"
        line.encode()
        assert line.isprintable(), f"not fit for a terminal: {line!r}"


def keep(target: Target, content: bytes) -> Path:
    """Writes an input to found/."""
    place = FOUND / target.name / hashlib.sha256(content).hexdigest()[:16]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


def fuzz(target: Target, seconds: float, seed: int, folder: Path) -> int:
    """Feeds a reader with the inputs that were found before, then with new ones.

    Args:
        target: The reader.
        seconds: How long about.
        seed: Another seed, other inputs.
        folder: Of its own, for files.

    Returns:
        How many inputs it was fed.
    """
    count, began = 0, time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def one(content: bytes) -> None:
        nonlocal count
        count += 1
        # The first one imports what the reader needs.
        signal.setitimer(signal.ITIMER_REAL, HANG * (6 if count == 1 else 1))
        try:
            check(target, content, folder)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if not isinstance(error, KeyboardInterrupt):
                error.add_note(f"target {target.name}, input kept as {keep(target, content)}")
            raise
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert grown < GROWTH, f"{target.name} took {grown:,} bytes: {keep(target, content)}"

    def late(signal_number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {HANG:g} s")

    handler = signal.signal(signal.SIGALRM, late)
    try:
        for place in sorted((FOUND / target.name).glob("*")):
            one(place.read_bytes())
        while time.monotonic() - began < seconds:
            settings = hypothesis.settings(
                max_examples=_BATCH,
                deadline=None,
                database=None,
                phases=[hypothesis.Phase.generate],  # what is found is kept as it is
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            hypothesis.seed(seed)(settings(hypothesis.given(target.inputs)(one)))()
            seed += 1
    finally:
        signal.signal(signal.SIGALRM, handler)
    return count
