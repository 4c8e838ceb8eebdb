"""How hyper-parameters were chosen, and what the stages cost."""

from __future__ import annotations

from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.experiments.jobs import Choice, Job
from selfdistill.experiments.report.blocks import (
    Block,
    Entry,
    Grid,
    Line,
    Section,
    Text,
    notes,
    words,
)
from selfdistill.experiments.report.numbers import NONE, clock, plain, seconds_of, setting
from selfdistill.experiments.report.sweep import Contents
from selfdistill.experiments.results import ancestors, usual
from selfdistill.experiments.spec import Options

#: Distillation's time by that of further pre-training, as the paper has it.
PAPERS_RATIO = 3.5


def as_typed(options: Options) -> str:
    """Options between commas."""
    return ", ".join(f"{k} = {setting(v)}" for k, v in options.items())


# --- search


def search(contents: Contents) -> list[Section]:
    """Every candidate with its validation score; searches over the same values in one grid."""
    groups: dict[tuple[str, ...], list[Choice]] = {}
    for choice in contents.choices.values():
        groups.setdefault(tuple(as_typed(o) for o, _ in choice.candidates), []).append(choice)
    if not groups:
        return []
    text = (
        "Validation score in % of one fine-tuning for each candidate, with a seed that no reported"
        " run has; test data are not scored there. Bold: the chosen one, with which all reported"
        " seeds were run; the first of equals."
    )
    blocks: list[Block] = [Text([text])]
    at_edge = False
    for candidates, choices in groups.items():
        lines = []
        before = ""
        for choice in choices:
            dataset, method = _titles(contents, choice)
            at_edge |= _at_edge(contents.root, choice)
            # A data set is named once, above its other methods.
            label = words("" if dataset == before else dataset, method)
            lines.append(Line([*label, *_scores(contents, choice)]))
            before = dataset
        head = [Entry("data set"), Entry("method"), *(Entry(c) for c in candidates)]
        blocks.append(Grid(head, lines, labels=2))
    taken = [
        f"{m.title}: as {contents.methods[m.tuned_as].title}"
        for m in contents.methods.values()
        if m.tuned_as in contents.methods
    ]
    blocks += notes(
        f"Not searched for by themselves, the choice is taken over: {'; '.join(taken)}."
        if taken
        else "",
        f"dropped: at a smaller length others did better (--halving {contents.sweep.halving})."
        if contents.sweep.halving
        else "",
        "edge: the chosen value is the least or the greatest that was tried: a wider grid might"
        " hold a better one."
        if at_edge
        else "",
    )
    return [Section("search", "Search for hyper-parameters", blocks)]


def _titles(contents: Contents, choice: Choice) -> tuple[str, str]:
    dataset, _, method = choice.name.partition("/")
    known = contents.datasets.get(dataset), contents.methods.get(method)
    return (
        known[0].title if known[0] else dataset,
        known[1].title if known[1] else method.replace("_", " "),
    )


def _best(root: Path, choice: Choice) -> Options | None:
    try:
        return choice.best(root)
    except UserError:
        return None


def _scores(contents: Contents, choice: Choice) -> list[Entry]:
    best = _best(contents.root, choice)
    edge = "edge" if _at_edge(contents.root, choice) else ""
    entries = []
    for (options, score), (_, job) in zip(
        choice.scores(contents.root), choice.candidates, strict=True
    ):
        if score is None:
            where = contents.stands(job)
            if job.lost(contents.root):
                where = "dropped" if job.dropped(contents.root) else "diverged"
            entries.append(Entry(where, style="missing"))
        else:
            chosen = options == best
            told_score = plain(100 * score, 2)
            entries.append(Entry(told_score, edge, "best") if chosen else Entry(told_score))
    return entries


def _at_edge(root: Path, choice: Choice) -> bool:
    """Whether a chosen number is the least or the greatest that was tried."""
    for name, value in (_best(root, choice) or {}).items():
        tried = (options[name] for options, _ in choice.candidates)
        numbers = {float(v) for v in tried if not isinstance(v, str | bool)}
        if len(numbers) > 2 and value in (min(numbers), max(numbers)):
            return True
    return False


# --- cost


def _seconds(contents: Contents, job: Job | None) -> float | None:
    result = job.result(contents.root) if job else None
    return None if result is None else float(result["seconds"])


def cost(contents: Contents) -> list[Section]:
    """Seconds of each stage, and how much longer distillation takes than further pre-training."""
    lines = []
    for name, dataset in contents.datasets.items():
        mine = [o for o in contents.outcomes if o.cell.dataset.name == name and usual(o.cell)]
        # The stages as most rows have them: those of the methods without options of their own.
        plainly = [o for o in mine if not o.cell.method.of(dataset.kind)]
        stages: dict[str, Job] = {}
        for one in plainly:
            if not one.cell.method.lengthen:
                for job in (a for a in ancestors(one.cell.job) if "/search/" not in a.name):
                    if job.rounds == 1:
                        stages.setdefault(job.stage, job)
        first, second = (_seconds(contents, stages.get(s)) for s in ("pretrain", "distill"))
        each = [float(r["seconds"]) for o in plainly for r in o.results.values()]
        third = sum(each) / len(each) if each else None
        tried = {
            job.name: _seconds(contents, job)
            for job in contents.jobs
            if job.dataset.name == name and "/search/" in job.name
        }
        searched = sum(s for s in tried.values() if s is not None) or None
        if any(s is not None for s in (first, second, third, searched)):
            ratio = second / first if first and second else None
            lines.append(
                Line(
                    [
                        Entry(dataset.title),
                        *(Entry(NONE if s is None else clock(s)) for s in (first, second, third)),
                        Entry(NONE if ratio is None else plain(ratio, 1)),
                        Entry(NONE if searched is None else clock(searched)),
                    ]
                )
            )
    if not lines:
        return []
    lines += _papers(contents)
    head = words(
        "data set",
        "further pre-training",
        "distillation, one round",
        "one fine-tuning",
        "distillation / further pre-training",
        "search, all candidates",
    )
    remarks = notes(
        "Wall time (h:m:s) of the stage alone, scoring and saving with it. Where several jobs ran"
        " at a time they shared the machine.",
        "Fine-tuning: mean over seeds, of the methods without options of their own.",
    )
    return [
        Section(
            "cost-of-stages",
            "Cost of the stages",
            [Grid(head, lines, "time of each stage"), *remarks],
        )
    ]


def _papers(contents: Contents) -> list[Line]:
    """The paper's times, whose rows each hold those before."""
    known = contents.paper.get("cost", {})
    try:
        third, upto_first, upto_second = (
            seconds_of(known[row]["CUB"])
            for row in ("Fine-tuning", "Further pre-training", "Self-distillation")
        )
    except (KeyError, ValueError):
        return []
    first, second = upto_first - third, upto_second - upto_first
    entries = words(
        "the paper: CUB, one RTX 3090",
        *(clock(s) for s in (first, second, third)),
        plain(PAPERS_RATIO, 1),
        "",
    )
    return [Line(entries, paper=True)]
