"""Command lines that hold a program's own options and any of engine/run.py's."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import pydantic

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration

Own = typing.TypeVar("Own", bound=pydantic.BaseModel)


def split(own: type[Own], words: Sequence[str]) -> tuple[Own, dict[str, list[str]]]:
    """Parts a command line into a program's options and those of engine/run.py.

    Args:
        own: the program's options, as a model's fields.
        words: of the command line.

    Returns:
        The program's options; the others, each as the words that were typed, by dotted name.

    Raises:
        UserError: an unknown option, with the nearest one; one given twice; a wrong value.
    """
    mine: dict[str, str] = {}
    others: dict[str, list[str]] = {}
    known = configuration.options()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--"):
            raise UserError(f"{word!r} belongs to no option: --help lists them")
        typed = [word]
        if not equals and rest and not rest[0].startswith("--"):
            typed.append(rest.pop(0))
            value = typed[1]
        if name in mine or name in others:
            raise UserError(f"--{name} is given twice: leave one of them out")
        field = own.model_fields.get(name)
        if field is None:
            if name not in known and name.removeprefix("no") not in known:
                near = cli.nearest(name, [*own.model_fields, *known])
                raise UserError(f"unknown option --{name}.{near} --help lists them")
            others[name] = typed
        elif value or equals:
            mine[name] = value
        elif field.annotation is bool:
            mine[name] = "true"
        else:
            raise UserError(f"--{name} has no value: write --{name} VALUE")
    try:
        return own.model_validate(mine), others
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"--{first['loc'][0]} {first['input']}: {reason}") from error


def help_text(own: type[pydantic.BaseModel], usage: str) -> str:
    """The page of --help."""
    lines = [usage, ""]
    for name, field in own.model_fields.items():
        default = "" if field.default is None else f" [{field.default}]"
        kind = configuration.kind_of(field)
        lines.append(f"  --{name:<28} {kind:<24} {field.description or ''}{default}")
    return "\n".join([*lines, "", "and any option of:", configuration.help_text()])
