"""What the fine-tunings are looked at by: losses, distances, features, single classes."""

from __future__ import annotations

import numpy as np

from selfdistill.experiments.plan import Cell
from selfdistill.experiments.report.blocks import (
    Block,
    Entry,
    Fold,
    Grid,
    Line,
    Section,
    Text,
    notes,
    words,
)
from selfdistill.experiments.report.numbers import TIED, plain, signed, spread
from selfdistill.experiments.report.sweep import Contents
from selfdistill.experiments.results import Outcome, usual

#: Entries of result.json's analysis, and what they are called.
QUANTITIES = {
    "analysis.train_loss": "training loss",
    "analysis.test_loss": "test loss",
    "analysis.gap": "gap",
    "analysis.distance_from_init": f"‖θ_init{TIED}−{TIED}θ‖",
    "analysis.feature_drift": "feature drift",
    "analysis.feature_cosine": "feature cosine",
}
MEANING = (
    "Losses in nats; gap: test loss − training loss; ‖θ_init − θ‖: L2 distance of the encoder's"
    " weights from the pre-trained ones after fine-tuning; feature drift: mean squared L2 distance"
    " of the CLS vectors on test from those of the pre-trained encoder; feature cosine: their mean"
    " cosine. Mean ± standard deviation over seeds."
)
#: Classes named on either side.
NAMED = 5
TITLE = "Classes that gained and lost the most"


def sections(contents: Contents) -> list[Section]:
    """One section, with a part for each data set that has results."""
    parts = []
    for name, dataset in contents.datasets.items():
        mine = [o for o in contents.outcomes if o.cell.dataset.name == name and o.results]
        if mine:
            blocks: list[Block] = [_grid(mine), *_classes(mine)]
            parts.append(Section(f"analysis-{name.replace('_', '-')}", dataset.title, blocks))
    return [Section("analysis", "Analysis", [Text([MEANING])], parts)] if parts else []


def label(one: Cell) -> str:
    """A row's name that no other row of its data set has."""
    more = one.job.name.partition(",")[2].replace(",", ", ").replace("=", " = ")
    return f"{one.method.title}, {more}" if more else one.method.title


def _grid(outcomes: list[Outcome]) -> Grid:
    lines = []
    for one in outcomes:
        state = "" if one.status == "done" else one.status.replace("open", "under way")
        entries = [Entry(spread(one.sample(key), key)) for key in QUANTITIES]
        seeds = str(len(one.results))
        lines.append(
            Line([Entry(label(one.cell), f"({state})" if state else ""), Entry(seeds), *entries])
        )
    return Grid(words("method", "seeds", *QUANTITIES.values()), lines)


# --- classes


def class_accuracy(one: Outcome) -> tuple[str, dict[str, float]]:
    """Accuracy of each class in %, mean over seeds, and the split: test, or val without it."""
    for split in ("test", "val"):
        found: dict[str, list[float]] = {}
        for result in one.results.values():
            known = result.get("analysis", {}).get("per_class_accuracy", {}).get(split, {})
            for name, value in known.items():
                if value is not None:
                    found.setdefault(name, []).append(100 * float(value))
        if found:
            return split, {name: float(np.mean(values)) for name, values in found.items()}
    return "test", {}


def _classes(outcomes: list[Outcome]) -> list[Block]:
    lines, splits = [], set()
    count = 0
    for one in outcomes:
        split, known = class_accuracy(one)
        if known:
            splits.add(split)
            count = max(count, len(known))
            points = np.quantile(list(known.values()), [0, 0.25, 0.5, 0.75, 1])
            lines.append(Line([Entry(label(one.cell)), *(Entry(plain(p, 1)) for p in points)]))
    if not lines:
        return []
    where = " and ".join(sorted(splits))
    head = words("method", "lowest", "lower quartile", "median", "upper quartile", "highest")
    caption = f"accuracy of single classes on {where} in %, spread over {count} classes"
    return [Grid(head, lines, caption), *_moved(outcomes)]


def _moved(outcomes: list[Outcome]) -> list[Block]:
    """The classes that self-distillation changes most against fine-tuning."""
    by = {o.cell.method.name: o for o in outcomes if usual(o.cell)}
    if not {"self_distillation", "fine_tuning"} <= set(by):
        return []
    (split, after), (_, before) = (
        class_accuracy(by[name]) for name in ("self_distillation", "fine_tuning")
    )
    moved = {name: after[name] - before[name] for name in after if name in before}
    # By name where they are equal, so that the order is always the same.
    gained = sorted((n for n in moved if moved[n] > 0), key=lambda n: (-moved[n], n))[:NAMED]
    lost = sorted((n for n in moved if moved[n] < 0), key=lambda n: (moved[n], n))[:NAMED]
    if not gained and not lost:
        return []
    lines = [
        Line(
            [
                Entry(n),
                Entry(plain(before[n], 1)),
                Entry(plain(after[n], 1)),
                Entry(signed(moved[n], 1)),
            ]
        )
        for n in [*gained, *lost[::-1]]
    ]
    head = words("class", "fine-tuning", "self-distillation", "difference")
    caption = (
        f"the classes that gained ({len(gained)}) and lost ({len(lost)}) the most under"
        f" self-distillation, accuracy on {split} in %"
    )
    caution = "Of many classes some gain and some lose by chance: classes with few samples first."
    return [Fold(TITLE, [Grid(head, lines, caption), *notes(caution)], paper=True)]
