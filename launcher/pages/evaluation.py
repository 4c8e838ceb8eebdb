"""What an evaluation shows: the table on the terminal, evaluation.json, and one HTML page."""

from __future__ import annotations

import base64
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from rich.table import Table

from selfdistill.data.errors import BrokenData, printable
from selfdistill.data.formats import texts
from selfdistill.data.inputs.packed import Packed
from selfdistill.engine.inference.evaluation import Evaluation, Mistake
from selfdistill.engine.inference.model import Loaded
from selfdistill.engine.training.scoring.intervals import LEVEL
from selfdistill.engine.training.scoring.metrics import BINS
from selfdistill.launcher.pages.drawing import BLUE, GREY, STYLE, inline, svg

TEMPLATE = Path(__file__).resolve().parent / "evaluation.html.jinja"
#: Side of their pictures, in pixels.
SIDE = 112
#: Characters of their texts.
CHARACTERS = 400
#: Classes up to which the confusion matrix has numbers, and names.
NUMBERED, NAMED = 16, 40
#: Pairs of classes that are named as confused.
CONFUSED = 8

_TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "auroc": "AUROC",
    "average_precision": "average precision",
    "ece": "calibration error (ECE)",
    "loss": "cross-entropy, nats",
}


@dataclass(frozen=True)
class Row:
    """A figure as it is shown: its name, its value, and its interval, "" without one."""

    title: str
    value: str
    interval: str


def rows(found: Evaluation) -> list[Row]:
    """The figures in %, the loss in nats, each with its interval."""
    titles = dict(_TITLES)
    if found.several:
        titles |= {"accuracy": "all of a sample's classes right", "average_precision": "mAP"}
        titles["ece"] = "calibration error (ECE) of all decisions"
    else:
        del titles["micro_f1"]  # it is the accuracy
        second = len(found.classes) == 2
        of = f"of {found.classes[1]}" if second else "mean over the classes"
        titles["auroc"] += f", {of}"
        titles["average_precision"] += f", {of}"
    listed = []
    for name, title in titles.items():
        if name not in found.figures:
            continue
        scale, digits = (1, 4) if name == "loss" else (100, 2)
        unit = "" if name == "loss" else "%"
        bounds = found.intervals.of.get(name)
        between = " to ".join(f"{scale * bound:.{digits}f}" for bound in bounds) if bounds else ""
        listed.append(Row(title, f"{scale * found.figures[name]:.{digits}f}{unit}", between))
    return listed


def notes(found: Evaluation) -> list[str]:
    """What the figures do not say by themselves."""
    said = []
    if not found.several:
        support = [one.support for one in found.by_class]
        most = int(np.argmax(support))
        said.append(
            f"the commonest class alone ({found.classes[most]}) gives"
            f" {100 * support[most] / found.n:.2f}% accuracy"
        )
        right = found.figures["accuracy"]
        if right in (0.0, 1.0):
            # The rule of three: the upper 95% bound of a rate of which nothing was seen.
            kind = "error" if right else "right answer"
            said.append(
                f"no {kind} among {found.n} samples: rates up to {100 * min(1, 3 / found.n):.1f}%"
                " would show none either, which the intervals of ranked figures cannot see"
            )
        absent = sum(not one for one in support)
        if absent:
            said.append(f"{absent} of the model's {len(support)} classes have no sample here")
        if sum(map(bool, support)) == 1:
            said.append("all samples are of one class: ranks of others cannot be scored")
    if found.intervals.calibrated is not None:
        said.append(
            "a perfectly calibrated model would show an ECE of"
            f" {100 * found.intervals.calibrated:.2f}% on so many samples"
        )
    draws = sorted(set(found.intervals.draws.values()), reverse=True)
    if draws:
        fewer = f" ({draws[-1]} for the ranked figures)" if len(draws) > 1 else ""
        said.append(
            f"intervals: {LEVEL:.0%}, bootstrap of the {found.n} samples, {draws[0]} draws{fewer};"
            " they do not hold what another seed of the training would change"
        )
    if found.reliability is None:
        said.append("too many samples and classes for the figures that need every probability")
    if found.skipped:
        said.append(f"{found.skipped} broken samples were left out")
    return said


