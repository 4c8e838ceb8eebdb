"""The plan's formula of a step held against real steps of ranks on this machine.

`launcher.plan.scaling.step` is given what was measured in the same round: the step of one rank by
itself as its compute, and what collectives of gloo take. What it says is then compared with the
ranks' steps. Nothing hides behind compute: gloo works on the cores that compute.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks import record
from benchmarks.scale.ranks import SETTING, SETTINGS, TIMED
from selfdistill.engine.runtime import zero
from selfdistill.launcher.plan import scaling
from selfdistill.launcher.plan.workload import Parameters

#: Number of ranks -> what `scale_ranks.work` found in a round.
Round = Mapping[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Measured(scaling.Links):
    """Collectives as they were measured.

    Attributes:
        times: kind -> seconds of one of next to no bytes, and bytes a second that a rank sends.
    """

    times: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def seconds(self, collective: scaling.Collective, world: int) -> float:
        """Time of collectives that nothing hides."""
        latency, rate = self.times[collective.kind]
        moved = scaling.sent(collective.kind, collective.payload, world) / rate
        return collective.calls * latency + moved


def planned(
    setting: str,
    parameters: Parameters,
    times: Mapping[str, Sequence[float]],
    world: int,
    compute: float,
) -> scaling.Step:
    """What the plan's formula says of a step in fp32.

    Args:
        setting: of ds_configs/.
        parameters: of the model.
        times: see `Measured`.
        world: number of ranks.
        compute: seconds of a step without communication.
    """
    asked = scaling.asked(zero.read(setting), parameters, size=4)
    links = Measured(link=1.0, network=1.0, per_node=world, times=times)
    return scaling.step(asked, links, world, compute, overlap=False)


def _seconds(found: Mapping[str, Any], setting: str, world: int) -> float:
    """The median of a round's steps."""
    return world * TIMED / statistics.median(found["rates"][setting])


def weak(rounds: Sequence[Round], cores: int) -> list[dict[str, Any]]:
    """Weak scaling: images/s of each number of ranks, and its efficiency in each round.

    Args:
        rounds: all with the same numbers of ranks.
        cores: of this machine.
    """
    numbers = list(rounds[0])

    def each_core(found: Round, ranks: int) -> float:
        return statistics.median(found[ranks]["rates"][SETTING]) / min(ranks, cores)

    return [
        {
            "ranks": ranks,
            "cores": cores,
            **record.spread([rate for found in rounds for rate in found[ranks]["rates"][SETTING]]),
            "efficiency": record.spread(
                [each_core(found, ranks) / each_core(found, numbers[0]) for found in rounds]
            ),
        }
        for ranks in numbers
    ]


def held(rounds: Sequence[Round], cores: int, parameters: Parameters) -> list[dict[str, Any]]:
    """The plan's time of a step against the measured one, by ZeRO stage and number of ranks.

    Args:
        rounds: as `weak` has them.
        cores: of this machine; more ranks than that take turns.
        parameters: of the model.
    """
    rows = []
    for ranks in (number for number in rounds[0] if number > 1 and 1 in rounds[0]):
        for setting in SETTINGS:
            measured, plan, share = [], [], []
            for found in rounds:
                compute = _seconds(found[1], setting, 1) * ranks / min(ranks, cores)
                times = found[ranks]["collectives"]
                step = planned(setting, parameters, times, ranks, compute)
                plan.append(step.seconds)
                share.append(step.communication / step.seconds)
                measured.append(_seconds(found[ranks], setting, ranks))
            ratios = [p / m for p, m in zip(plan, measured, strict=True)]
            rows.append(
                {
                    "setting": setting,
                    "ranks": ranks,
                    "plan": record.spread(plan),
                    "measured": record.spread(measured),
                    "ratio": record.spread(ratios),
                    "communication": statistics.median(share),
                }
            )
    return rows


def textbook(
    stage: int, trained: int, *, size: int, accumulation: int = 1
) -> list[scaling.Collective]:
    """What a step takes by the ZeRO paper, each as one call; see docs/planning.md.

    Args:
        stage: of ZeRO.
        trained: parameters with a gradient, P.
        size: bytes of a value, e.
        accumulation: micro-batches of a step, A.
    """
    whole = float(size * trained)
    if stage == 0:
        return [scaling.Collective("all-reduce", whole, 1, "backward")]
    times = 1 if stage == 1 else accumulation
    sums = scaling.Collective("reduce-scatter", times * whole, times, "backward")
    if stage < 3:
        return [sums, scaling.Collective("all-gather", whole, 1, "alone")]
    return [
        scaling.Collective("all-gather", times * whole, times, "forward"),
        scaling.Collective("all-gather", times * whole, times, "backward"),
        sums,
    ]
