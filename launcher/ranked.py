"""Commands that one process runs, or several: under deepspeed, torchrun or srun."""

import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from selfdistill.data import cli
from selfdistill.data.errors import UserError

#: Seconds in which a launcher ends the other ranks of one that failed.
_PATIENCE = 6.0


def run(function: Callable[..., Any]) -> None:
    """`cli.run`, without the option that the launcher of DeepSpeed adds for itself.

    Args:
        function: The command.

    Raises:
        SystemExit: See `cli.run`.
    """

    @functools.wraps(function)
    def told_once(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError:
            # Most mistakes are every rank's: the first says it, then the launcher ends the others.
            if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))):
                time.sleep(_PATIENCE)
            raise

    cli.run(told_once, [word for word in sys.argv[1:] if not word.startswith("--local_rank")])
