"""A step at scale, in closed form: what the ranks send each other, how long that takes, what hides.

docs/planning.md has the formulas and their sources.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from selfdistill.engine.runtime.zero import stage_of
from selfdistill.launcher.plan import memory
from selfdistill.launcher.plan.workload import Parameters

Collected = Literal["all-reduce", "all-gather", "reduce-scatter", "reduce", "broadcast"]
When = Literal["forward", "backward", "alone"]

#: Seconds of NCCL's tuning model, protocol Simple: to start a ring; a hop over NVLink, and through
#: the network, in a ring; the same in a tree.
START, RING_LINK, RING_NETWORK = 8.4e-6, 3.4e-6, 9.6e-6
TREE_LINK, TREE_NETWORK = 28e-6, 50e-6

#: AdamW's two groups, with and without weight decay: ZeRO 1 and 2 gather each by itself.
GROUPS = 2
#: The overflow and the norm of the gradient: two sums of at most 8 bytes under ZeRO 3. Under ZeRO 1
#: and 2 the norm is asked for where it is logged, or clips.
SCALARS = 2

#: Seconds. A step of a 12-block model is some thousand kernels of 5 to 10 microseconds at least.
SHORT_STEP = 0.01


def sent(kind: Collected, payload: float, world: int) -> float:
    """Bytes that a rank sends in a ring, the mean over the ranks.

    Args:
        kind: of the collective.
        payload: bytes of the whole tensor: the output of a gather, the input of a reduction.
        world: number of ranks, N.
    """
    return (2 if kind == "all-reduce" else 1) * payload * (world - 1) / world


class Collective(NamedTuple):
    """Collectives of one kind in a step.

    Attributes:
        kind: what is done.
        payload: bytes of their tensors, all calls together.
        calls: their number.
        when: the part of the step that may hide them; alone: none does.
        group: ranks that take part, of one node; 0: all there are.
    """

    kind: Collected
    payload: float
    calls: int
    when: When
    group: int = 0

    def ranks(self, world: int) -> int:
        """How many take part."""
        return min(self.group or world, world)


def asked(
    content: Mapping[str, Any],
    parameters: Parameters,
    *,
    size: int,
    accumulation: int = 1,
    sharded: int = 0,
    twice: int = 0,
    node: int = 1,
) -> list[Collective]:
    """What DeepSpeed 0.19.8 asks for in a step, once ZeRO-3 knows the order of its modules.

    Not counted: padding; without use_multi_rank_bucket_allreduce one call of each bucket for each
    rank that owns a part, of which one is counted.

    Args:
        content: DeepSpeed's configuration.
        parameters: P trained ones, and F frozen ones.
        size: bytes of a value in a forward pass, e; gradients have the same.
        accumulation: micro-batches of a step, A.
        sharded: parameters of a teacher whose weights are gathered for each micro-batch.
        twice: parameters that a step passes twice, the encoder's in a distillation: ZeRO-3 gathers
            them again where it keeps nothing.
        node: ranks of a node, where hierarchical partitioning leaves them open.
    """
    stage, zero = stage_of(content), memory.settings(content, parameters, node)
    trained, whole = parameters.trained, float(size * parameters.trained)
    found: list[Collective] = []
    if sharded:
        found += _gathers(sharded, memory.PREFETCH, size, accumulation)
    if stage == 0:
        calls = math.ceil(trained / memory.ALL_REDUCE)
        return [*found, Collective("all-reduce", whole, calls, "alone")]
    kind: Collected = "reduce-scatter"
    if stage < 3:
        apart = zero.reduce_scatter and not zero.use_multi_rank_bucket_allreduce
        kind = "reduce" if apart else "all-reduce"
        found.append(Collective("all-gather", whole, GROUPS, "alone"))
    else:
        # A module is gathered whole, however small the bucket.
        bucket = max(zero.prefetch_bucket_size, parameters.largest)
        small = parameters.persistent(zero.param_persistence_threshold)
        cut = parameters.all - sum(small)
        # With hpZ the nodes have what was gathered from the first forward to the step.
        group = zero.zero_hpz_partition_size if zero.zero_hpz_partition_size > 1 else 0
        first = 1 if group else accumulation
        found += _gathers(cut, bucket, size, first)
        found += _gathers(cut, bucket, size, accumulation - first, group)
        if not memory.keeps(zero, parameters):
            passes: tuple[tuple[int, When], ...] = ((twice, "forward"), (cut + twice, "backward"))
            for values, when in passes:
                calls = accumulation * math.ceil(values / bucket)
                every = float(accumulation * size * values)
                found.append(Collective("all-gather", every, calls, when, group))
        if small:
            found.append(Collective("all-gather", float(size * sum(small)), len(small), "alone"))
    times = 1 if stage == 1 else accumulation
    full = math.ceil(trained / zero.reduce_bucket_size) - 1
    early = full * zero.reduce_bucket_size
    if full:
        found.append(Collective(kind, float(times * size * early), times * full, "backward"))
    found.append(Collective(kind, float(times * size * (trained - early)), times, "alone"))
    if stage == 3:
        found.append(Collective("all-reduce", 8.0 * SCALARS, SCALARS, "alone"))
    return found


def _gathers(values: int, bucket: int, size: int, times: int, group: int = 0) -> list[Collective]:
    """All-gathers of a forward's weights, bucket by bucket; the first hides behind nothing."""
    if not times:
        return []
    first = min(values, bucket)
    found = [Collective("all-gather", float(times * size * first), times, "alone", group)]
    if values > first:
        calls, rest = times * math.ceil((values - first) / bucket), times * size * (values - first)
        found.append(Collective("all-gather", float(rest), calls, "forward", group))
    return found


