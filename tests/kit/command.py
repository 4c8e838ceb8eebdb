"""A command line run in this process, as `python -m` would run it."""

from collections.abc import Callable
from typing import Any

from selfdistill.data import cli


def call(function: Callable[..., Any], *words: object) -> int:
    """The exit code of a command line."""
    try:
        cli.run(function, [str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
