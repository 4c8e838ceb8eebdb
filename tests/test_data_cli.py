"""Command lines: mistakes are one line on stderr and exit code 2."""

import errno
from collections.abc import Callable
from typing import Any

import pytest

from data.cli import nearest, run
from data.errors import UserError

CALLS: list[tuple[Any, ...]] = []


def job(
    source: str, out: str, size: int | None = None, rate: float = 0.5, dry: bool = False
) -> None:
    """Does nothing.

    Args:
        source: From.
        out: To.
        size: Pixels.
        rate: Per second.
        dry: Not for real.
    """
    CALLS.append((source, out, size, rate, dry))


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (["a", "b"], ("a", "b", None, 0.5, False)),
        (["2024", "1e3", "--size", "8"], ("2024", "1e3", 8, 0.5, False)),
        (["--source=a b", "--out", "x", "--dry"], ("a b", "x", None, 0.5, True)),
        (["a", "--dry", "true", "--out=b", "--rate=-1"], ("a", "b", None, -1.0, True)),
        (["a", "b", "--size=None", "-r", "2"], ("a", "b", None, 2.0, False)),
        (["True", "[1]", "--dry=False"], ("True", "[1]", None, 0.5, False)),
    ],
)
def test_words_become_arguments(words: list[str], call: tuple[Any, ...]) -> None:
    CALLS.clear()
    run(job, words)
    assert [call] == CALLS


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a", "b", "--sise", "3"], "unknown option --sise. Did you mean --size?"),
        (["a", "b", "--zzz"], "unknown option --zzz. The options are: --source,"),
        (["a"], "out is missing"),
        (["a", "b", "c"], "unexpected argument 'c'"),
        (["a", "b", "--size"], "--size needs a value"),
        (["a", "b", "--size", "big"], "option --size: Input should be a valid integer"),
        (["a", "b", "--size", "2.5"], "option --size"),
        (["a", "b", "--dry", "maybe"], "option --dry"),
        (["a", "b", "--rate=fast"], "option --rate"),
        (["a", "b", "--size=1", "--size=2"], "--size is given twice"),
        (["a", "b", "-q"], "unknown option -q"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    CALLS.clear()
    with pytest.raises(SystemExit) as caught:
        run(job, words)
    assert caught.value.code == 2
    assert not CALLS
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert out == ""


def raising(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("two\nlines"), 2, "error: two lines\n"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "/x: free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "change its permissions"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_failures(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run(raising(error), [])
    assert caught.value.code == code
    assert said in capsys.readouterr().err


def test_faults_of_ours_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()), [])
    with pytest.raises(OSError, match="odd"):
        run(raising(OSError(errno.EIO, "odd")), [])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(job, ["--help"])
    assert not caught.value.code
    out, err = capsys.readouterr()
    assert "Pixels." in out + err


def test_nearest() -> None:
    assert nearest("sizee", ["size", "out"]) == " Did you mean --size?"
    assert nearest("qqq", ["size"]) == ""
