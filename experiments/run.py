"""Runs the paper's experiments: `python -m experiments.run table1 table2 --data_root shards`.

What is complete is not done again; what several tables need is done once; one failure stops only
what depends on it. After an interruption the same command continues.
"""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.config import options as configuration
from selfdistill.engine.config.schema import Config
from selfdistill.experiments import arrays, state
from selfdistill.experiments.jobs import PIPELINE, SEARCH_SEED, Choice, Job, typed
from selfdistill.experiments.local import Local, gpus
from selfdistill.experiments.plan import Plan
from selfdistill.experiments.spec import Specs, Table
from selfdistill.experiments.state import Asked, Precision, Sweep

ROOT = Path(__file__).resolve().parent.parent


def check(root: Path, plan: Plan) -> None:
    """Refuses options that engine/run.py refuses, and a folder made with others, before any start.

    Raises:
        UserError: names the job.
    """
    lengths: dict[str, int] = {}
    for job in plan.ordered():
        try:
            for options in job.possible():
                words = [word for k, v in options.items() for word in (f"--{k}", typed(v))]
                config = configuration.load(configuration.parse([*words, "--stage", job.stage]))
                if job.stage == "finetune" and config.finetune.regularizer in ("recadam", "mars"):
                    place = str(plan.place(job.dataset))
                    if place not in lengths:
                        lengths[place] = Manifest.load_split(place, "train").samples
                    steps = config.finetune.length(lengths[place])
                    _check_regularizer(config, steps)
        except UserError as error:
            raise UserError(f"{job.name}: {error}") from error
        tried = [one for choice in job.choices for _, one in choice.candidates]
        known = all(one.result(root) or one.lost(root) for one in tried)
        if job.result(root) is not None and known:
            words = job.command(root, plan.data_root)
            state.check(root, job, words, plan.data_root, plan.models)


def _check_regularizer(config: Config, steps: int) -> None:
    """Refuses what the regularizer would refuse before it starts."""
    # Late, as they import torch and timm: seconds, for which most sweeps have no use.
    from selfdistill.engine.regularizers import mars, recadam

    if config.finetune.regularizer == "recadam":
        recadam.check(config, steps)
    else:
        mars.check(config)


def show(root: Path, plan: Plan, console: Console) -> None:
    """Prints the jobs, where they stand, and what they wait for."""
    names = {job.name for job in state.wanted(root, plan)}
    for job in plan.ordered():
        stands = state.status(root, job)
        stands = "open" if stands == "done" and job.name in names else stands
        waits = [one.name for one in job.before]
        after = (
            f"  (after {waits[0] if len(waits) == 1 else f'{len(waits)} others'})" if waits else ""
        )
        console.print(f"{stands:8s}{job.name}{after}", soft_wrap=True)
    for line in costs(plan):
        console.print(line, soft_wrap=True)


def costs(plan: Plan) -> list[str]:
    """What a plan takes: candidates of each method's search, and launches by stage."""
    lines: dict[str, None] = {}
    for cell in plan.cells:
        found = {c.name + str(c.candidates[0][0]): c for c in _choices(cell.job)}
        if found:
            count = sum(len(choice.candidates) for choice in found.values())
            tried = [stage for c in found.values() for _, j in c.candidates for stage in _own(j)]
            own = ", ".join(
                f"{tried.count(s)} with a {s} of their own" for s in dict.fromkeys(tried)
            )
            told = f"search of {cell.dataset.name}/{cell.method.name}: {count} candidates"
            lines[told + (f", {own}" if own else "")] = None
    stages = [f"{job.stage} of a search" if "/search/" in job.name else job.stage
              for job in plan.ordered()]  # fmt: skip
    counts = ", ".join(f"{stages.count(s)} {s}" for s in dict.fromkeys(stages))
    runs = {cell.job.name: cell.seeds for cell in plan.cells}
    return [*lines, f"{len(stages)} jobs: {counts}; {sum(runs.values())} fine-tunings reported"]


def _choices(job: Job) -> list[Choice]:
    """What validation decides for a job, and for the stages that it starts from."""
    return [*(one for need in job.needs for one in _choices(need)), *job.choices]


