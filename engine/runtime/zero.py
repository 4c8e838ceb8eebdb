"""DeepSpeed's configuration: a ZeRO file of ds_configs/ completed from the validated config."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.engine.config.schema import ROOT, Config
from selfdistill.engine.config.stages import StageSection

FOLDER = ROOT / "ds_configs"

#: Set from the validated config; a file that sets them too would give two truths.
OWNED = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "torch_autocast",
)

#: DeepSpeed's own timer of steps waits for the device at each forward and step.
_UNTIMED: dict[str, Any] = {"timers": {"throughput": {"enabled": False}}}

#: Values of a bucket at most, and parts of a model of which a bucket holds one where that is less:
#: all but the last are sent while others are computed.
BUCKET, PIECES = 50_000_000, 8

#: Settings that follow from the model: the names by which DeepSpeed knows them. Those that a file
#: leaves out, or gives as "auto", are filled in (`fitted`).
_FITTED = {
    "reduce_bucket_size": ("reduce_bucket_size",),
    "stage3_prefetch_bucket_size": ("stage3_prefetch_bucket_size", "prefetch_bucket_size"),
    "stage3_param_persistence_threshold": (
        "stage3_param_persistence_threshold",
        "param_persistence_threshold",
    ),
}
_LIVE, _PARTITION = "stage3_max_live_parameters", "zero_hpz_partition_size"
#: Of ZeRO++: DeepSpeed's kernels for them are CUDA's.
_QUANTISED = (
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
#: Of MiCS, which DeepSpeed 0.19.8 has no more.
_GONE = ("mics_shard_size", "mics_hierarchical_params_gather")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def known() -> list[str]:
    """Names of the settings in ds_configs/."""
    return sorted(p.stem for p in FOLDER.glob("*.json"))


def chosen(name: str, world: int, precision: str) -> str:
    """The setting that --zero means: of `auto` the fastest that shards what can be sharded.

    One process has nothing to shard, and ZeRO's copies of gradients and weights cost it a tenth of
    a step (docs/performance.md). Under fp16 the fp32 weights are in ZeRO's own optimiser.
    """
    if name != "auto":
        return name
    return "zero0" if world == 1 and precision != "fp16" else "zero1"


def read(name: str) -> dict[str, Any]:
    """The DeepSpeed JSON of a ZeRO setting, by name or by path.

    Raises:
        UserError: no such file, not JSON, or it sets what the engine sets.
    """
    if name == "auto":  # before the processes are known: what holds of one choice, of the other too
        name = "zero1"
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        close = difflib.get_close_matches(name, known(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"--zero {name}: no such setting; there are {', '.join(known())}{hint}")
    content = records.read_object(path, "correct the file that --zero names")
    _check_zero(content, path)
    twice = [k for k in OWNED if k in content]
    if twice:
        raise UserError(f"--zero {path}: remove {twice[0]!r}: the stage's options set it")
    return content


def stage_of(content: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration."""
    return int(content.get("zero_optimization", {}).get("stage", 0))


