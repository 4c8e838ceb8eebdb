"""What a run will need, before it is started: `python -m launcher.plan --recipe NAME --data DIR`.

Memory of a GPU by ZeRO stage beside DeepSpeed's own estimator, disk, FLOPs and time at a stated
MFU, and the rate at which samples must be read. No weights are trained, and nothing is downloaded.
All options of engine/run.py are taken as well, and mean the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pydantic
from rich.console import Console

from data import cli
from data.errors import UserError
from engine import config as configuration
from engine.run import parse as parse_overrides
from launcher.forecast import Options, prepare


def split(words: Sequence[str]) -> tuple[Options, dict[str, Any]]:
    """Parts a command line into plan's options and those of engine/run.py.

    Raises:
        UserError: an unknown option, with the nearest one; a wrong value.
    """
    own: dict[str, Any] = {}
    others: list[str] = []
    known = configuration.options()
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in Options.model_fields:
            bare = name.removeprefix("no")
            if word.startswith("--") and name not in known and bare not in known:
                near = cli.nearest(name, [*Options.model_fields, *known])
                raise UserError(f"unknown option --{name}.{near} --help lists them")
            others.append(word)
            continue
        if name in own:
            raise UserError(f"--{name} is given twice: leave one of them out")
        own[name] = value if equals else next(rest, "--")
        if own[name].startswith("--"):
            raise UserError(f"--{name} has no value: write --{name} VALUE")
    try:
        options = Options.model_validate(own)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"--{first['loc'][0]} {first['input']}: {first['msg']}") from error
    return options, parse_overrides(others)


def help_text() -> str:
    """The page of --help."""
    lines = ["python -m launcher.plan --recipe NAME --data DIR --devices N --device NAME", ""]
    for name, field in Options.model_fields.items():
        default = "" if field.default is None else f" [{field.default}]"
        told = f"{configuration.kind_of(field):<24} {field.description}{default}"
        lines.append(f"  --{name:<28} {told}")
    return "\n".join([*lines, "", "and all options of:", configuration.help_text()])


def main(words: Sequence[str] | None = None) -> None:
    """Prints the plan of a run; a user's mistake is one line and exit code 2.

    Args:
        words: of the command line; those of the process when None.
    """
    given = list(sys.argv[1:] if words is None else words)

    def show_all() -> None:
        if {"--help", "-h"} & set(given):
            print(help_text())
            return
        options, overrides = split(given)
        config = configuration.load(overrides)
        plan = prepare(options, config)
        import deepspeed  # noqa: F401  # takes seconds, and says something: before the tables

        from launcher.plan_tables import show

        show(plan, Console())

    cli.run(show_all, [])


if __name__ == "__main__":
    main()
