"""Submits a run to SLURM: `python -m launcher.slurm submit --recipe NAME --data DIR --output DIR`.

The options are checked before anything is queued. The jobs are the templates of slurm/: with
`--stages all` one job, with several stages a chain in which each waits for the one before. A chain
that begins with pretrain has a job for stage 0 before it, which ends at once on a model with a
decoder.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration
from selfdistill.launcher import options as command_line

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("decoder", "pretrain", "distill", "finetune")
USAGE = "python -m launcher.slurm submit --recipe NAME --data DIR --model NAME --output DIR"

#: Options of engine/run.py that the templates take as variables.
VARIABLES = ("recipe", "data", "model", "output")

#: Recipes whose data the templates pack themselves.
EXAMPLES = ("quickstart", "quickstart_text")


class Options(BaseModel):
    """What is told to SLURM."""

    model_config = ConfigDict(extra="forbid")

    stages: str = Field("all", description="all in one job, or a chain: pretrain,distill,finetune")
    seeds: int = Field(1, ge=1, description="fine-tunings, as an array (in a chain of stages)")
    nodes: int = Field(1, ge=1, description="of each job")
    ranks: int | None = Field(None, ge=1, description="tasks a node (none = --gpus, or 2)")
    gpus: int | None = Field(None, ge=1, description="GPUs a node (none = not asked for)")
    cpus: int | None = Field(None, ge=1, description="CPUs a task")
    partition: str | None = Field(None, description="none = the cluster's default")
    account: str | None = Field(None, description="that is charged")
    time: str | None = Field(None, description="limit of each job, such as 24:00:00")
    dry_run: bool = Field(False, description="print the scripts and commands, submit nothing")

    @field_validator("stages")
    @classmethod
    def _known(cls, value: str) -> str:
        chosen = value.split(",")
        if value != "all" and [s for s in STAGES if s in chosen] != chosen:
            raise ValueError(f"must be all, or some of {','.join(STAGES)}, in this order")
        return value


@dataclass
class Job:
    """One call of sbatch.

    Attributes:
        name: in messages.
        template: its script, in slurm/.
        options: of sbatch, without the dependency.
        variables: of its environment.
    """

    name: str
    template: str
    options: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def script(self) -> Path:
        """The template's file."""
        return ROOT / "slurm" / self.template

    @property
    def log(self) -> str:
        """Its log's name, as sbatch reads it."""
        option = next(word for word in self.options if word.startswith("--output="))
        return option.partition("=")[2]

    def command(self, after: str | None) -> list[str]:
        """The words of sbatch; `after` is the job that must succeed first."""
        # Without the second option SLURM keeps a job whose dependency has failed in the queue.
        wait = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
        return ["sbatch", "--parsable", *self.options, *wait, str(self.script)]


