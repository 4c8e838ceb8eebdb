"""The errors that a user can mend."""


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


def printable(text: str) -> str:
    r"""Text for a terminal: what could steer it (names of foreign files may) is escaped.

    Args:
        text: Any.

    Returns:
        The text, control characters, bidirectional marks and lone surrogates written as ``\x1b``.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
