"""Command lines that hold a program's own options and any of engine/run.py's."""

from __future__ import annotations

import typing
from collections.abc import Sequence

import pydantic

from selfdistill.data import cli
from selfdistill.data.errors import UserError, commands_as_typed
from selfdistill.engine.config import options as configuration

Own = typing.TypeVar("Own", bound=pydantic.BaseModel)


def split(own: type[Own], words: Sequence[str]) -> tuple[Own, dict[str, cli.Typed]]:
    """Parts a command line into a program's options and those of engine/run.py.

    Args:
        own: the program's options, as a model's fields.
        words: of the command line.

    Returns:
        The program's options; the others as they were typed, by dotted name.

    Raises:
        UserError: an unknown option, with the nearest one; one given twice; a wrong value.
    """
    known = configuration.options() | own.model_fields
    typed, positional = cli.split_words(words, {name: f.annotation for name, f in known.items()})
    if positional:
        raise UserError(f"{positional[0]!r} belongs to no option: --help lists them")
    others = {name: option for name, option in typed.items() if name not in own.model_fields}
    mine = {
        name: "true" if option.value is None else option.value
        for name, option in typed.items()
        if name in own.model_fields and not _left_out(own.model_fields[name], option)
    }
    try:
        return own.model_validate(mine), others
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"--{first['loc'][0]} {first['input']}: {reason}") from error


def _left_out(field: pydantic.fields.FieldInfo, option: cli.Typed) -> bool:
    """Whether "none" is typed where it is the default."""
    return field.default is None and option.value in ("None", "none")


def help_text(own: type[pydantic.BaseModel], usage: str, words: Sequence[str] = ()) -> str:
    """The page of --help.

    Args:
        own: the program's options.
        usage: its first line.
        words: of the command line; a `--recipe` among them gives the defaults that are shown.
    """
    lines = [usage, ""]
    for name, field in own.model_fields.items():
        default = "" if field.default is None else f" [{field.default}]"
        kind = configuration.kind_of(field)
        lines.append(f"  --{name:<28} {kind:<24} {field.description or ''}{default}")
    lines += ["", "and any option of:", configuration.help_text(words)]
    return commands_as_typed("\n".join(lines))
