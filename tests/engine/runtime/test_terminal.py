"""What libraries say goes to the run's log; errors and crashes stay on the terminal."""

import resource
import subprocess
import sys
from pathlib import Path

from tests.kit.launches import ROOT, environment

PROGRAM = """
import logging, pathlib, sys, warnings
from selfdistill.engine.runtime import terminal

other = logging.getLogger("DeepSpeed")
other.addHandler(logging.StreamHandler(sys.stdout))
other.propagate = False
terminal.divert()
terminal.divert()
terminal.listen(other)
print("a library prints")
warnings.warn("a library warns", UserWarning)
other.warning("DeepSpeed warns")
logging.getLogger("torch.somewhere").warning("torch warns")
terminal.say("early")
terminal.keep(pathlib.Path(sys.argv[1]) if sys.argv[1] else None)
terminal.say("late\\x1b[31m")
terminal.say("error: ours", sys.stderr)
other.error("DeepSpeed fails")
print("a library prints again")
raise RuntimeError("the reason")
"""

FOREIGN = ("a library prints", "a library warns", "DeepSpeed warns", "torch warns", "prints again")


def call(folder: Path | str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the program; files may grow to so many bytes."""

    def set_limit() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=set_limit,
    )


def test_each_line_goes_where_it_belongs(tmp_path: Path) -> None:
    done = call(tmp_path)
    assert done.stdout == "early\nlate\\x1b[31m\n"
    assert "DeepSpeed fails" in done.stderr
    assert "error: ours\n" in done.stderr
    assert done.stderr.endswith("RuntimeError: the reason\n")
    assert not [line for line in FOREIGN if line in done.stdout + done.stderr]
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    ours = ("early", "late\\x1b[31m", "error: ours", "DeepSpeed fails")
    assert all(line in log for line in (*FOREIGN, *ours))
    assert log.index("DeepSpeed warns") < log.index("early") < log.index("prints again")
    call(tmp_path)  # a second launch goes on in the same file
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").count("DeepSpeed warns") == 2


def test_a_full_disk_costs_the_log_and_nothing_else(tmp_path: Path) -> None:
    """Other ranks have no log at all."""
    for place, bytes_left in ((tmp_path, 100), ("", None)):
        done = call(place, bytes_left)
        assert done.stdout == "early\nlate\\x1b[31m\n"
        assert "RuntimeError: the reason\n" in done.stderr
    assert (tmp_path / "log.txt").stat().st_size <= 100


def test_a_link_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.txt").symlink_to(tmp_path / "elsewhere")
    assert "UserError" in call(tmp_path).stderr
    assert not (tmp_path / "elsewhere").exists()