def _own(candidate: Job) -> list[str]:
    """Stages that a candidate does not share."""
    return [need.stage for need in candidate.needs if "/search/" in need.name]


def missing(plan: Plan, only: Sequence[str]) -> None:
    """Says which data sets are not there; refuses when none is.

    Raises:
        UserError: nothing can be run, or --only names what no table has.
    """
    if strange := [word for word in only if word not in plan.named]:
        near = cli.nearest(strange[0], sorted(plan.named), "")
        raise UserError(f"--only {strange[0]}: none of these tables has it.{near}")
    absent = [f"{d.name} ({d.pack})" if d.pack else d.name for d in plan.absent.values()]
    absent += [
        f"{d.name} has no val split to choose by (pack it with --val_fraction 0.1)"
        for d in plan.unsearchable.values()
    ]
    if not plan.cells:
        raise UserError(
            f"none of its data sets can be taken from {plan.data_root}: {'; '.join(absent)}"
        )
    for one in absent:
        print(f"not in {plan.data_root}, left out: {one}", file=sys.stderr)


@contextlib.contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds a sweep's folder, so that two calls do not start the same jobs.

    Raises:
        UserError: another call has it.
    """
    with (root / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{root}: another call of experiments.run is at work there: wait for it, or name"
                " all tables in one call"
            ) from None
        yield


def main(
    *tables: str,
    data_root: str | None = None,
    output: str = "runs/experiments",
    profile: str = "small",
    models: str | None = None,
    specs: str | None = None,
    datasets: str | None = None,
    only: str | None = None,
    seeds: int | None = None,
    pipelines: int | None = None,
    ranks: int = 1,
    jobs: int = 0,
    hours: float = 0.0,
    halving: int = 0,
    search: bool = True,
    precision: Precision | None = None,
    in_process: bool = False,
    slurm: bool = False,
    dry_run: bool = False,
) -> None:
    """Runs tables and figures of the paper, or what is missing of them.

    Args:
        tables: which, in this order, such as table1 figure4; none lists what there is.
        data_root: folder of packed data sets, each in a folder of its name.
        output: the sweep's folder.
        profile: models and schedules: small, real (encoders that people use), or paper (Table 9).
        models: folder of models, in place of those from the hub: MODELS/dinov2-small, say, for
            facebook/dinov2-small.
        specs: folder with methods/, datasets/, tables/, profiles/ or claims/ of your own.
        datasets: in place of the tables' own, such as flowers_64,scierc.
        only: data sets, methods, or DATASET/METHOD, between commas; the rest is left for later.
        seeds: fine-tunings of each cell, in place of the tables' own; 1 with several pipelines.
        pipelines: stages 1 and 2 of each cell, with seeds of their own, and so many fine-tunings
            from each; in place of the tables' own, 1.
        ranks: processes of one job.
        jobs: at a time; 0 takes one for each GPU, or core.
        hours: after which nothing new is started.
        halving: try a search's candidates at a part of their length first: one in so many goes on
            to so many times the length; 0 tries all at the whole length.
        search: false takes the options of profile and methods as they are, and tries no others.
        precision: in place of the profile's, such as fp32 where bf16 has no units of its own.
        in_process: do jobs one after another in one process, of --jobs such: no start for each.
        slurm: submit arrays of SLURM jobs instead; options of sbatch come from SBATCH_ variables,
            so ranks, jobs, hours and in_process may not be given.
        dry_run: list the jobs and where they stand.
    """
    known = Specs(Path(specs) if specs else None)
    if not tables:
        for name in known.names(Table):
            print(f"{name:12s}{known.load(Table, name).title}")
        raise UserError("no table is named: python -m experiments.run table1 --data_root shards")
    for name, value, least in (("ranks", ranks, 1), ("jobs", jobs, 0), ("hours", hours, 0)):
        if value < least:
            raise UserError(f"--{name} {value}: give {least} or more")
    if halving and not search:
        raise UserError(
            f"--halving {halving} with --search false: there is no search to halve: leave one out"
        )
    if halving < 0 or halving == 1:
        raise UserError(f"--halving {halving}: give 0, for none, or 2 or more, such as 3")
    if seeds is not None and seeds < (1 if pipelines is not None and pipelines > 1 else 2):
        raise UserError(
            f"--seeds {seeds}: give 2 or more, or 1 with --pipelines 2 or more: a cell has a spread"
            " over its seeds"
        )
    if pipelines is not None and not 1 <= pipelines < SEARCH_SEED // PIPELINE:
        raise UserError(f"--pipelines {pipelines}: give 1 to {SEARCH_SEED // PIPELINE - 1}")
    if seeds is not None and seeds > PIPELINE:
        raise UserError(f"--seeds {seeds}: give at most {PIPELINE}; another pipeline begins there")
    if slurm and (ranks, jobs, hours, in_process) != (1, 0, 0, False):
        raise UserError(
            "--slurm with --ranks, --jobs, --hours or --in_process: SLURM decides these: give"
            " sbatch's options in its variables, such as SBATCH_TIMELIMIT, or leave --slurm out"
        )
    if in_process and ranks > 1:
        raise UserError(
            f"--in_process with --ranks {ranks}: one process does one rank's jobs: leave one of the"
            " two out"
        )
    if data_root is None:
        raise UserError("--data_root is missing: the folder of packed data sets")
    if not Path(data_root).is_dir():
        raise UserError(f"--data_root {data_root}: there is no such folder")
    if models is not None and not Path(models).is_dir():
        raise UserError(f"--models {models}: there is no such folder")
    root = Path(output).absolute()
    if root.exists() and not root.is_dir():
        raise UserError(f"--output {output} is a file: name a folder")
    if (root / state.SWEEP).exists():
        sweep = Sweep.open(root)
        if sweep.profile != profile:
            raise UserError(
                f"{root} holds experiments of profile {sweep.profile}: take another --output"
            )
        if sweep.halving != halving:
            raise UserError(
                f"{root} holds searches of --halving {sweep.halving}, not {halving}: give the same,"
                " or take another --output"
            )
        if sweep.search != search:
            made = "with a search" if sweep.search else "without a search (--search false)"
            raise UserError(
                f"{root} holds experiments {made}: give the same, or take another --output"
            )
        if sweep.precision != precision:
            made = f"of --precision {sweep.precision}" if sweep.precision else "without --precision"
            raise UserError(
                f"{root} holds experiments {made}: give the same, or take another --output"
            )
        sweep.data_root = Path(data_root).resolve()
        sweep.specs = Path(specs).resolve() if specs else sweep.specs
    else:
        own = Path(specs).resolve() if specs else None
        sweep = Sweep(root, profile, Path(data_root).resolve(), own, [], halving)
        sweep.search, sweep.precision = search, precision
    sweep.models = Path(models).resolve() if models else sweep.models
    asked = [Asked(t, _listed(datasets), _listed(only), seeds, pipelines) for t in tables]
    plan = sweep.plan(asked)
    missing(plan, _listed(only))
    check(root, plan)
    if dry_run:
        show(root, plan, Console(emoji=False, markup=False, highlight=False))
        return
    root.mkdir(parents=True, exist_ok=True)
    with alone(root):
        if (root / state.SWEEP).exists():  # another call may have asked for more meanwhile
            sweep.asked = Sweep.open(root).asked
        if slurm:
            arrays.check(root)
        sweep.ask(asked)
        sweep.save()
        if slurm:
            arrays.submit(root, plan)
            return
        devices = gpus() or len(os.sched_getaffinity(0))
        slots = jobs or max(1, devices // ranks)
        local = Local(root, plan, ranks, slots, hours, in_process=in_process)
        failed = local.run(plan.ordered())
    print(f"report: python -m experiments.report {output}")
    if failed:
        raise UserError(
            f"{failed} of the jobs failed, or wait for one that did: the report says why; mend it,"
            " and the same command tries them again"
        )


def _listed(words: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names between commas, which Fire may have made a tuple of already."""
    if words is None:
        return ()
    parts = words.split(",") if isinstance(words, str) else words
    return tuple(str(part).strip() for part in parts if str(part).strip())


if __name__ == "__main__":
    cli.run(main)