def volume(collectives: Iterable[Collective], world: int) -> float:
    """Bytes that a rank sends in a step."""
    return sum(sent(c.kind, c.payload, c.ranks(world)) for c in collectives)


def between(collectives: Iterable[Collective], world: int, per_node: int) -> float:
    """Of these, the bytes that go to another node, the mean over the ranks of a node.

    A ring over all ranks leaves each node once: of its hops, one a node is between nodes.
    """
    over = [c for c in collectives if c.ranks(world) > per_node]
    return volume(over, world) / min(per_node, world)


@dataclass(frozen=True)
class Links:
    """What joins the devices.

    Attributes:
        link: bytes a second that a GPU sends to others of its node.
        network: bytes a second that a node sends, all its cards together.
        per_node: GPUs of a node.
    """

    link: float
    network: float
    per_node: int

    def nodes(self, world: int) -> int:
        """Nodes that so many devices fill."""
        return math.ceil(world / self.per_node)

    def bandwidth(self, world: int) -> float:
        """Bytes a second that a rank sends in a ring over so many devices."""
        return self.link if world <= self.per_node else min(self.link, self.network)

    def latency(self, kind: Collected, world: int) -> float:
        """Seconds of a collective of no bytes."""
        if world == 1:
            return 0.0
        nodes = self.nodes(world)
        times = 2 if kind == "all-reduce" else 1
        # Hops between nodes are one less than nodes, and all hops one less than ranks.
        ring = START + times * ((world - nodes) * RING_LINK + (nodes - 1) * RING_NETWORK)
        if kind != "all-reduce":
            return ring
        local = math.ceil(world / nodes)
        tree = 2 * ((local - 1) * TREE_LINK + math.log2(nodes) * TREE_NETWORK)
        return min(ring, tree)

    def seconds(self, collective: Collective, world: int) -> float:
        """Time of collectives that nothing hides."""
        ranks = collective.ranks(world)
        if ranks == 1:
            return 0.0
        moved = sent(collective.kind, collective.payload, ranks) / self.bandwidth(ranks)
        return collective.calls * self.latency(collective.kind, ranks) + moved


@dataclass(frozen=True)
class Step:
    """Times of one optimiser step, in seconds.

    Attributes:
        compute: FLOPs at the stated MFU.
        communication: all collectives, one after the other.
        exposed: of that, what hides behind nothing.
    """

    compute: float
    communication: float
    exposed: float

    @property
    def seconds(self) -> float:
        """Of the whole step, without checkpoints."""
        return self.compute + self.exposed


def step(
    collectives: Iterable[Collective],
    links: Links,
    world: int,
    compute: float,
    *,
    overlap: bool = True,
    backwards: float = 1.0,
) -> Step:
    """The time of a step.

    Args:
        collectives: of the step.
        links: between the devices.
        world: number of devices.
        compute: seconds of a device's FLOPs.
        overlap: whether anything hides.
        backwards: share of the step's backwards in which gradients are summed (ZeRO 1: one of A).
    """
    spent: dict[When, float] = {"forward": 0.0, "backward": 0.0, "alone": 0.0}
    for collective in collectives:
        spent[collective.when] += links.seconds(collective, world)
    together = sum(spent.values())
    if not overlap:
        return Step(compute, together, together)
    behind = max(0.0, spent["forward"] - compute / 3)
    behind += max(0.0, spent["backward"] - backwards * compute * 2 / 3)
    return Step(compute, together, behind + spent["alone"])


def overlaps(content: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed communicates while it computes: overlap_comm, from ZeRO 1 on."""
    return stage_of(content) > 0 and bool(memory.settings(content).overlap_comm)


def share_of_saving(seconds: float, step_seconds: float, every: int) -> float:
    """Share of the time that goes into checkpoints; every: steps between them, 0 for none."""
    return seconds / (every * step_seconds + seconds) if every else 0.0
