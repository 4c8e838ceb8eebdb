"""Command lines: mistakes are one line on stderr and exit code 2."""

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Literal

import pytest

from selfdistill.data.cli import columns, help_text, nearest, run
from selfdistill.data.errors import UserError, printable, redacted
from selfdistill.engine.config import options as configuration
from selfdistill.engine.config.options import parse
from tests.kit.command import call
from tests.kit.launches import ROOT

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
        (["a"], "OUT is missing"),
        (["a", "b", "c"], "unexpected argument 'c'"),
        (["a", "b", "--size"], "--size has no value"),
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


def many(
    *tars: str,
    kind: Literal["a", "b"] | None = None,
    pair: tuple[float, float] = (0.5, 1.0),
    a_rather_long_name: int | str = 3,
) -> None:
    """Takes all,
    and more.

    Args:
        tars: Some, or
            all.
        kind: Of them: a
            or b.

    Raises:
        UserError: Never.
    """


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help(
    word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        run(job, ["a", word])
    assert not caught.value.code
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[1:] == [
        "",
        "Does nothing.",
        "",
        "  SOURCE  str    From.",
        "  OUT     str    To.",
        "  --size  int    Pixels.",
        "  --rate  float  Per second. [0.5]",
        "  --dry   bool   Not for real. [False]",
    ]
    assert out.splitlines()[0].endswith(" SOURCE OUT [--OPTION VALUE ...]")
    assert help_text(many, "python -m many").splitlines() == [
        "python -m many TARS ... [--OPTION VALUE ...]",
        "",
        "Takes all, and more.",
        "",
        "  TARS                  str          Some, or all.",
        "  --kind                a|b          Of them: a or b.",
        "  --pair                float,float  [0.5,1.0]",
        "  --a_rather_long_name  int|str      [3]",
    ]
    monkeypatch.setenv("COLUMNS", "62")
    assert columns([("--a", "int", "word " * 12)])[1] == " " * 12 + "word word"


def test_help_of_a_run_can_be_typed_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    lines = configuration.help_text().splitlines()
    listed = [re.match(r"  --([\w.]+) {2,}(\S+)(  |$)", line) for line in lines[2:-3]]
    assert all(listed), [line for line, found in zip(lines[2:], listed, strict=False) if not found]
    assert "(with --stage all)" in next(line for line in lines if line.startswith("  --compare "))
    betas = next(line for line in lines if line.startswith("  --finetune.betas "))
    assert betas.split()[1] == "float,float"
    assert "such as 0.9,0.999" in betas
    typed = parse(["--finetune.betas", "0.9,0.999", "--stage", "all", "--compare", "true"])
    assert configuration.load(typed).finetune.betas == (0.9, 0.999)


@pytest.mark.parametrize("command", ["data.pack", "data.verify", "launcher.compare"])
def test_another_python_is_told_of_the_environment(command: str) -> None:
    """As by a system's Python, which has none of the packages."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        f"error: the packages are not installed in this Python ({sys.executable}): run in the"
        " clone `make venv`, then `source .venv/bin/activate`\n"
    )


def test_nearest() -> None:
    assert nearest("sizee", ["size", "out"]) == " Did you mean --size?"
    assert nearest("qqq", ["size"]) == ""


def test_names_of_strangers_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2J\u202eb\ud800é\n") == "a\\x1b[2J\\u202eb\\ud800é\n"

    def fail(name: str) -> None:
        raise UserError(f"{name} is missing")

    assert call(fail, "\x1b]0;title\x07") == 2
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07 is missing\n"


def test_secrets_of_addresses_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    url = "https://me:pass@host/x/train?token=abc&part=2"
    assert redacted(url) == "https://***@host/x/train?token=***&part=***"
    assert redacted("s3://bucket/train 'http://a/b'") == "s3://bucket/train 'http://a/b'"
    for secret in ("u:p@ss@h/x", "u:it's@h/x?token=a'b", "h/x?ss", "h/x#access=ss", "h/?a=1&ss"):
        shown = redacted(f"https://{secret}")
        assert "ss" not in shown.replace("access", ""), shown
        assert "'" not in shown, shown

    def fail(name: str) -> None:
        raise UserError(f"cannot fetch {name}: why")

    assert call(fail, url) == 2
    printed = capsys.readouterr().err
    assert "pass" not in printed
    assert "abc" not in printed
    config = configuration.load({"data": url})
    assert config.data.path == url
    assert "pass" not in config.toml()
    assert "***@host" in config.toml()
