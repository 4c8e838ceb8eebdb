"""Memory of a training step on one device: model states by ZeRO stage, in closed form.

What DeepSpeed 0.19.8 keeps, counted over the tensors of real engines
(tests/launcher/plan/test_plan.py). docs/planning.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfdistill.engine.monitoring.flops import TeacherMode
from selfdistill.engine.runtime.zero import fitted, stage_of
from selfdistill.launcher.plan.workload import Parameters

#: Without ZeRO gradients are summed over the ranks in flat copies of at most so many values.
ALL_REDUCE = 500_000_000
#: What a sharded teacher fetches ahead (DeepSpeed's stage3_prefetch_bucket_size).
PREFETCH = 50_000_000


@dataclass(frozen=True)
class Need:
    """Bytes on one device, and of host memory for its rank.

    Attributes:
        weights: of the forward pass; under ZeRO-3 with what is gathered of the others', under MARS
            with those that it began with.
        gradients: at the end of a backward.
        optimizer: AdamW's two moments, the fp32 weights where DeepSpeed keeps them apart, and the
            weights' average where there is one.
        backward: buckets of reduction, alive in the backward.
        step: copies of gradients, alive while the optimiser steps or before it.
        teacher: the frozen encoder.
        activations: what the forward leaves for the backward.
        host: in host memory, under offload.
    """

    weights: float
    gradients: float
    optimizer: float
    backward: float
    step: float
    teacher: float = 0.0
    activations: float = 0.0
    host: float = 0.0

    @property
    def states(self) -> float:
        """Weights, gradients and optimiser."""
        return self.weights + self.gradients + self.optimizer

    @property
    def buffers(self) -> float:
        """What is beside them at the peak: in the backward, or in the step, without activations."""
        return max(self.backward, self.step - self.activations)

    @property
    def total(self) -> float:
        """At the peak."""
        return self.states + self.teacher + self.buffers + self.activations


def need(
    content: Mapping[str, Any],
    parameters: Parameters,
    *,
    size: int,
    world: int,
    accumulation: int = 1,
    copies: int = 0,
    anchored: bool = False,
    start: float = 0.0,
    teacher: float = 0.0,
    activations: float = 0.0,
    node: int = 1,
) -> Need:
    """Memory of one device.

    Args:
        content: DeepSpeed's configuration.
        parameters: P trained ones, and frozen ones.
        size: bytes of a weight and of its gradient, e: 4, under fp16 2.
        world: number of ranks, N.
        accumulation: micro-batches of a step.
        copies: of the weights, beside them: their average (`--finetune.ema`), the best of them
            (`--STAGE.keep best`).
        anchored: whether the optimiser keeps the weights that it began with (RecAdam), and in its
            step how far it is from them.
        start: bytes of weights that each rank keeps whole (MARS).
        teacher: bytes of the frozen encoder.
        activations: bytes of a micro-batch, and of the weights' copies for bf16 products.
        node: ranks of a node, where hierarchical partitioning leaves them open.
    """
    stage, zero = stage_of(content), settings(content, parameters, node)
    trained, weights = parameters.trained, size * parameters.all
    bucket, shard = size * zero.reduce_bucket_size, weights / world
    own, fp32 = size * trained / world, 4 * trained / world
    copies += anchored
    masters = (12 + 4 * copies) * trained / world
    away, weights_away = offloaded(zero.offload_optimizer), offloaded(zero.offload_param)
    # ZeRO-3 keeps a parameter that is used again within max_reuse_distance: below a billion of
    # them, all are whole from the forward to the backward.
    gathered = size * min(parameters.all, zero.max_live_parameters)
    held = (0 if weights_away else shard) + (gathered if world > 1 or weights_away else 0)
    if zero.zero_hpz_partition_size > 1:
        held += weights / min(zero.zero_hpz_partition_size, world)
    # Between micro-batches ZeRO-1 keeps whole gradients.
    first = size * trained if accumulation > 1 else own
    flat = size * min(trained, ALL_REDUCE) if world > 1 else 0
    flat = max(flat, 4 * trained) if anchored else flat
    sums, step = bucket * (2 if zero.overlap_comm else 1), 0 if away else (1 + anchored) * fp32
    kept = 0 if away else masters
    found = {
        # stage: weights, gradients, optimiser, in the backward, in the step
        0: (weights, size * trained, (8 + 4 * copies) * trained, 0, flat),
        1: (weights, first, kept, sums, step),
        2: (weights, own, kept, sums, step),
        3: (held, 0 if away else own, kept, bucket, bucket + step),
    }[stage]
    host = (masters + own + fp32 if away else 0) + (shard if weights_away else 0)
    return Need(found[0] + start, *found[1:], teacher, activations, host if stage else 0)


def settings(
    content: Mapping[str, Any], parameters: Parameters | None = None, node: int = 1
) -> Any:
    """DeepSpeed's own reading of its section on ZeRO, with what follows from the model, if any."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    parameters = parameters or Parameters(0, 0, 0)
    whole = fitted(
        content,
        trained=parameters.trained,
        every=parameters.all,
        largest=max(parameters.sizes, default=0),
        node=node,
    )
    return DeepSpeedZeroConfig(**whole["zero_optimization"])