def plan(options: Options, engine: dict[str, cli.Typed]) -> list[Job]:
    """The jobs of a submission, in order.

    Args:
        options: what is told to SLURM.
        engine: options of engine/run.py, as they were typed.

    Raises:
        UserError: an option that engine/run.py refuses, or that does not go with another.
    """
    if "stage" in engine:
        raise UserError("--stage is for one launch: write --stages all, or --stages pretrain,...")
    words = [word for option in engine.values() for word in option.words]
    config = configuration.load(configuration.parse(words))
    if not config.output:
        raise UserError("--output is missing: name the run folder, such as --output runs/first")
    if config.data.path is None and config.recipe not in EXAMPLES:
        raise UserError("--data is missing: name a folder made by python -m data.pack")
    chain = [] if options.stages == "all" else options.stages.split(",")
    if chain[:1] == ["pretrain"] and config.decoder.auto and config.model.path != "scratch":
        chain.insert(0, "decoder")  # whether the model has one is seen where it can be read
    if options.seeds > 1 and "finetune" not in chain:
        raise UserError(
            f"--seeds {options.seeds} is an array of the stage finetune: add --stages"
            f" {','.join(STAGES[1:])}, or take --finetune.seeds {options.seeds} in one job"
        )
    variables = {name.upper(): "" for name in VARIABLES} | {"SELFDISTILL_ROOT": str(ROOT)}
    arguments: list[str] = []
    seedless: list[str] = []  # of an array, whose tasks have seeds of their own
    for name, option in engine.items():
        if name in VARIABLES:
            variables[name.upper()] = option.value or ""
        else:
            arguments += option.words
            seedless += option.words if name != "seed" else []
    variables["ARGS"] = shlex.join(arguments)
    # The templates' shell finds ~ in a variable, where it stands for nothing.
    variables["OUTPUT"] = str(config.place())
    # sbatch reads %j and the like in a file's name.
    logs = str(config.place() / "slurm").replace("%", "%%")
    asked = {
        "nodes": options.nodes,
        "ntasks-per-node": options.ranks or options.gpus,
        "gpus-per-node": options.gpus,
        "cpus-per-task": options.cpus,
        "partition": options.partition,
        "account": options.account,
        "time": options.time,
        "export": "ALL",  # whatever SBATCH_EXPORT says
    }
    common = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    if not chain:
        config.check_warmups()
        config.check_judges()
        return [Job("all", "selfdistill.sh", [*common, f"--output={logs}/all-%j.log"], variables)]
    jobs = []
    for stage in chain:
        own = configuration.load(configuration.parse(["--stage", stage, *words]))
        own.check_warmups()
        own.check_judges()
        log, array, environment = f"{stage}-%j.log", [], variables | {"STAGE": stage}
        if stage == "finetune" and options.seeds > 1:
            log, array = f"{stage}-%A_%a.log", [f"--array=0-{options.seeds - 1}"]
            environment |= {"SEED": str(config.seed), "ARGS": shlex.join(seedless)}
        mine = [f"--job-name={stage}", f"--output={logs}/{log}"]
        jobs.append(Job(stage, "stage.sh", [*common, *mine, *array], environment))
    return jobs


def submit(jobs: Sequence[Job]) -> list[str]:
    """Queues the jobs, each after the one before; returns their ids.

    Raises:
        UserError: SLURM is not here, or refuses one; those before it are then taken back.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch on PATH: run this on a login node of the cluster")
    ids: list[str] = []
    for job in jobs:
        # A log whose folder is missing is lost, and the job with it.
        Path(job.log.replace("%%", "%")).parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            job.command(ids[-1] if ids else None),
            env=os.environ | job.variables,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            if ids:
                subprocess.run(["scancel", *ids], check=False)
            raise UserError(f"sbatch refuses {job.name}: {done.stderr}: nothing stays queued")
        ids.append(done.stdout.strip().partition(";")[0])  # "id;cluster" in a federation
    return ids


def tell(jobs: Sequence[Job], ids: Sequence[str]) -> None:
    """Prints what was queued, and how to follow it."""
    for job, number in zip(jobs, ids, strict=True):
        log = job.log.replace("%j", number).replace("%A_%a", number + "_*").replace("%%", "%")
        print(f"{number}  {job.name}  {log}")
    listed = ",".join(ids)
    output = jobs[0].variables["OUTPUT"]
    print(f"follow: squeue --jobs {listed}; tail -F the logs; tensorboard --logdir {output}")
    print(f"stop:   scancel {' '.join(ids)}")


def show(jobs: Sequence[Job]) -> None:
    """Prints the scripts and the commands that would queue them."""
    for script in dict.fromkeys(job.script for job in jobs):
        print(f"### {script}\n{script.read_text(encoding='utf-8')}")
    before = None
    for job in jobs:
        assignments = [f"{name}={shlex.quote(value)}" for name, value in job.variables.items()]
        print(f"### {job.name}\n{' '.join(assignments)} \\\n    {shlex.join(job.command(before))}")
        before = f"<id of {job.name}>"


def main(argv: Sequence[str] | None = None) -> None:
    """Submits the jobs of a run; a user's mistake is one line and exit code 2.

    Args:
        argv: words of the command line; those of the process when None.
    """
    given = list(sys.argv[1:] if argv is None else argv)

    def act() -> None:
        if {"--help", "-h"} & set(given):
            print(command_line.help_text(Options, USAGE))
            return
        if given[:1] != ["submit"]:
            raise UserError(f"write {USAGE}")
        options, engine = command_line.split(Options, given[1:])
        jobs = plan(options, engine)
        if options.dry_run:
            show(jobs)
        else:
            tell(jobs, submit(jobs))

    cli.run(act, [])


if __name__ == "__main__":
    main()
