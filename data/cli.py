"""Command lines from a function's signature: Fire, with unknown flags refused before it runs.

Fire calls the function first and complains of a leftover flag afterwards, so a mistyped option
would start a long job with a default in its place. Here flags are checked against the signature
first, and values against the annotations (pydantic), so that every mistake is one line and exit
code 2. The page of --help is made of signature and docstring, too.
"""

import difflib
import errno
import functools
import inspect
import io
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import fire
import pydantic

from selfdistill.data.errors import UserError, commands_as_typed, printable

# Failures of the machine that the user, not we, can mend.
_USER_ERRNO = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "your quota is used up: free some space or choose another disk",
    errno.EACCES: "choose a place that you may read and write, or change its permissions",
    errno.EPERM: "choose a place that you may read and write, or change its permissions",
    errno.EROFS: "choose a folder on a writable disk",
    errno.EFBIG: "files may not be so large here: raise the limit (ulimit -f)",
    errno.ENAMETOOLONG: "take a shorter name or path",
    errno.ELOOP: "its links lead in a circle: remove them",
    errno.ENOTDIR: "a part of this path is a file: correct it",
    errno.EISDIR: "this is a folder: give a file",
}

#: How the command was typed, where that is not `python -m MODULE`; set by the package's command.
program: str | None = None


def nearest(word: str, options: Iterable[str], prefix: str = "--") -> str:
    """A hint for a mistyped word.

    Args:
        word: What was typed.
        options: What would have been right.
        prefix: Written before the suggestion.

    Returns:
        ``" Did you mean --x?"``, or ``""`` when nothing is near.
    """
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" Did you mean {prefix}{found[0]}?" if found else ""


def format_error(error: BaseException) -> str:
    """The error's text on one line, without control characters."""
    return printable(" ".join(str(error).split())) or type(error).__name__


def machine_error(error: OSError) -> UserError | None:
    """A full disk, missing permission and the like as a UserError; None for other failures."""
    cure = _USER_ERRNO.get(error.errno or 0)
    if cure is None:
        return None
    where = f" {error.filename}:" if error.filename else ""
    return UserError(f"{error.strerror}:{where} {cure}")


def _is_flag(word: str) -> bool:
    return word.startswith("--") or re.match(r"^-[a-zA-Z]", word) is not None


def _may_be_bare(annotation: Any) -> bool:
    """Whether an option may stand without a value: a bool, or a bool among other types."""
    return annotation is bool or bool in typing.get_args(annotation)


class Typed(NamedTuple):
    """An option as it was typed.

    Attributes:
        words: of the command line: one, or two with the value apart.
        value: None where the option stands bare.
    """

    words: list[str]
    value: str | None


def split_words(
    argv: Sequence[str],
    options: Mapping[str, Any],
    hint: Callable[[str, Iterable[str]], str] | None = None,
) -> tuple[dict[str, Typed], list[str]]:
    """Splits a command line into its options and its other words.

    Args:
        argv: The words of the command line, without the program's name.
        options: Every option's name and annotation. A bool may stand bare.
        hint: From a name that is no option and those that are, what is said behind it; by default
            the nearest one, and all where they are few.

    Returns:
        The options by name, dashes written as underscores; the words that belong to none.

    Raises:
        UserError: An unknown option, one given twice, one without its value.
    """
    typed: dict[str, Typed] = {}
    positional: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            positional.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag.lstrip("-").replace("-", "_")
        if not word.startswith("--"):  # Fire's short options: the only one of this letter
            starting = [option for option in options if option.startswith(name)]
            if len(name) > 1 or len(starting) != 1:
                raise UserError(
                    f"unknown option {flag}: options start with two dashes (--help lists them)"
                )
            name = starting[0]
        bare = name
        if name not in options and _may_be_bare(options.get(name.removeprefix("no"))):
            bare = name.removeprefix("no")  # --nooption
        if bare not in options:
            raise UserError(f"unknown option --{name}{(hint or _hint)(name, options)}")
        if bare in typed:
            raise UserError(f"--{name} is given twice: leave one of them out")
        if equals:
            typed[bare] = Typed([word], value)
        elif bare == name and rest and not _is_flag(rest[0]):
            typed[bare] = Typed([word, rest[0]], rest.pop(0))
        elif _may_be_bare(options[bare]):
            typed[bare] = Typed([word], None)
        else:
            raise UserError(f"--{name} has no value: write --{name} VALUE")
    return typed, positional


