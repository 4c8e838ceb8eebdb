"""Looks whether this machine, or the nodes of a SLURM step, can do a run.

`python -m launcher.doctor` prints one line a check: ok, warning or FAILED, what was found, and the
cure; exit code 2 if any failed. `srun --ntasks-per-node=1 python -m launcher.doctor --output DIR`
looks at every node of a job, and at what they must have in common.
"""

import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    from rich.console import Console
    from rich.text import Text

    from selfdistill.data import cli
    from selfdistill.engine.config import options as config
    from selfdistill.launcher.doctor import checks, machine, nodes, shared, storage
    from selfdistill.launcher.doctor.checks import Line, attempt
except ImportError as missing:
    if __name__ != "__main__":
        raise
    print(
        f"FAILED   packages: {missing}, in Python {platform.python_version()} ({sys.executable}):"
        " make venv, then .venv/bin/python -m launcher.doctor"
    )
    sys.exit(2)

_STYLES = {"ok": "green", "warning": "yellow", "FAILED": "bold red"}


class Report:
    """Prints lines: all of the first task, and of the others what is not ok.

    Attributes:
        failed: whether a line said so.
    """

    def __init__(self, me: nodes.Task) -> None:
        self.me = me
        self.failed = False
        self.console = Console(soft_wrap=True, highlight=False)

    def tell(self, lines: list[Line]) -> None:
        """Prints lines, after the host's name if there are several."""
        for line in lines:
            self.failed |= line.state == "FAILED"
            if self.me.rank and line.state == "ok":
                continue
            host = f"{self.me.host(self.me.rank)}: " if self.me.tasks > 1 else ""
            text = Text(f"{host}{line}")
            text.stylize(_STYLES[line.state], len(host), len(host) + len(line.state))
            self.console.print(text)


def meet(me: nodes.Task, output: Path | None, timeout: float) -> list[Line]:
    """What the tasks find out together; one alone sees whether the port is free.

    Args:
        me: this task.
        output: a folder that all should see; None to leave that out.
        timeout: seconds to wait for the others.

    Returns:
        Lines; those about all tasks come from the first one only.
    """
    if me.tasks == 1:
        return attempt("port", lambda: nodes.alone(me))
    lines = []
    if len(me.hosts) != me.tasks and me.rank == 0:
        found = f"{me.tasks} tasks on {len(me.hosts)} nodes"
        lines = [Line("warning", "nodes", found, "start one a node (srun --ntasks-per-node=1)")]
    with ThreadPoolExecutor(1) as pool:
        talk = nodes.listen if me.rank == 0 else nodes.call
        talking = pool.submit(attempt, "port", lambda: talk(me, timeout))
        files: list[Line] = []
        if output:
            files = attempt("shared folder", lambda: shared.share(me, output, timeout))
        lines += talking.result() + files
    if output is None and me.rank == 0:
        found = "not looked at, nor whether the nodes have the same versions"
        lines.append(Line("warning", "shared folder", found, "give --output DIR"))
    return lines


def _gpus() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def main(
    data: str | None = None,
    output: str | None = None,
    recipe: str | None = None,
    model: str | None = None,
    full: bool = False,
    timeout: float = 60.0,
) -> None:
    """Prints one line a check; exit code 2 if any failed, 0 with warnings or without.

    Args:
        data: a packed data set: its shards must be there, of the right size.
        output: a run folder: it must be writable, with room for checkpoints, and under srun one for
            all nodes.
        recipe: of the run; it names the model and how many checkpoints are kept.
        model: of the run; a folder with safetensors tells how large checkpoints will be.
        full: hash every shard, too (what python -m data.verify does).
        timeout: seconds to wait for other nodes.
    """
    settings = config.load({"recipe": recipe} if recipe else {})
    weights = model or settings.model.path
    me = nodes.task()
    report = Report(me)
    report.tell(attempt("Python", checks.python))
    report.tell(attempt("packages", checks.packages))
    run = Path(output).expanduser() if output else None
    if run:
        # Before they meet: afterwards another task may just be removing the folder.
        report.tell(attempt("run folder", lambda: storage.run_folder(run, weights, settings.keep)))
    # Before what may take long: others wait for this task, and importing torch holds up threads.
    report.tell(meet(me, run, timeout))
    report.tell(attempt("devices", machine.devices))
    if me.tasks > 1:
        report.tell(nodes.add_up(me, timeout))
    report.tell(attempt("compiler", lambda: machine.compiler()))
    report.tell(attempt("builds", machine.builds))
    report.tell(attempt("shared memory", machine.shared_memory))
    report.tell(attempt("open files", machine.open_files))
    if data:
        report.tell(attempt("data", lambda: storage.shards(data, full)))
    sys.exit(2 if report.failed else 0)


if __name__ == "__main__":
    cli.run(main)
