"""What a run will need, before it is started: `python -m launcher.plan --recipe NAME --data DIR`.

Memory of a GPU by ZeRO stage beside DeepSpeed's own estimator, disk, FLOPs and time at a stated
MFU, the rate at which samples must be read, and a step on 8, 64 and 1,024 devices. No weights are
trained, and nothing is downloaded.
All options of engine/run.py are taken as well, and mean the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from selfdistill.data import cli
from selfdistill.engine.config import options as configuration
from selfdistill.launcher import options as command_line
from selfdistill.launcher.plan import Options

USAGE = "python -m launcher.plan --recipe NAME --data DIR --devices N --device NAME"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan of a run; a user's mistake is one line and exit code 2.

    Args:
        argv: words of the command line; those of the process when None.
    """
    given = list(sys.argv[1:] if argv is None else argv)

    def show_all() -> None:
        if {"--help", "-h"} & set(given):
            print(command_line.help_text(Options, USAGE))
            return
        # Below, what imports torch: seconds, for which neither --help nor a wrong option waits.
        options, others = command_line.split(Options, given)
        words = [word for option in others.values() for word in option.words]
        config = configuration.load(configuration.parse(words))
        from selfdistill.launcher.plan.forecast import prepare

        plan = prepare(options, config)
        import deepspeed  # noqa: F401  # takes seconds, and says something: before the tables

        from selfdistill.launcher.plan.tables import show

        show(plan, Console())

    cli.run(show_all, [])


if __name__ == "__main__":
    main()
