"""The errors that a user can mend, and how their text is made fit to be shown."""

import errno
import os
import re

_ADDRESS = re.compile(r"""([A-Za-z][A-Za-z0-9+.-]*://)([^\s/]*@)?(\S*)""")
# A data set's command, to the end of its line; of it what follows such a word.
_COMMAND = re.compile(r"pipe:[^\n]*")
_SECRET = re.compile(
    r"(?i)((?:bearer|basic|--user|-u)\s+|[\w-]*(?:key|secret|token|passw(?:or)?d)[\w-]*\s*[=:]\s*)"
    r"(?!bearer|basic)[^\s'\";&|]+"
)
#: Variable that says how the package's command is typed; the ranks that it starts have it, too.
TYPED = "SELFDISTILL_TYPED"

#: Refusals of a file system or network that may be over at the next launch.
PASSING = (errno.ESTALE, errno.EIO, errno.ETIMEDOUT, errno.ECONNRESET, errno.EHOSTUNREACH)

_LONG = re.compile(
    r"(?<![\w./-])(?<!selfdistill )(?:python -m )?(?:data|launcher|experiments)\."
    r"(pack|index|verify|subset|tokenizer|train|predict|embed|evaluate|compare|export|plan|doctor"
    r"|slurm|quickstart|screenshot|examples|run|report|theory)(?![\w/]|\.\w)"
)
_TRAIN = re.compile(r"(?<![\w./-])(?:deepspeed )?((?:--master_\w+ \S+ )?)engine/run\.py")
_QUERY = re.compile(r"([?&#][^=&#\s]+=)[^&#]*|([?&#])[^=&#\s]+(?=[&#]|$)")


class UserError(Exception):
    """A mistake of the user: one line saying what is wrong, where, and the cure.

    Command lines print it as ``error: <line>`` and exit with code 2; it never shows a traceback.
    """


class BrokenData(UserError):
    """A shard or a sample that cannot be used: the kind of error that may be skipped on request."""


class TryAgain(UserError):
    """Something passing: launching again may go well. Exit code 75 instead of 2."""


class WorkerLost(TryAgain):
    """A data loader worker was killed by the system."""


class PeerLost(TryAgain):
    """A collective failed because another rank is gone."""


def redacted(text: str) -> str:
    """Text without the secrets of addresses in it: logins, values of a query, of commands' words.

    Args:
        text: Any, such as ``https://user:password@host/x?token=secret``.

    Returns:
        The text, with ``https://***@host/x?token=***``.
    """

    def hide(found: re.Match[str]) -> str:
        scheme, login, rest = found.groups()
        shown = _QUERY.sub(lambda part: f"{part[1] or part[2]}***", rest)
        return scheme + ("***@" if login else "") + shown

    return _ADDRESS.sub(hide, _COMMAND.sub(lambda line: _SECRET.sub(r"\1***", line[0]), text))


def printable(text: str) -> str:
    r"""Text for a terminal or a log: without secrets, and without what could steer a terminal.

    Args:
        text: Any.

    Returns:
        The text, control characters, bidirectional marks and lone surrogates written as ``\x1b``.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
        for c in redacted(text)
    )


def commands_as_typed(text: str) -> str:
    """Text whose commands are those of the reader: `selfdistill pack` for `python -m data.pack`.

    Args:
        text: Any, with commands by their long names, which work in a clone alone.

    Returns:
        The text; unchanged where this process was not started by the package's command.
    """
    command = os.environ.get(TYPED)
    if command is None:
        return text

    def short(found: re.Match[str]) -> str:
        return f"{command} {'experiments' if found[1] == 'run' else found[1]}"

    def train(found: re.Match[str]) -> str:
        return f"{command} train {found[1]}".rstrip()

    return _TRAIN.sub(train, _LONG.sub(short, text))


def counted(count: int, one: str, many: str) -> str:
    """A number and its noun, such as "1 file is" and "2 files are"."""
    return f"{count} {one if count == 1 else many}"
