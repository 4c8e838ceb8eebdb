"""Whether the nodes of a SLURM step see one file system, and have the same versions.

Each task writes a file of its versions into OUTPUT/.doctor-JOB and looks for those of the others.
"""

import contextlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

from selfdistill.data.errors import UserError
from selfdistill.launcher.doctor.checks import Line, versions
from selfdistill.launcher.doctor.nodes import Task


def create(folder: Path) -> list[Path]:
    """Makes a folder and those above it.

    Returns:
        Those that were not there before, in the order in which they can be removed.

    Raises:
        UserError: a file is in the way.
        OSError: the file system refuses.
    """
    made: list[Path] = []
    try:
        for path in [*reversed(folder.parents), folder]:
            try:
                if path.is_dir():
                    continue
                # Not only where is_dir denies it: NFS may deny what another node has just made.
                path.mkdir()
                made.insert(0, path)
            except (FileExistsError, NotADirectoryError):
                if not path.is_dir():
                    raise UserError(
                        f"{path} is not a folder, and {folder} needs one there: choose another"
                    ) from None
    except BaseException:
        remove(made)
        raise
    return made


def remove(made: list[Path]) -> None:
    """Removes folders that `create` made, as far as they are empty."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()


def share(me: Task, output: Path, timeout: float) -> list[Line]:
    """Whether every task's file is seen here, and whether their versions agree.

    Args:
        me: this task.
        output: the run folder, which need not be there.
        timeout: seconds to wait for the others.

    Returns:
        A line on the folder; from the first of those that see one another, one on versions too.
    """
    folder = output.absolute() / f".doctor-{me.job}"
    try:
        content = {"made": [str(path) for path in create(folder)], "versions": versions()}
        draft = folder / f"{me.rank}.tmp"
        draft.write_text(json.dumps(content), encoding="utf-8")
        draft.rename(folder / f"{me.rank}.json")  # whole from the moment that it is seen
        seen = _wait(me, folder, "json", set(range(me.tasks)), timeout) | {me.rank}
        leader = me.rank == min(seen)
        reports = (
            {r: json.loads((folder / f"{r}.json").read_text()) for r in seen} if leader else {}
        )
        (folder / f"{me.rank}.done").touch()
        if leader:
            _wait(me, folder, "done", seen, timeout)
            shutil.rmtree(folder, ignore_errors=True)
            made = {Path(path) for one in reports.values() for path in one["made"]}
            remove(sorted(made, key=lambda path: -len(path.parts)))
    except (OSError, UserError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        cure = "choose an --output where every node may write"
        return [Line("FAILED", "shared folder", f"{folder}: {reason}", cure)]
    lines = [_compare(me, reports)] if len(reports) > 1 else []
    if missing := [me.host(rank) for rank in range(me.tasks) if rank not in seen]:
        found = (
            f"{output} as {me.host(me.rank)} sees it has no file of {', '.join(missing)} after"
            f" {timeout:.0f} s"
        )
        cure = "choose an --output on a file system that all nodes mount"
        return [Line("FAILED", "shared folder", found, cure), *lines]
    return [Line("ok", "shared folder", f"{output} is one for all {me.tasks} nodes"), *lines]


def _wait(me: Task, folder: Path, suffix: str, ranks: set[int], timeout: float) -> set[int]:
    """Looks until the files RANK.suffix of these ranks are there; returns those that are."""
    until, pause = time.monotonic() + timeout, 0.1
    while True:
        # NFS lists a folder from its cache for up to a minute unless this node changes it.
        beat = folder / f"{me.rank}.beat"
        beat.touch()
        beat.unlink()
        seen = {int(path.stem) for path in folder.glob(f"*.{suffix}")} & ranks
        if seen == ranks or time.monotonic() > until:
            return seen
        time.sleep(pause)
        pause = min(1.0, 2 * pause)


def _compare(me: Task, reports: dict[int, dict[str, Any]]) -> Line:
    """Whether Python and the packages have one version everywhere."""
    first = min(reports)
    other = [
        f"{name} is {there.get(name, 'none')} on {me.host(rank)} and {version} on {me.host(first)}"
        for name, version in reports[first]["versions"].items()
        for rank in sorted(reports)
        if (there := reports[rank]["versions"]).get(name) != version
    ]
    if other:
        others = f", and {len(other) - 3} more" if len(other) > 3 else ""
        cure = "use one environment on a shared file system, or make venv on every node"
        return Line("FAILED", "versions", ", ".join(other[:3]) + others, cure)
    count = len(reports[first]["versions"]) - 1
    found = f"Python and {count} packages are the same on {len(reports)} nodes"
    return Line("ok", "versions", found)
