"""What a sweep was run with, the commands of its jobs, and what is missing of it."""

from __future__ import annotations

import shlex

from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration
from selfdistill.experiments import state
from selfdistill.experiments.jobs import Job
from selfdistill.experiments.report.blocks import (
    Block,
    Code,
    Entry,
    Fold,
    Grid,
    Line,
    Section,
    Text,
    notes,
    words,
)
from selfdistill.experiments.report.numbers import NONE
from selfdistill.experiments.report.search import as_typed
from selfdistill.experiments.report.sweep import Contents, Reported
from selfdistill.experiments.spec import Scale

#: Jobs that are named before the rest is counted.
NAMED = 40


def settings(contents: Contents) -> list[Section]:
    """The profile's options, the methods', the data sets."""
    blocks: list[Block] = []
    profile = contents.profile
    kinds = dict.fromkeys(d.kind for d in contents.datasets.values())
    scales: list[tuple[str, Scale]] = [(kind, profile.of(kind)) for kind in kinds]
    lines = [
        Line(
            [
                Entry(f"{kind}s"),
                Entry(scale.recipe),
                Entry(_lengths(scale)),
                Entry(as_typed(scale.options) or NONE),
                Entry(
                    "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in scale.search.items())
                    or NONE
                ),
            ]
        )
        for kind, scale in scales
    ]
    head = words("data", "recipe", "lengths", "options in place of the recipe's", "searched")
    blocks.append(Grid(head, lines, f"profile {profile.name}: {profile.title}", labels=5))
    blocks += notes(profile.note)
    for _, scale in scales:
        blocks += _recipe(scale.recipe)
    blocks += [_methods(contents), _datasets(contents)]
    return [Section("settings", "Settings", blocks)]


def _lengths(scale: Scale) -> str:
    """How long the stages are: passes over the training data, or steps."""
    config = configuration.load({"recipe": scale.recipe, **scale.options})
    told = []
    for stage in (*(["decoder"] if scale.decoder else []), "pretrain", "distill", "finetune"):
        plan = getattr(config, stage)
        length = (
            f"{plan.steps} steps" if plan.epochs is None else f"{plan.epochs:g} passes in steps"
        )
        told.append(f"{stage}: {length} of {plan.batch}")
    return "; ".join(told)


def _recipe(name: str) -> list[Block]:
    try:
        text = configuration.recipe_file(name).read_text(encoding="utf-8")
    except (UserError, OSError):
        return []
    return [Fold(f"Recipe {name}", [Code(text.splitlines())])]


def _methods(contents: Contents) -> Grid:
    lines = []
    starts = {"model": "the model", "pretrain": "further pre-training", "distill": "distillation"}
    for method in contents.methods.values():
        own = [as_typed(method.options)]
        own += [
            f"{k}s: {as_typed(o)}" for k, o in (("image", method.image), ("text", method.text)) if o
        ]
        own += [f"{stage} {factor:g} times as long" for stage, factor in method.lengthen.items()]
        own += [f"{method.rounds} rounds"] if method.rounds > 1 else []
        own += [
            f"searched {k}: {', '.join(map(str, values))}" for k, values in method.search.items()
        ]
        options = "; ".join(one for one in own if one) or NONE
        lines.append(Line(words(method.title, starts[method.start], options)))
    head = words("method", "fine-tuning starts from", "options of its own")
    return Grid(head, lines, "methods", labels=3)


def _datasets(contents: Contents) -> Grid:
    lines = []
    for name, dataset in contents.datasets.items():
        mine = [o for o in contents.outcomes if o.cell.dataset.name == name and o.results]
        result = next(iter(mine[0].results.values())) if mine else {}
        metrics = result.get("metrics", {})
        classes = result.get("analysis", {}).get("per_class_accuracy", {})
        count = max((len(split) for split in classes.values()), default=0)
        lines.append(
            Line(
                [
                    Entry(dataset.title),
                    Entry(dataset.paper or NONE),
                    Entry(_same(dataset.paper, dataset.same)),
                    Entry(dataset.note or NONE),
                    Entry(as_typed(dataset.options) or NONE),
                    Entry(str(count or NONE)),
                    *(
                        Entry(f"{int(metrics.get(f'{s}_samples', 0)) or NONE}")
                        for s in ("val", "test")
                    ),
                ]
            )
        )
    head = words(
        "data set", "in the paper", "the same", "note", "options", "classes", "val", "test"
    )
    return Grid(head, lines, "data sets; samples of val and test from the results", labels=5)


def _same(paper: str | None, same: bool) -> str:
    return NONE if paper is None else "yes" if same else "no"


# --- jobs


def missing(contents: Contents) -> list[Section]:
    """What is not complete, and the commands that would run it."""
    blocks: list[Block] = []
    absent = contents.absent
    if absent:
        lines = [Line([Entry(d.title), Entry(d.pack or NONE, style="code")]) for d in absent]
        caption = f"data sets that are not in {contents.sweep.data_root}"
        blocks.append(Grid(words("data set", "packed by"), lines, caption, labels=2))
    undone = [job for job in contents.jobs if contents.status[job.name] != "done"]
    if undone:
        ends = [
            Line([Entry(job.name), Entry(contents.stands(job)), Entry(_why(contents, job))])
            for job in undone[:NAMED]
        ]
        grid = Grid(words("job", "where it stands", "why"), ends, "jobs that are not complete",
                    labels=3)  # fmt: skip
        blocks.append(
            grid if len(undone) <= 12 else Fold(f"{len(undone)} jobs", [grid], paper=True)
        )
        if len(undone) > NAMED:
            blocks += notes(f"And {len(undone) - NAMED} more.")
    wanting = [table for table in contents.tables if _incomplete(table)]
    if wanting:
        commands = [contents.wanting(table.asked) for table in wanting]
        blocks += [
            Text(["What is missing is run by these; what is complete is not done again:"]),
            Code(list(dict.fromkeys(commands))),
        ]
    if not blocks:
        blocks.append(Text(["Nothing: all jobs of all tables are complete."]))
    return [Section("missing", "What is missing", blocks)]


def _incomplete(table: Reported) -> bool:
    return bool(table.absent) or any(
        one.status != "done" for place, one in table.cells.items() if place in table.wanted
    )


def _why(contents: Contents, job: Job) -> str:
    if contents.status[job.name] == "failed":
        return str(state.read(contents.root, job).get("message") or "no reason is known")
    waits = [one.name for one in job.before if contents.status.get(one.name) != "done"]
    return (
        f"waits for {waits[0]}" + (f" and {len(waits) - 1} more" if len(waits) > 1 else "")
        if waits
        else ""
    )


def commands(contents: Contents) -> list[Section]:
    """The exact command of every job, data set by data set."""
    by: dict[str, list[str]] = {}
    for job in contents.jobs:
        by.setdefault(job.dataset.title, []).append(_command(contents, job))
    if not by:
        return []
    folds: list[Block] = [
        Fold(f"{title}: {len(lines)} jobs", [Code(lines)]) for title, lines in by.items()
    ]
    text = (
        "As they were started, or would be; each also stands in the log and the record of its job."
    )
    return [Section("commands", "Commands", [Text([text]), *folds])]


def _command(contents: Contents, job: Job) -> str:
    words = state.read(contents.root, job).get("command")
    if words is None:
        try:
            words = job.command(contents.root, contents.sweep.data_root)
        except UserError as error:
            return f"# {job.name}: {error}"
    return shlex.join(["engine/run.py", *map(str, words)])
