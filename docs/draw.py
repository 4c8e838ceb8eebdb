"""Draws the pictures of README.md and docs/: `python docs/draw.py runs/quickstart/run`.

`python docs/draw.py terminal COMMAND ...` runs a command on a terminal and draws what stands there
at its end. `make pictures` also takes those of TensorBoard, by `python -m launcher.screenshot`.
"""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shlex
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from rich.console import Console
from rich.text import Text

plt.switch_backend("svg")
# The same input gives the same file.
plt.rcParams.update({"svg.hashsalt": "selfdistill", "font.size": 10, "svg.fonttype": "none"})

DOCS = Path(__file__).resolve().parent
BLUE, ORANGE, GREEN, GREY = "#4c78a8", "#e07b39", "#54a24b", "#888888"
STAGES = ("pretrain", "distill", "finetune")
TITLES = ("further pre-training", "distillation", "fine-tuning")


def save(figure: plt.Figure, name: str) -> None:
    """Writes docs/pictures/NAME.svg."""
    figure.savefig(DOCS / "pictures" / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 2.1) -> None:
    """A labelled box whose middle is at (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - 0.36), width, 0.72, boxstyle="round,pad=0.03", fc=colour, alpha=0.18
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "") -> None:
    """An arrow, its label above the middle."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color="#444444")
    )
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x, y + 0.14, text, ha="center", fontsize=8, color="#444444")


def method() -> None:
    """The three stages: what is trained, from which weights, against which losses."""
    figure, axes = plt.subplots(figsize=(9.2, 3.4))
    axes.set(xlim=(-0.2, 11.4), ylim=(-0.2, 3.9))
    axes.axis("off")
    for x, title in ((3.6, "1  pretrain"), (7.0, "2  distill"), (10.2, "3  finetune")):
        axes.text(x, 3.65, title, ha="center", fontsize=11, weight="bold")
    box(axes, 1.0, 1.6, "pre-trained\nencoder + decoder", GREY)
    box(axes, 3.6, 2.7, "further\npre-trained model", BLUE)
    axes.text(3.6, 2.2, "masked loss\non unlabelled data", ha="center", va="top", fontsize=8)
    box(axes, 7.0, 2.7, "teacher, frozen", BLUE)
    box(axes, 7.0, 0.6, "student", ORANGE)
    axes.text(7.0, -0.12, "masked loss + distance of features", ha="center", fontsize=8)
    box(axes, 10.2, 0.6, "student + head", GREEN)
    axes.text(10.2, -0.12, "cross-entropy on the labels", ha="center", fontsize=8)
    arrow(axes, (1.8, 2.02), (2.5, 2.5))
    arrow(axes, (4.7, 2.7), (5.9, 2.7), "becomes")
    arrow(axes, (2.1, 1.25), (5.9, 0.6), "a fresh copy")
    arrow(axes, (7.0, 2.3), (7.0, 1.02))
    axes.text(7.1, 1.65, "feature of the\nunmasked view", fontsize=8, color="#444444", va="center")
    arrow(axes, (8.1, 0.6), (9.1, 0.6))
    save(figure, "method")


def losses(run: Path) -> None:
    """Training losses of a run's three stages, from their metrics.jsonl."""
    figure, panels = plt.subplots(1, 3, figsize=(9.2, 2.4))
    folders = ("pretrain", "distill-1", "finetune")
    for axes, folder, title in zip(panels, folders, TITLES, strict=True):
        place = run / folder
        file = place / "metrics.jsonl"
        if not file.exists():
            file = place / "seed-0" / "metrics.jsonl"
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for (tag, label), colour in zip(
            (
                ("loss/mae", "masked patches"),
                ("loss/distill", "distance of features"),
                ("loss/cross_entropy", "cross-entropy"),
            ),
            (BLUE, ORANGE, GREEN),
            strict=True,
        ):
            points = [(line["step"], line[tag]) for line in lines if tag in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=label)
        axes.set(title=title, xlabel="step", yscale="log" if folder == "distill-1" else "linear")
        axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    save(figure, "losses")


def speed() -> None:
    """Ratios to the plain loop, from docs/records/performance/step-SIZE.json."""
    figure, axes = plt.subplots(figsize=(9.2, 2.6))
    sizes = {"small": "small ViT", "vit_base": "ViT-B/16", "roberta_base": "RoBERTa-base"}
    for number, (size, label) in enumerate(sizes.items()):
        record = json.loads((DOCS / "records" / "performance" / f"step-{size}.json").read_text())
        for place, (stage, colour) in enumerate(zip(STAGES, (BLUE, ORANGE, GREEN), strict=True)):
            rows = {row["name"]: row["ratio"] for row in record[stage]["rows"]}
            ratio = next(value for name, value in rows.items() if name.startswith("ours"))
            x, middle = number * 4 + place, ratio["median"]
            axes.bar(x, middle, color=colour, alpha=0.75, label=TITLES[place] if not number else "")
            ends = [[middle - ratio["min"]], [ratio["max"] - middle]]
            axes.errorbar(x, middle, yerr=ends, color="#333333", capsize=3)
        axes.text(number * 4 + 1, -0.12, label, ha="center", va="top")
    axes.axhline(1, color="#333333", linewidth=0.8, linestyle="--")
    axes.text(3, 1.04, "plain loop", ha="center", fontsize=8)
    axes.set(xticks=[], ylabel="samples/s, ratio")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    save(figure, "speed")


def screen(content: str) -> list[str]:
    """The lines that stand on a terminal after text with the few codes that live lines use."""
    lines, row = [""], 0
    for piece in re.split(r"(\r\n|\n|\r|\x1b\[2K|\x1b\[1A)", content):
        if piece in ("\r\n", "\n"):
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[1A":
            row -= 1
        elif piece in ("\r", "\x1b[2K"):
            lines[row] = ""  # what is written from a line's beginning is as long as what was there
        else:
            lines[row] += piece
    return lines


def terminal(words: list[str]) -> None:
    """What a command leaves on a terminal of 120 columns; of a live line its last state."""
    os.environ |= {"COLUMNS": "120", "LINES": "40", "TERM": "xterm-256color"}
    seen = io.BytesIO()

    def read(descriptor: int) -> bytes:
        content = os.read(descriptor, 65536)
        seen.write(content)
        return content

    if pty.spawn(words, read):
        raise SystemExit(f"{words[0]} failed")
    console = Console(record=True, width=120, file=io.StringIO(), force_terminal=True)
    console.print(Text(f"$ {shlex.join(words)}", style="bold"))
    # Where this clone lies is nobody's business.
    content = seen.getvalue().decode(errors="replace").replace(f"{DOCS.parent}/", "")
    for line in screen(content):
        console.print(Text.from_ansi(line))
    console.save_svg(str(DOCS / "pictures" / "terminal.svg"), title="selfdistill")


if __name__ == "__main__":
    if sys.argv[1:2] == ["terminal"]:
        terminal(sys.argv[2:])
        sys.exit()
    method()
    speed()
    if len(sys.argv) > 1:
        losses(Path(sys.argv[1]))
