"""Memory of a training step on one device: model states by ZeRO stage, in closed form.

What DeepSpeed 0.19.8 keeps, counted over the tensors of real engines with AdamW on one and two
ranks. Its own estimator assumes fp16 with fp32 gradients, 18 to 20 bytes a parameter, whatever the
precision is, and knows neither buckets nor what ZeRO-3 gathers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfdistill.engine.monitoring.flops import TeacherMode
from selfdistill.engine.runtime.zero import stage_of
from selfdistill.launcher.plan.workload import Parameters

#: Without ZeRO gradients are summed over the ranks in flat copies of at most so many values.
ALL_REDUCE = 500_000_000
#: What a sharded teacher fetches ahead (DeepSpeed's stage3_prefetch_bucket_size).
PREFETCH = 50_000_000


@dataclass(frozen=True)
class Need:
    """Bytes on one device, and of host memory for its rank.

    Attributes:
        weights: of the forward pass; under ZeRO-3 with what is gathered of the others'.
        gradients: at the end of a backward.
        optimizer: AdamW's two moments, and the fp32 weights where DeepSpeed keeps them apart.
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
    teacher: float = 0.0,
    activations: float = 0.0,
) -> Need:
    """Memory of one device.

    Args:
        content: DeepSpeed's configuration.
        parameters: P trained ones, and frozen ones.
        size: bytes of a weight and of its gradient, e: 4, under fp16 2.
        world: number of ranks, N.
        accumulation: micro-batches of a step.
        teacher: bytes of the frozen encoder.
        activations: bytes of a micro-batch, and of the weights' copies for bf16 products.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    trained, stage = parameters.trained, stage_of(content)
    zero = DeepSpeedZeroConfig(**content.get("zero_optimization", {}))
    bucket = size * zero.reduce_bucket_size
    if stage == 0:
        return Need(
            weights=size * parameters.all,
            gradients=size * trained,
            optimizer=8 * trained,
            backward=0,
            step=size * min(trained, ALL_REDUCE) if world > 1 else 0,
            teacher=teacher,
            activations=activations,
        )
    if stage < 3:
        # Between micro-batches ZeRO-1 keeps whole gradients.
        whole = stage == 1 and accumulation > 1
        host = _offloaded(zero.offload_optimizer)
        masters = 12 * trained / world
        return Need(
            weights=size * parameters.all,
            gradients=size * trained / (1 if whole else world),
            optimizer=0 if host else masters,
            backward=bucket * (2 if zero.overlap_comm else 1),
            step=0 if host else 4 * trained / world,
            teacher=teacher,
            activations=activations,
            host=masters + (4 + size) * trained / world if host else 0,
        )
    shard = size * parameters.all / world
    # ZeRO-3 keeps a parameter that is used again within max_reuse_distance: below a billion of
    # them, all are whole from the forward to the backward.
    gathered = size * min(parameters.all, zero.max_live_parameters)
    states = 12 * trained / world
    own, step = size * trained / world, 4 * trained / world
    optimizer_away, weights_away = (
        _offloaded(zero.offload_optimizer),
        _offloaded(zero.offload_param),
    )
    held = 0.0 if weights_away else shard
    if world > 1 or weights_away:
        held += gathered
    return Need(
        weights=held,
        gradients=0 if optimizer_away else own,
        optimizer=0 if optimizer_away else states,
        backward=bucket,
        step=bucket + (0 if optimizer_away else step),
        teacher=teacher,
        activations=activations,
        host=(states + own + step if optimizer_away else 0) + (shard if weights_away else 0),
    )


def _offloaded(section: Any) -> bool:
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


def checkpoint_bytes(parameters: Parameters) -> int:
    """One checkpoint: fp32 weights and AdamW's two moments of what is trained."""
    return 12 * parameters.trained


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
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    zero = DeepSpeedZeroConfig(**content.get("zero_optimization", {}))
    away = _offloaded(zero.offload_optimizer)
    if stage_of(content) == 2:
        return int(
            estimate_zero2_model_states_mem_needs(
                parameters.all, per_node, nodes, cpu_offload=away
            )[1]
        )
    if stage_of(content) == 3:
        return int(
            estimate_zero3_model_states_mem_needs(
                parameters.all,
                parameters.largest,
                per_node,
                nodes,
                cpu_offload=away,
                cpu_offload_params=_offloaded(zero.offload_param),
            )[1]
        )
    return None


def notes(size: int, product: int, world: int) -> list[str]:
    """The formulas of the table, and where DeepSpeed's differ."""
    return [
        f"bytes a parameter, e = {size}, N = {world}: ZeRO 0 weights, gradients, optimiser"
        f" {size} + {size} + 8;"
        f" ZeRO 1, 2 {size} + ({size} + 12) / N; ZeRO 3 ({size} + {size} + 12) / N, and"
        f" {size} x min(P, stage3_max_live_parameters) gathered where N > 1. 12: fp32 weights and"
        " AdamW's two moments, which DeepSpeed keeps beside the weights in fp32, too (ZeRO 0: 8)."
        " ZeRO 1 keeps whole gradients while micro-batches add up (--STAGE.accumulation).",
        "buffers: reduce_bucket_size x e, twice with overlap_comm; or, if more is needed then,"
        " 4 P / N of fp32 gradients in the optimiser's step. ZeRO 0: flat gradients of the"
        " all-reduce.",
        "activations: an estimate, bytes x samples of a micro-batch: a block saves 8 width +"
        f" (6 width + 2 MLP width) x {product} a token (launcher/plan/activations.py)"
        + (", and bf16 copies of the weights 2 P" if product < size else "")
        + "; fused attention keeps no matrix of its scores"
        f" ({product} x heads x tokens² a block elsewhere); compilation and allocator not counted.",
        "theirs: DeepSpeed's own estimator, for ZeRO 2 and 3, model states alone: 2 + 18 / N"
        " and 18 / N bytes a parameter with fp32 gradients beside 16-bit ones, and 4 x the largest"
        " layer gathered; it knows neither fp32 training nor buckets, teacher and activations.",
        "fits: total <= the data sheet's GB x 1e9; what the card has beyond is left to CUDA, NCCL"
        " and fragmentation.",
    ]