def table(found: Evaluation, title: str) -> Table:
    """The figures for a terminal."""
    shown = Table(title=title)
    shown.add_column("figure")
    shown.add_column("value", justify="right")
    shown.add_column(f"{LEVEL:.0%} interval", justify="right")
    for row in rows(found):
        shown.add_row(row.title, row.value, row.interval)
    return shown


def record(found: Evaluation, model: Loaded, data: Packed, source: str) -> dict[str, Any]:
    """The content of evaluation.json: all figures as shares and nats, nothing rounded."""
    names = found.classes
    told: dict[str, Any] = {
        "model": model.origin,
        "sha256": model.sha256,
        "precision": model.precision,
        "data": source,
        "split": data.manifest.split,
        "manifest": data.manifest.hash,
        "samples": found.n,
        "skipped": found.skipped,
        "metrics": found.figures,
        "intervals": found.intervals.of,
        "level": LEVEL,
        "draws": found.intervals.draws,
        "ece_of_a_calibrated_model": found.intervals.calibrated,
        "classes": {name: vars(one) for name, one in zip(names, found.by_class, strict=True)},
        "confusion": None if found.confusion is None else found.confusion.tolist(),
        "reliability": None if found.reliability is None else [vars(b) for b in found.reliability],
    }
    told["mistakes"] = [
        {
            "id": one.sample,
            "name": printable(data.read(one.sample).name),
            "label": [names[i] for i in one.labels] if found.several else names[one.labels[0]],
            "predicted": f"not {names[one.predicted]}" if one.left_out else names[one.predicted],
            "probability": one.sure,
            "probability_of_label": one.own,
        }
        for one in found.mistakes
    ]
    return told


def page(found: Evaluation, model: Loaded, data: Packed, source: str) -> str:
    """The HTML page, which needs no other file.

    Args:
        found: What came out.
        model: Of what.
        data: The samples, of which some are shown.
        source: Where they are from, as the user named it.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    shown = [_mistake(found, model, data, one) for one in found.mistakes]
    content = {
        "title": printable(f"Evaluation of {'/'.join(Path(model.origin).parts[-3:])}"),
        "facts": [
            ("model", printable(model.origin)),
            ("weights", f"{model.sha256[:12]}, {model.precision}"),
            ("data", printable(f"{source}, {data.manifest.split}")),
            ("samples", f"{found.n} of {len(found.classes)} classes"),
        ],
        "figures": rows(found),
        "notes": notes(found),
        "classes": [
            {
                "name": printable(name),
                "shares": [_share(v) for v in (one.precision, one.recall, one.f1)],
                "support": one.support,
                "predicted": one.predicted,
            }
            for name, one in zip(found.classes, found.by_class, strict=True)
        ],
        "confusion": _confusion(found),
        "reliability": _reliability(found),
        "confused": _confused(found),
        "mistakes": shown,
        "wrong": found.n - round(found.figures["accuracy"] * found.n),
        "pictures": model.kind == "image",
        "pixelated": any(one["small"] for one in shown),
    }
    return template.render(page=content) + "\n"


def _share(value: float | None) -> dict[str, str]:
    if value is None:
        return {"share": "0", "text": "–"}
    return {"share": f"{100 * value:.1f}", "text": f"{100 * value:.1f}%"}


def _mistake(found: Evaluation, model: Loaded, data: Packed, one: Mistake) -> dict[str, Any]:
    given, names = data.read(one.sample), found.classes
    told: dict[str, Any] = {
        "name": printable(given.name),
        "label": printable(", ".join(names[i] for i in one.labels) or "none of the classes"),
        "predicted": printable(("not " if one.left_out else "") + names[one.predicted]),
        "sure": f"{100 * one.sure:.1f}%",
        "own": "" if found.several else f" ({100 * one.own:.1f}%)",
        "small": False,
    }
    content: Any = given.content
    if model.kind == "image":
        pixels = model.codec_of(data.manifest).decode(content, given.name)
        told["small"] = min(pixels.shape[1:]) < SIDE
        told["picture"] = _thumbnail(pixels)
        return told
    try:
        text = texts.read(content, data.manifest.text["stored"])
    except ValueError as error:
        raise BrokenData(str(error)) from None
    whole = text.text if text.pair is None else f"{text.text} ‖ {text.pair}"
    cut = "…" if len(whole) > CHARACTERS else ""
    return told | {"text": printable(" ".join(whole[:CHARACTERS].split())) + cut}


def _thumbnail(pixels: np.ndarray) -> str:
    """uint8 [3, H, W] as a PNG in base64, no larger than `SIDE`."""
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    picture.thumbnail((SIDE, SIDE))
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def _drawing(figure: Figure, name: str, described: str, caption: str) -> dict[str, Any]:
    start = f'<svg role="img" aria-label="{Markup.escape(described)}"'
    drawn = inline(svg(figure), name).replace("<svg", start, 1)
    return {"svg": Markup(drawn), "caption": caption}  # our own figure: its texts are escaped


def _confusion(found: Evaluation) -> dict[str, Any] | None:
    """Shares of each class's samples, by what they were predicted as."""
    matrix = found.confusion
    if matrix is None:
        return None
    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    with matplotlib.rc_context(STYLE):
        side = float(np.clip(1.6 + 0.36 * count, 3.6, 7.0))
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.subplots()
        drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        for spine in axes.spines.values():
            spine.set_visible(False)
        if count <= NAMED:
            names = [_short(name) for name in found.classes]
            small: dict[str, Any] = {"fontsize": 9 if count <= NUMBERED else 7}
            wide = max(map(len, names)) * count > 60
            axes.set_xticks(range(count), names, rotation=90 if wide else 0, **small)
            axes.set_yticks(range(count), names, **small)
            axes.tick_params(length=0)
        if count <= NUMBERED:
            for true in range(count):
                for said in range(count):
                    if number := int(matrix[true, said]):
                        dark = "white" if shares[true, said] > 0.55 else "#222222"
                        axes.text(said, true, str(number), ha="center", va="center", color=dark)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        bar = figure.colorbar(drawn, ax=axes, shrink=0.7, format=PercentFormatter(1, 0))
        bar.outline.set_visible(False)
        return _drawing(
            figure,
            "confusion",
            f"confusion matrix of {count} classes",
            "Rows: the true class. Colour: share of its samples; numbers: samples.",
        )