def _hint(name: str, options: Iterable[str]) -> str:
    known = list(options)
    listed = f"The options are: {', '.join('--' + option for option in known)}"
    return f".{nearest(name, known)} {listed if len(known) < 30 else '--help lists them'}"


def check_arguments(function: Callable[..., Any], argv: Sequence[str]) -> None:
    """Refuses options and arguments that the function does not have, or that it lacks.

    Args:
        function: Its parameters are the options.
        argv: The words of the command line, without the program's name.

    Raises:
        UserError: Names the word, and the nearest option.
    """
    parameters = dict(inspect.signature(function).parameters)
    # *paths takes all words that are no options, and is no option itself.
    variadic = [n for n, p in parameters.items() if p.kind is inspect.Parameter.VAR_POSITIONAL]
    for name in variadic:
        del parameters[name]
    typed, positional = split_words(argv, {n: p.annotation for n, p in parameters.items()})
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    free = [name for name in required if name not in typed]
    if variadic:
        positional = []
    if len(positional) > len(free):
        extra = positional[len(free)]
        raise UserError(f"unexpected argument {extra!r}: write options as --NAME VALUE")
    missing = free[len(positional) :]
    if missing:
        what = _descriptions(function).get(missing[0], "").partition(". ")[0].rstrip(".")
        what = f" ({what[:1].lower()}{what[1:]})" if what else ""
        raise UserError(f"{missing[0].upper()} is missing{what}: see --help for all options")


def kind_of(annotation: Any) -> str:
    """A short name of what an option takes, for a page of help: int, cls|mean, float,float."""
    if typing.get_origin(annotation) is Annotated:  # its last note may say it
        inner, *notes = typing.get_args(annotation)
        return notes[-1] if isinstance(notes[-1], str) else kind_of(inner)
    inside = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, inside))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return "|".join(map(kind_of, inside))
    if typing.get_origin(annotation) is tuple:
        return ",".join(map(kind_of, inside))
    return getattr(annotation, "__name__", str(annotation))


def default_of(value: Any) -> str:
    """An option's default in brackets, as it would be typed; "" where it stands for nothing."""
    typed = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    return "" if value is None or value == "" else f" [{typed}]"


def columns(rows: Sequence[tuple[str, str, str]]) -> list[str]:
    """Lines of a page of help: what is typed, its kind, what it is; as wide as the terminal."""
    first, second = (max((len(row[i]) for row in rows), default=0) for i in (0, 1))
    indent = first + second + 6
    width = max(shutil.get_terminal_size((120, 24)).columns - indent, 40)
    lines = []
    for name, kind, text in rows:
        head = f"  {name:<{first}}  {kind:<{second}}"
        body = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [
            f"{head if i == 0 else '':<{indent}}{line}".rstrip() for i, line in enumerate(body)
        ]
    return lines


def _descriptions(function: Callable[..., Any]) -> dict[str, str]:
    """What a docstring in Google's style says of each parameter."""
    rest = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")[2]
    entries = re.split(r"\n(?=\S)", textwrap.dedent(rest.partition("\n\n")[0]))
    return {entry.partition(":")[0]: " ".join(entry.split()[1:]) for entry in entries}


def help_text(function: Callable[..., Any], name: str) -> str:
    """The page of --help: the function's parameters, and what its docstring says of them.

    Args:
        function: Its docstring is in Google's style.
        name: What the command is called, e.g. "python -m data.pack".

    Returns:
        Its lines.
    """
    summary = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")[0]
    descriptions, usage, rows = _descriptions(function), [name], []
    for parameter in inspect.signature(function).parameters.values():
        text, kind = descriptions.get(parameter.name, ""), kind_of(parameter.annotation)
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            usage.append(f"{parameter.name.upper()} ...")
            rows.append((parameter.name.upper(), kind, text))
        elif parameter.default is inspect.Parameter.empty:
            usage.append(parameter.name.upper())
            rows.append((parameter.name.upper(), kind, text))
        else:
            rows.append(
                (f"--{parameter.name}", kind, (text + default_of(parameter.default)).strip())
            )
    options = ["[--OPTION VALUE ...]"] if any(row[0].startswith("--") for row in rows) else []
    page = [" ".join([*usage, *options]), "", " ".join(summary.split()), "", *columns(rows)]
    return "\n".join(page).rstrip()


