"""The first page: what was run, how sure it is, and what to do with 500 labelled samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.experiments.report.blocks import Block, Entry, Grid, Line, Section, Text, notes
from selfdistill.experiments.report.claims.evidence import Finding, Part
from selfdistill.experiments.report.claims.pages import STYLES
from selfdistill.experiments.report.claims.verdict import Judged, Verdict, decide, sentence
from selfdistill.experiments.report.numbers import TIED, clock, interval, plain, signed
from selfdistill.experiments.report.sweep import Contents, Reported
from selfdistill.experiments.results import Outcome, usual
from selfdistill.experiments.spec import Contrast, Dataset

#: Labels that a reader is taken to have, and the difference in points that matters to them.
LABELS, MATTERS = 500, 1.0
#: From the cheapest; the first that no other beats is the advice.
METHODS = ("fine_tuning", "further_pretraining", "self_distillation")
#: So many times more or fewer labels are said to be far off.
FAR = 3.0


def section(contents: Contents, verdicts: Sequence[Verdict]) -> Section:
    """The page."""
    parts = [
        Section("what-was-run", "What was run?", _ran(contents)),
        Section("how-sure", "How sure is it?", _sure(verdicts)),
        *(
            Section(
                f"advice-{kind}s",
                f"What should I do with {LABELS} labelled {what}?",
                [Text(advice(contents, kind))],
            )
            for kind, what in (("image", "pictures"), ("text", "texts"))
            if kind == "image" or any(d.kind == kind for d in contents.datasets.values())
        ),
    ]
    return Section("answers", "In short", (), parts)


# --- what was run


def _ran(contents: Contents) -> list[Block]:
    done = [o for o in contents.outcomes if o.status == "done"]
    if not done:
        return [Text(["Nothing is complete yet."])]
    methods = list(dict.fromkeys(o.cell.method.title for o in done))
    sets = list(dict.fromkeys(o.cell.dataset.title for o in done))
    samples = sorted((o.sample("score") for o in done), key=lambda one: (one.n, one.count))
    seeds = " to ".join(dict.fromkeys((samples[0].count, samples[-1].count)))
    if any(len(o.cell.jobs) > 1 for o in done):
        seeds += " (pipelines × each)"
    wanted = [
        one
        for table in contents.tables
        for place, one in table.cells.items()
        if place in table.wanted
    ]
    asked = {one.cell.job.name for one in (*wanted, *done)}
    # Complete in one table, a cell may be under way for another, of more seeds.
    complete = asked - {one.cell.job.name for one in wanted if one.status != "done"}
    whole = complete == asked
    lines = [
        f"{len(methods)} methods on {len(sets)} data sets, {seeds} fine-tunings of each"
        f" combination; {len(complete)} of {len(asked)} combinations are complete.",
        f"Methods: {'; '.join(methods)}. Data sets: {'; '.join(sets)}.",
        f"Models and schedules: {contents.profile.title}.",
    ]
    lost = [d.title for d in contents.absent]
    left = {
        state: sum(o.status == state for o in contents.outcomes) for state in ("failed", "blocked")
    }
    said = [f"no data: {'; '.join(lost)}"] if lost else []
    said += [f"{n} {state}" for state, n in left.items() if n]
    if said or not whole:
        said.append("what is missing stands at the end")
    return [Text(lines), *notes("; ".join(said))]


# --- how sure


def _sure(verdicts: Sequence[Verdict]) -> list[Block]:
    ran = [v for v in verdicts if v.word != "not run"]
    words = [f"{sum(v.word == w for v in verdicts)} {w}" for w in STYLES]
    texts = [f"Of {len(verdicts)} claims: {', '.join(words)}."]
    if ran and all(v.single for v in ran):
        texts.append(
            "Every interval is of fine-tuning alone: each data set had one further pre-training and"
            " one distillation. How much another one would change is not known."
        )
    elif ran:
        texts.append("Intervals are over pipelines, each with stages 1 and 2 of its own, where")
        texts[-1] += " there are several; a claim's page says where not."
    lines = [
        Line([Entry(v.claim.title), Entry(v.word, style=STYLES[v.word]), Entry(sentence(v))])
        for v in verdicts
    ]
    head = [Entry("claim"), Entry("verdict"), Entry("in words")]
    return [Text(texts), Grid(head, lines, labels=3)]


# --- what to do


@dataclass(frozen=True)
class _Place:
    """A data set of which more than one method is complete."""

    table: Reported
    dataset: Dataset
    labels: int


def labels(contents: Contents, table: Reported, dataset: Dataset) -> int | None:
    """How many labelled samples a data set has, where that is known."""
    if dataset.name in table.table.at:
        return round(table.table.at[dataset.name])
    place = contents.sweep.data_root / (dataset.folder or dataset.name)
    try:
        return int(Manifest.load_split(str(place), "train").samples)
    except (UserError, OSError):
        return None


def advice(contents: Contents, kind: str) -> list[str]:
    """What the nearest data set says, in sentences."""
    places, unknown = [], False
    for table in contents.tables:
        for dataset in table.present:
            number = labels(contents, table, dataset)
            known = _methods(table, dataset)
            if dataset.kind != kind or "fine_tuning" not in known or len(known) < 2:
                continue
            if number:
                places.append(_Place(table, dataset, number))
            unknown |= not number
    what = {"image": "pictures", "text": "texts"}[kind]
    if not places:
        if unknown:
            return [
                "Not known: results do not say how many labels a set has. The packed sets do: give"
                " their folder to experiments.report as --data_root."
            ]
        return [f"Not run: of no set of {what} are fine-tuning and another method complete."]
    best = min(places, key=lambda p: (abs(math.log(p.labels / LABELS)), -len(_methods(*_of(p)))))
    factor = max(best.labels / LABELS, LABELS / best.labels)
    near = f"The nearest that was run is {best.dataset.title}, {best.labels:,} labelled {what}"
    near += "." if factor < 1.05 else f", {best.labels / LABELS:.1f} times as many."
    if factor > FAR:
        near += " That is far off: take the advice as a guess."
    head, *rest = _advise(best)
    return [head, near, *rest]


def _of(place: _Place) -> tuple[Reported, Dataset]:
    return place.table, place.dataset


def _methods(table: Reported, dataset: Dataset) -> dict[str, tuple[int, Outcome]]:
    """Method -> its row and figures, of those that are complete."""
    return {
        one.cell.method.name: (number, one)
        for (number, name), one in table.cells.items()
        if name == dataset.name and one.status == "done" and usual(one.cell)
        and one.cell.method.name in METHODS
    }  # fmt: skip


def _advise(place: _Place) -> list[str]:
    known = _methods(*_of(place))
    pairs = [(a, b) for i, b in enumerate(METHODS) for a in METHODS[i + 1 :]]
    judged = {
        (one.finding.test.a, one.finding.test.b): one
        for one in decide([_versus(place, a, b) for a, b in pairs if {a, b} <= set(known)])
    }
    chosen = "fine_tuning"
    for a in METHODS[1:]:
        if (a, chosen) in judged and judged[a, chosen].word == "supported":
            chosen = a
    cost = {name: one.sample("seconds").mean for name, (_, one) in known.items()}
    title = {name: one.cell.title for name, (_, one) in known.items()}
    head = f"Take {title[chosen]}"
    if chosen == "fine_tuning":
        told = ", and stop there: no other method is shown to score higher by as much as matters."
    else:
        ratio = cost[chosen] / cost["fine_tuning"] if cost["fine_tuning"] else math.nan
        told = f": it beats plain fine-tuning, and takes {ratio:.1f} times as long."
    lines = [head + told]
    for (a, b), one in judged.items():
        lines.append(_against(one, title[a], title[b]))
    lines.append(
        "Time with one fine-tuning: "
        + "; ".join(f"{title[name]} {clock(seconds)}" for name, seconds in cost.items())
        + "."
    )
    return lines


def _versus(place: _Place, a: str, b: str) -> Finding:
    known = _methods(*_of(place))
    test = Contrast(says=f"{a} scores higher", expect="above", matters=MATTERS, a=a, b=b)
    parts = [
        Part(place.table, known[name][0], place.dataset, weight)
        for name, weight in ((a, 1.0), (b, -1.0))
    ]
    return Finding(test, place.dataset.title, parts)


def _against(one: Judged, first: str, second: str) -> str:
    """A comparison in a sentence."""
    e = one.finding.estimate
    head = f"{first[0].upper()}{first[1:]} minus {second}:"
    if e is None:
        return f"{head} {one.reason}."
    told = {
        "supported": "the first scores higher",
        "not supported": one.reason,
        "can't tell": f"it can't be told; {plain(MATTERS, 0)}{TIED}point matters"
        + (f", and {plain(one.detects, 1)} would be seen" if math.isfinite(one.detects) else ""),
    }
    low_high = interval(e)
    return f"{head} {signed(e.mean)} points {low_high}: {told[one.word]}."