def keeps(zero: Any, parameters: Parameters) -> bool:
    """Whether ZeRO-3 keeps what a forward gathered for the backward."""
    return bool(parameters.all <= min(zero.max_live_parameters, zero.max_reuse_distance))


def offloaded(section: Any) -> bool:
    """Whether a section of ZeRO's configuration moves something to host memory or disk."""
    return section is not None and str(getattr(section.device, "value", section.device)) != "none"


def teacher_bytes(
    mode: TeacherMode, parameters: int, world: int, *, product: int, size: int
) -> float:
    """Bytes of the frozen encoder on one device; a cached teacher is a table on disk.

    Args:
        mode: of the teacher.
        parameters: of the encoder.
        world: number of ranks.
        product: bytes of a value of a matrix product: of weights that are only multiplied.
        size: bytes of a weight that is sharded.
    """
    if mode == "cached":
        return 0
    if mode == "replicated":
        return product * parameters
    return size * (parameters / world + (min(parameters, PREFETCH) if world > 1 else 0))


def checkpoint_bytes(parameters: Parameters, copies: int = 0) -> int:
    """One checkpoint: fp32 weights, of what is trained AdamW's two moments and copies."""
    return (12 + 4 * copies) * parameters.trained + 4 * parameters.frozen


def deepspeed_estimate(
    content: Mapping[str, Any], parameters: Parameters, per_node: int, nodes: int
) -> int | None:
    """DeepSpeed's own estimate of model states on one device; None where it has none (ZeRO 0, 1).

    Args:
        content: DeepSpeed's configuration.
        parameters: of the network.
        per_node: ranks of a node.
        nodes: number of nodes.
    """
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as third
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as second

    zero, ranks = settings(content), (per_node, nodes)
    away, weights_away = offloaded(zero.offload_optimizer), offloaded(zero.offload_param)
    if stage_of(content) == 2:
        return int(second(parameters.all, *ranks, cpu_offload=away)[1])
    if stage_of(content) == 3:
        sizes = (parameters.all, parameters.largest)
        return int(third(*sizes, *ranks, cpu_offload=away, cpu_offload_params=weights_away)[1])
    return None


def notes(size: int, product: int, world: int) -> list[str]:
    """The formulas of the table in short."""
    copies = ", and bf16 copies of the weights 2 P" if product < size else ""
    return [
        f"bytes a parameter, e = {size}, N = {world}: ZeRO 0 {size} + {size} + 8; ZeRO 1, 2"
        f" {size} + ({size} + 12) / N; ZeRO 3 ({size} + {size} + 12) / N and what is gathered."
        " buffers: buckets in the backward, or fp32 gradients in the step.",
        f"activations: an estimate, 8 width + (6 width + 2 MLP width) x {product} a token and"
        f" block{copies}; compilation and allocator not counted.",
        "theirs: DeepSpeed's own estimator, for ZeRO 2 and 3, model states alone. fits: total <="
        " the data sheet's GB x 1e9. All formulas: docs/planning.md",
    ]
