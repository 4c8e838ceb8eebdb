"""The tables of `benchmarks.scale`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import record
from benchmarks.scale.ranks import SETTING, TIMED


def text(
    volumes: Sequence[dict[str, Any]],
    weak: Sequence[dict[str, Any]],
    held: Sequence[dict[str, Any]],
    trained: int,
) -> str:
    """The tables, with what is behind them.

    Args:
        volumes: lines of `compared`.
        weak: lines of `scale_model.weak`.
        held: lines of `scale_model.held`.
        trained: parameters.
    """
    lines = ["# Communication and weak scaling of a distillation step", ""]
    if volumes:
        lines += [
            f"ViT-MAE of recipes/vit_small, P = {trained:,} trained parameters, fp32, gloo:"
            " MB that a rank sends in one optimiser step.",
            "",
            _volume_table(volumes),
            "",
            "Counted: every tensor that ProcessGroup is asked to move, times 2 (N-1)/N for an"
            " all-reduce and (N-1)/N otherwise (a ring's convention, not gloo's own traffic)."
            " Textbook: 2 P under ZeRO 0, 1 and 2, 3 P under ZeRO 3, times (N-1)/N. Plan: what"
            " launcher/plan/scaling.py says of DeepSpeed 0.19.8. A: micro-batches a step; the"
            " textbook takes a sum for each in ZeRO 2, and all three passes in ZeRO 3.",
            "",
            "ZeRO 1 and 2 all-reduce whole buckets of gradients, of which a rank keeps its part;"
            " two of their all-reduces, and those of ZeRO 3, are the overflow and the norm. ZeRO 3"
            " gathers once, not twice, since all parameters are below stage3_max_live_parameters;"
            " the frozen position tables come with them, and those below"
            " stage3_param_persistence_threshold, where a file sets it, once a step, one call each."
            " Where nothing is kept, the encoder is gathered for each of its two views, forward and"
            " backward.",
            "",
        ]
    cores = weak[0]["cores"]
    lines += [
        f"Weak scaling, {SETTING}, {TIMED} images of 64 pixels a rank, one thread a rank; this"
        f" machine has {cores} cores: more ranks than that share them.",
        "",
        record.markdown(
            ("ranks", "cores used", "images/s, median", "min to max", "n", "efficiency"),
            [
                (
                    *(f"{row['ranks']}", f"{min(row['ranks'], cores)}", f"{row['median']:.1f}"),
                    *(f"{row['min']:.1f} to {row['max']:.1f}", f"{row['n']}"),
                    _percent(row["efficiency"]),
                )
                for row in weak
            ],
        ),
        "",
        f"Efficiency: images/s over those of {weak[0]['ranks']} rank(s), for each core used:"
        " min(ranks, cores); median and range of the rounds.",
    ]
    if held:
        lines += [
            "",
            "The plan's time of a step (launcher/plan/scaling.py), given a step of one rank and"
            " gloo's own times in the same round, against the ranks' steps:",
            "",
            _held_table(held),
            "",
            "Compute: the step of one rank under the same ZeRO, times ranks / min(ranks,"
            " cores). That is too little under ZeRO 0, where one process leaves out the copies"
            " that an all-reduce takes, and too much under 1 to 3, where each of several ranks"
            " updates its part of the weights alone. Gloo's times: an all-reduce, an"
            " all-gather and a reduce-scatter of all gradients and of one value a rank, rank 0's."
            " Nothing hides behind compute: gloo works on the cores that compute. Not in the"
            " plan: that ranks wait for the slowest, share a memory bus, and meet at the end"
            " of a timed step.",
        ]
    return "\n".join(lines)


def _volume_table(volumes: Sequence[dict[str, Any]]) -> str:
    columns = ("ZeRO", "ranks", "textbook", "plan", "measured", "measured / textbook", "calls")
    rows = [
        (
            *(row["setting"], f"{row['ranks']}"),
            *(f"{row[name] / 1e6:.3f}" for name in ("textbook", "plan", "measured")),
            f"{row['measured'] / row['textbook']:.3f}",
            ", ".join(f"{calls} {kind}" for kind, calls in row["calls"].items()),
        )
        for row in volumes
    ]
    return record.markdown(columns, rows)


def _percent(spread: dict[str, float]) -> str:
    return "{median:.0%} ({min:.0%} to {max:.0%})".format(**spread)


def _held_table(held: Sequence[dict[str, Any]]) -> str:
    columns = ("ZeRO", "ranks", "plan, ms", "of it communication", "measured, ms")
    rows = [
        (
            *(row["setting"].removeprefix("zero"), f"{row['ranks']}"),
            f"{1000 * row['plan']['median']:.0f}",
            f"{100 * row['communication']:.0f}%",
            f"{1000 * row['measured']['median']:.0f}",
            "{median:.2f} ({min:.2f} to {max:.2f})".format(**row["ratio"]),
        )
        for row in held
    ]
    return record.markdown((*columns, "plan / measured"), rows)