def _check_zero(content: Mapping[str, Any], path: Path) -> None:
    """Refuses what DeepSpeed would fail on with a traceback."""
    section = content.get("zero_optimization", {})
    if not isinstance(section, dict):
        raise UserError(f"--zero {path}: zero_optimization must be an object, not {section!r}")
    stage = section.get("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise UserError(f"--zero {path}: zero_optimization.stage is {stage!r}: give 0, 1, 2 or 3")
    for name in _GONE:
        if name in section:
            raise UserError(
                f"--zero {path}: remove zero_optimization.{name}: this DeepSpeed has no MiCS any"
                f" more; --zero zero3_hpz, or {_PARTITION} in your file, keeps gathers inside nodes"
            )
    size = section.get(_PARTITION, 1)
    if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise UserError(
            f"--zero {path}: zero_optimization.{_PARTITION} is {size!r}: give the ranks of a node,"
            ' or "auto"'
        )
    asked = [_PARTITION] if size != 1 else []
    for name in (*asked, *(k for k in _QUANTISED if section.get(k))):
        if stage != 3:
            raise UserError(f"--zero {path}: zero_optimization.{name} needs stage 3, not {stage}")
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(section.get(name, {}), dict):
            raise UserError(
                f"--zero {path}: zero_optimization.{name} must be an object, such as"
                ' {"device": "cpu"}'
            )


def fitted(
    content: Mapping[str, Any], *, trained: int, every: int, largest: int, node: int
) -> dict[str, Any]:
    """A configuration with what it leaves to the model and the nodes; given values stay.

    A small parameter is sharded as a large one is: DeepSpeed would gather it, kept whole, after
    each step by itself, and a call takes as long as its way over all ranks.

    Args:
        content: DeepSpeed's configuration.
        trained: values of the parameters with a gradient.
        every: of all parameters.
        largest: of the largest one.
        node: ranks of a node.
    """
    stage, found = stage_of(content), dict(content.get("zero_optimization", {}))
    ahead, sums = (min(BUCKET, max(largest, -(-size // PIECES))) for size in (every, trained))
    values = {
        "reduce_bucket_size": max(1, min(sums, trained)),
        "stage3_prefetch_bucket_size": ahead,
        "stage3_param_persistence_threshold": 0,
    }
    for name, known in _FITTED.items():
        given = [k for k in known if found.get(k, "auto") != "auto"]
        for k in known:
            if found.get(k) == "auto":
                del found[k]
        if stage and not given and (stage == 3 or name == "reduce_bucket_size"):
            found[name] = values[name]
    if found.get(_PARTITION) == "auto":
        found[_PARTITION] = node
    if found.get(_LIVE) == "auto":  # a bucket that is used, and one that is fetched
        found[_LIVE] = 2 * ahead
    return {**content, "zero_optimization": found}


def open_partition(content: Mapping[str, Any]) -> bool:
    """Whether a file leaves the ranks of a node to the launch."""
    return bool(content.get("zero_optimization", {}).get(_PARTITION) == "auto")


def check_topology(content: Mapping[str, Any], name: str, world: int, device: str) -> None:
    """Refuses what DeepSpeed fails on with a traceback.

    Args:
        content: DeepSpeed's configuration, `fitted`.
        name: of the setting.
        world: number of ranks.
        device: kind of device.

    Raises:
        UserError: nodes that cut no ranks evenly; quantised collectives without their kernels.
    """
    section = content.get("zero_optimization", {})
    size = min(section.get(_PARTITION, 1), world)
    if world % size:
        raise UserError(
            f"--zero {name}: {world} ranks cannot be cut into nodes of {size}: take whole nodes, or"
            f" a {_PARTITION} that divides {world}"
        )
    asked = [k for k in _QUANTISED if section.get(k)]
    if asked and device != "cuda":
        raise UserError(
            f"--zero {name}: zero_optimization.{asked[0]}: DeepSpeed quantises by kernels of CUDA,"
            f" which a {device} device has not: remove it"
        )


def offloads(content: Mapping[str, Any]) -> bool:
    """Whether the optimiser's state lives in host memory."""
    target = content.get("zero_optimization", {}).get("offload_optimizer", {})
    return target.get("device", "none") not in ("none", None)


def training_config(config: Config, plan: StageSection, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration of a training engine.

    Gradient clipping is always written: DeepSpeed's default is 1.0.

    Raises:
        UserError: the batch cannot be cut evenly, or the device lacks the precision.
    """
    content = _UNTIMED | read(config.zero)
    content |= {
        "train_batch_size": plan.batch,
        "train_micro_batch_size_per_gpu": micro_batch(plan, world),
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": plan.clip,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if world == 1 and stage_of(content):
        # Nothing to overlap with, and one more wait for the device a step.
        content["zero_optimization"] = content["zero_optimization"] | {"overlap_comm": False}
    if config.precision != "fp32":
        _check_precision(config.precision)
    if config.precision == "fp16" and not stage_of(content):
        raise UserError(
            f"--zero {config.zero} with --precision fp16: DeepSpeed's optimiser without ZeRO asks"
            " the device some 250 times a step: take zero1, or --precision bf16"
        )
    return content | numbers(config.precision)


def micro_batch(plan: StageSection, world: int, option: str = "batch") -> int:
    """Samples of a rank's forward.

    Args:
        plan: of a stage.
        world: number of ranks.
        option: by which the batch is given.

    Raises:
        UserError: the batch cannot be cut evenly.
    """
    unit = world * plan.accumulation
    if plan.batch % unit:
        near = max(unit, round(plan.batch / unit) * unit)
        raise UserError(
            f"{option} {plan.batch} cannot be cut evenly over {world} ranks x {plan.accumulation} "
            f"micro-batches: take a multiple of {unit}, such as {near}"
        )
    return plan.batch // unit


def numbers(precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a precision; see `engine.runtime.precision`."""
    if precision == "bf16":
        # No module's gradients are rounded on their way between ranks.
        safe: list[str] = []
        autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": safe}
        return {"torch_autocast": autocast}
    return {"fp16": {"enabled": True}} if precision == "fp16" else {}


def _check_precision(precision: str) -> None:
    from deepspeed.accelerator import get_accelerator

    device = get_accelerator()
    works = {"fp16": device.is_fp16_supported, "bf16": device.is_bf16_supported}
    if not works[precision]():
        others = [name for name, supported in works.items() if name != precision and supported()]
        raise UserError(
            f"--precision {precision}: DeepSpeed cannot train in it on this device "
            f"({device.device_name()}): take {' or '.join([*others, 'fp32'])}"
        )


def inference_config(world: int, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a frozen engine: ZeRO-3 alone shards without optimiser."""
    return {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3},
        "steps_per_print": 10**9,
        **_UNTIMED,
        **numbers(precision),
    }


@contextmanager
def gathered(parameter: Tensor) -> Iterator[Tensor]:
    """A parameter, whole, on every rank (under ZeRO-3 it is a shard otherwise)."""
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter.data
    else:
        yield parameter.data


def full_state(
    module: nn.Module,
    *,
    keep: bool,
    trained: bool = False,
    frozen: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Whole fp32 tensors of a module's parameters, from the master weights where there are any.

    Every rank calls it (it gathers); only those with `keep` get the result.

    Args:
        module: the engine's module, or a part of it.
        keep: whether this rank wants the tensors (on the CPU).
        trained: those with a gradient alone.
        frozen: what parameters without a gradient were loaded with, by name, the same on every
            rank: fp16 has rounded them since, and has no masters of them.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        value = None
        if trained and not parameter.requires_grad:
            continue
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
        elif frozen is not None:
            value = frozen.get(name)
        if value is None:
            with gathered(parameter) as whole:
                value = whole.detach().clone()
        if keep:
            state[name] = value.detach().float().cpu().clone().reshape(_shape(parameter))
    return state


def _shape(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
