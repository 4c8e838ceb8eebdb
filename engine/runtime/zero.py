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
    for name in ("offload_optimizer", "offload_param"):
        if not isinstance(section.get(name, {}), dict):
            raise UserError(
                f"--zero {path}: zero_optimization.{name} must be an object, such as"
                ' {"device": "cpu"}'
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
    per_rank, rest = divmod(plan.batch, world)
    if rest or per_rank % plan.accumulation:
        unit = world * plan.accumulation
        near = max(unit, round(plan.batch / unit) * unit)
        raise UserError(
            f"batch {plan.batch} cannot be cut evenly over {world} ranks x {plan.accumulation} "
            f"micro-batches: take a multiple of {unit}, such as {near}"
        )
    content |= {
        "train_batch_size": plan.batch,
        "train_micro_batch_size_per_gpu": per_rank // plan.accumulation,
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


def full_state(module: nn.Module, *, keep: bool, trained: bool = False) -> dict[str, Tensor]:
    """Whole fp32 tensors of a module's parameters, from the master weights where there are any.

    Every rank calls it (it gathers); only those with `keep` get the result.

    Args:
        module: the engine's module, or a part of it.
        keep: whether this rank wants the tensors (on the CPU).
        trained: those with a gradient alone.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        value = None
        if trained and not parameter.requires_grad:
            continue
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
        if value is None:
            with gathered(parameter) as whole:
                value = whole.detach().clone()
        if keep:
            state[name] = value.detach().float().cpu().clone().reshape(_shape(parameter))
    return state


def _shape(parameter: Tensor) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
