"""What a user of the Python interface sees of a mistake: the own line, and the message.

Messages are written for command lines; here they come in Python's words.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from selfdistill.data.errors import UserError

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


class Ended(RuntimeError):
    """A training ended by an error in this program; holds its last lines, where the cause is."""


#: Commands that are functions here, by their modules.
_FUNCTIONS = {
    "data.pack": "pack",
    "engine/run.py": "train",
    "launcher.embed": "embed",
    "launcher.evaluate": "evaluate",
    "launcher.predict": "predict",
    "launcher.train": "train",
}
#: Functions whose options are another command's.
_COMMANDS = {"__init__": "train", "load": "predict"}
#: Ways in which a command line is told to be typed once more.
_AGAIN = re.compile(r"\blaunch (?:it|that|its run|any part)? ?again(?: with the same command)?")
_HELP = re.compile(r"(?<![\w`-])(?:`[^`]* )?--help`?(?= )")
_WORD = re.compile(
    # Commands that have no function, and other programs, stay as they are typed.
    r"(?P<kept>(?:python -m data\.(?!pack\b)\w+|\btar|`selfdistill \w+)(?: --?[\w-]+)+`?"
    r"|--local_rank)"
    r"|\(python -m data\.pack(?P<given>(?: [^\s()]+)+)\)"
    r"|(?<![\w/.])(?:python -m |deepspeed )?(?P<command>"
    + "|".join(re.escape(name) for name in _FUNCTIONS)
    + r")(?![\w/])"
    r"|(?<![\w/-])--(?P<name>[a-z]\w*(?:\.\w+)*)(?:[ =](?P<value>true|false|all|\d[\d.]*\d|\d)"
    r"(?![\w,:./]*\w))?"
)
#: Sections whose own name means a path, so that a dictionary cannot stand there.
_PATHS = ("data", "model", "teacher")
_PLAIN = {"true": "True", "false": "False", "all": '"all"'}


def in_python(text: str, function: str) -> str:
    """A command's message in Python's words.

    Commands become functions, and options arguments; where an option has no value that is sure to
    be one, it only loses its dashes.

    Args:
        text: the message.
        function: that was called, whose command's --help lists the options.
    """
    text = _HELP.sub(f"`selfdistill {function} --help`", text)
    training = "its run", "same command"  # of which a model or a set lacks a part

    def again(found: re.Match[str]) -> str:
        asked = "train" if any(word in found[0] for word in training) else function
        return f"call sd.{asked} again"

    return _WORD.sub(_said, _AGAIN.sub(again, text))


def _said(found: re.Match[str]) -> str:
    if found["kept"]:
        return found[0]
    if found["given"]:
        return f"(sd.pack({_arguments(found['given'].split())}))"
    if found["command"]:
        return f"sd.{_FUNCTIONS[found['command']]}"
    name, value = found["name"], found["value"]
    if value is None:
        return "overwrite=True" if name == "overwrite" else name
    return argument(name, _PLAIN.get(value, value))


def _arguments(words: list[str]) -> str:
    """A whole command line's words as arguments: SOURCE shards --size 64."""
    said: list[str] = []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            value = words.pop(0) if words and not words[0].startswith("--") else "true"
            said.append(argument(word[2:], _PLAIN.get(value, value)))
        else:
            said.append(word if word.isupper() else repr(word))
    return ", ".join(said)


def argument(name: str, value: str) -> str:
    """An option as a keyword argument.

    Args:
        name: of the option.
        value: as it stands in Python.
    """
    section, _, inner = name.rpartition(".")
    if section.partition(".")[0] in _PATHS:
        return f'**{{"{name}": {value}}}'
    return f'{section}={{"{inner}": {value}}}' if section else f"{name}={value}"


def told(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """The function, of whose mistakes and interrupts a notebook shows the caller's line alone.

    Args:
        function: of the Python interface.
    """

    @functools.wraps(function)
    def call(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        try:
            with warnings.catch_warnings():  # of rich and tqdm: a notebook without widgets is fine
                warnings.filterwarnings("ignore", '.*install "ipywidgets"|.*IProgress not found')
                return function(*args, **kwargs)
        except (UserError, KeyboardInterrupt, Ended) as error:
            if not error.args:  # an interrupt amid something: whoever makes it may ask where
                raise
            if not isinstance(error, Ended):
                name = _COMMANDS.get(function.__name__, function.__name__)
                error.args = (in_python(str(error), name),)
            raised: BaseException = error
        # Outside of `except`: what led to it is no cause for the caller.
        raised.__cause__ = raised.__context__ = None
        # IPython asks an exception for this method, which BaseException does not declare.
        raised._render_traceback_ = lambda: _shown(raised)  # type: ignore[attr-defined]
        raise raised.with_traceback(None)

    return call


def _shown(error: BaseException) -> Any:
    """What IPython shows of an error, as the lines that it asks for: all but our frame."""
    from IPython.core.getipython import get_ipython

    step = error.__traceback__
    while step is not None:
        if step.tb_next is not None and step.tb_next.tb_frame.f_code.co_filename == __file__:
            step.tb_next = None
        step = step.tb_next
    shell: Any = get_ipython()
    return shell.InteractiveTB.structured_traceback(type(error), error, error.__traceback__)
