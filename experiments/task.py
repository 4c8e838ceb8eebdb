"""One task of a sweep's array, for slurm/experiments.sh.

`python -m experiments.task start SWEEP LEVELS LEVEL INDEX` prints what the script is to run;
`... end SWEEP LEVELS LEVEL INDEX --code N --log FILE` notes how it ended.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Literal

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.experiments import state
from selfdistill.experiments.jobs import Job
from selfdistill.experiments.state import Sweep


def find(root: Path, levels: Path, level: int, index: int) -> tuple[Sweep, Job]:
    """The job of a task.

    Raises:
        UserError: there is no such task.
    """
    sweep = Sweep.open(root)
    try:
        name = json.loads(levels.read_text(encoding="utf-8"))[level][index]
    except (OSError, ValueError, IndexError):
        raise UserError(f"{levels} has no task {index} of level {level}") from None
    jobs = {job.name: job for job in sweep.plan().ordered()}
    if name not in jobs:
        raise UserError(f"{root}: its specs know no job {name}: run experiments.run again")
    return sweep, jobs[name]


def main(
    act: Literal["start", "end"],
    sweep: str,
    levels: str,
    level: int,
    index: int,
    code: int = 0,
    log: str | None = None,
) -> None:
    """Tells the job script what to run, or notes how that ended.

    Args:
        act: start or end.
        sweep: the sweep's folder.
        levels: file of the arrays' jobs.
        level: of the array.
        index: of the task.
        code: exit code of the launch.
        log: its log.
    """
    root = Path(sweep)
    found, job = find(root, Path(levels), level, index)
    if act == "end":
        state.end(root, job, code, state.error_of(Path(log), code) if code and log else "")
        return
    if job.usable(root):
        print("COMPLETE=1")
        return
    waits = [one.name for one in job.before if one.result(root) is None and not one.lost(root)]
    if waits:
        raise UserError(f"{job.name} needs {waits[0]}, which is not complete")
    if job.lost(root):
        print("COMPLETE=1")
        return
    try:
        words = job.command(root, found.data_root)
        words = state.begin(root, job, words, found.data_root, found.models)
    except UserError as error:
        state.end(root, job, 2, str(error))
        raise
    at = words.index("--output")
    print(f"OUTPUT={shlex.quote(words[at + 1])}")
    print(f"WORDS=({shlex.join(words[:at] + words[at + 2 :])})")
    print(f"{state.LAUNCH}{shlex.join(words)}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(main)
