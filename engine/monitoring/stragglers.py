"""How long each rank works by itself in a step, so that the one which the others wait for is named.

All ranks end a step together, whoever was late. What tells them apart is the time before they meet:
the wait for the batch and the forward pass.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from selfdistill.engine.monitoring.monitor import Meter
from selfdistill.engine.runtime.distributed import Ranks, broadcast

#: A rank is a straggler when the others wait for it so much of a step, so many times in a row.
SHARE, TIMES = 0.25, 3


class Stragglers:
    """Measures this rank's own work, and compares it with the others'.

    Under ZeRO-3 a forward gathers parameters, and so waits for other ranks, too: there the wait for
    batches alone tells ranks apart.

    Args:
        ranks: this process.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.named: set[int] = set()
        self._spans: list[tuple[Any, Any]] = []
        self._suspect, self._times = -1, 0

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Counts this block as the rank's own work; on a GPU the device's time, without a wait."""
        if self.ranks.world == 1:  # nobody to compare with
            yield
            return
        begun = self._now()
        yield
        self._spans.append((begun, self._now()))

    def rates(self, meter: Meter) -> tuple[dict[str, float], str | None]:
        """The meter's rates, and how the ranks compare since the last call. Every rank calls it.

        Args:
            meter: of the same steps. The device has been waited for.

        Returns:
            `Meter.rates`, and, of several ranks: seconds of own work in a step as
            `ranks/own_seconds_min`, `_median` and `_max`, whose rank is `ranks/slowest`;
            `ranks/held_up_percent`, the share of a step by which the slowest exceeds the median.
            And a line about a rank that has held the others up for three calls, said once a rank.
        """
        steps, rates = meter.steps, meter.rates()
        own, self._spans = sum(self._seconds(*span) for span in self._spans), []
        if self.ranks.world == 1 or not steps:
            return rates, None
        mine = [own / steps, rates.get("speed/step_seconds", 0.0)]
        sent = torch.tensor(mine, dtype=torch.float64, device=self.ranks.device)
        everyone = sent.new_empty(2 * self.ranks.world)
        dist.all_gather_into_tensor(everyone, sent)
        seconds: list[float] = everyone[::2].tolist()
        # Rank 0's, whose clock is a little another: all must come to one verdict.
        step_seconds = max(float(everyone[1]), 1e-9)
        slowest = max(range(len(seconds)), key=seconds.__getitem__)
        middle = statistics.median_low(seconds)
        held_up = (seconds[slowest] - middle) / step_seconds
        rates |= {
            "ranks/own_seconds_min": min(seconds),
            "ranks/own_seconds_median": middle,
            "ranks/own_seconds_max": seconds[slowest],
            "ranks/slowest": float(slowest),
            "ranks/held_up_percent": 100 * held_up,
        }
        late = slowest if held_up > SHARE else -1
        self._times = self._times + 1 if late == self._suspect else 1
        self._suspect = late
        if late < 0 or self._times < TIMES or late in self.named:
            return rates, None
        self.named.add(late)
        host = broadcast(socket.gethostname(), source=late)
        return rates, (
            f"rank {late} on {host} holds the others up: of a step of {step_seconds:.3g} s it works"
            f" {seconds[late]:.3g} s before they meet, the median rank {middle:.3g} s"
        )

    def _now(self) -> Any:
        if self.ranks.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begun: Any, ended: Any) -> float:
        if self.ranks.device.type != "cuda":
            return float(ended - begun)
        return float(begun.elapsed_time(ended)) / 1000