def _short(name: str) -> str:
    # matplotlib takes $ for mathematics.
    plain = printable(name).replace("$", r"\$")
    return plain if len(plain) <= 24 else plain[:23] + "…"


def _reliability(found: Evaluation) -> dict[str, Any] | None:
    """How often the model is right where it says that it is."""
    if not found.reliability:
        return None
    bins = found.reliability
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.6), layout="constrained")
        above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1)
        above.vlines(
            [b.confidence for b in bins],
            [b.confidence for b in bins],
            [b.right for b in bins],
            color="#b9d3e6",
            linewidth=3,
        )
        above.plot([b.confidence for b in bins], [b.right for b in bins], "o-", color=BLUE)
        above.set_ylabel("share that is right")
        below.bar(
            [b.low for b in bins],
            [b.samples for b in bins],
            width=1 / BINS,
            align="edge",
            color=BLUE,
            edgecolor="white",
        )
        below.set_ylabel("decisions" if found.several else "samples")
        below.set_xlabel("probability of the class" if found.several else "the model's confidence")
        above.set_ylim(0, 1.02)
        above.set_xlim(0, 1)
        for axis in (above.yaxis, below.xaxis):
            axis.set_major_formatter(PercentFormatter(1, 0))
        return _drawing(
            figure,
            "reliability",
            "share that is right over the model's confidence",
            "Below the dotted line the model is surer than it is right.",
        )


def _confused(found: Evaluation) -> list[str]:
    """The pairs of classes that are confused most often."""
    if found.confusion is None or len(found.classes) < 3:
        return []
    wrong = found.confusion.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
    pairs = [divmod(int(place), len(wrong)) for place in order]
    names, support = found.classes, found.confusion.sum(1)
    return [
        printable(f"{names[a]} as {names[b]} ({wrong[a, b]} of {support[a]})")
        for a, b in pairs
        if wrong[a, b]
    ]


def finite(content: Any) -> Any:
    """JSON knows no NaN: None in its place."""
    if isinstance(content, dict):
        return {k: finite(v) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [finite(v) for v in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