def _choices(annotation: Any) -> list[str]:
    """The words of a Literal, which may be one among other types."""
    inside = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return [choice for choice in inside if isinstance(choice, str)]
    return [choice for part in inside for choice in _choices(part)]


def _value_of(name: str, annotation: Any, given: Any) -> Any:
    """What was typed, or passed in Python, as what the annotation says.

    Raises:
        UserError: It is nothing of the kind.
    """
    if bool in typing.get_args(annotation):
        # By pydantic's own choice the word "true" would stay a str.
        annotation = Annotated[annotation, pydantic.Field(union_mode="left_to_right")]
    if isinstance(given, os.PathLike):
        given = os.fspath(given)
    elif isinstance(given, int | float) and not isinstance(given, bool):
        given = str(given)  # a folder may be called 2024
    elif isinstance(given, list | tuple):
        given = ",".join(map(str, given))
    adapter = pydantic.TypeAdapter(annotation)
    try:
        return adapter.validate_python(None if given in ("None", "none", "null") else given)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        hint = nearest(str(given), _choices(annotation), prefix="")
        raise UserError(f"option --{name}: {reason}, not {given!r}.{hint}") from None


def _validated(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function taking strings, which pydantic turns into what the annotations say."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        for name, given in bound.arguments.items():
            parameter = signature.parameters[name]
            several = parameter.kind is inspect.Parameter.VAR_POSITIONAL
            bound.arguments[name] = (
                tuple(_value_of(name, parameter.annotation, one) for one in given)
                if several
                else _value_of(name, parameter.annotation, given)
            )
        return function(*bound.args, **bound.kwargs)

    return call


def _silent(function: Callable[..., Any]) -> Callable[..., None]:
    """The function without what it returns, which Fire would print."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)

    return call


def call(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls a command's function from Python, its arguments checked as a command line's are.

    Args:
        function: See `run`.
        args: What a command line gives without a name.
        options: What it gives as ``--NAME VALUE``.

    Returns:
        What the function returns.

    Raises:
        UserError: With the line that the command prints.
    """
    parameters = inspect.signature(function).parameters
    for name in options:
        if name not in parameters:
            raise UserError(f"unknown option --{name}{_hint(name, parameters)}")
    required = [n for n, p in parameters.items() if p.default is inspect.Parameter.empty]
    if missing := [name for name in required[len(args) :] if name not in options]:
        raise UserError(f"{missing[0]} is missing: give it, and see --help for all options")
    try:
        return _validated(function)(*args, **options)
    except OSError as error:
        if (told := machine_error(error)) is None:
            raise
        raise told from error


def run(function: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Runs a function as a command line.

    Args:
        function: Its parameters become the options; its docstring becomes the help.
        argv: The words of the command line; ``sys.argv[1:]`` when None.

    Raises:
        SystemExit: 2 for a user's mistake, 130 for Ctrl-C, 0 for ``--help``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec else None
    try:
        if "--help" in words or "-h" in words:
            typed = program or (f"python -m {name}" if name else Path(sys.argv[0]).name)
            print(commands_as_typed(help_text(function, typed)))
            sys.exit(0)
        check_arguments(function, words)
        # Fire would read 2024 as a number and 1e3 as a float although a folder's name is meant.
        # And it would end the arguments at a "-", which no word equals any more.
        words += ["--", "--separator=\0"]
        command = fire.decorators.SetParseFn(str)(_silent(_validated(function)))
        fire.Fire(command, command=words, name=name)
    except UserError as error:
        print(commands_as_typed(f"error: {format_error(error)}"), file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        user_error = machine_error(error)
        if user_error is None:
            raise
        print(commands_as_typed(f"error: {format_error(user_error)}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
