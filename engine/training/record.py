"""What a stage's result and checkpoints say of how they were made."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from typing import Any

import torch

from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.checkpoints.provenance import provenance
from selfdistill.engine.config.stages import StageSection
from selfdistill.engine.training.modalities.base import Section


def record_of(
    run: Run,
    section: Section,
    plan: StageSection,
    samples: int,
    extra: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """What the figures of a stage depend on: equal when it is resumed, or skipped as complete.

    Args:
        run: The launch.
        section: pretrain | distill | finetune.
        plan: Its settings.
        samples: Number of those in an epoch.
        extra: Hashes of the weights it starts from, settings of its view.
        seed: Of order, head and dropout.
    """
    config = run.config
    elsewhere = {"seeds", "eval_every", "start", "weights", "epochs", "auto", "data", "metric"}
    elsewhere |= {"width", "depth"}  # of the decoder: the modality tells of them
    settings, mode = plan.model_dump(mode="json", exclude=elsewhere), config.compile_mode
    return {
        **{f"{section}.{k}": v for k, v in settings.items()},
        f"{section}.steps": plan.length(samples),
        "seed": seed,
        "precision": config.precision,
        "zero": config.zero,
        # Another order of sums, or other products.
        **({"compile": True} if config.compile else {}),
        **({"compile_mode": mode} if config.compile and mode != "default" else {}),
        **({"deterministic": True} if config.deterministic else {}),
        **({} if config.tf32 else {"tf32": False}),
        "data.partitions": config.data.partitions,
        "data.window": config.data.window,
        **extra,
    }


def scalars(analysis: Mapping[str, Any]) -> dict[str, float]:
    """The single numbers of an analysis."""
    return {k: float(v) for k, v in analysis.items() if isinstance(v, int | float)}


def device_name(device: torch.device) -> str:
    """What a device is, as a record and the table of peak FLOPs call it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def surroundings(run: Run) -> dict[str, Any]:
    """What a stage ran on: ranks, precision, device, versions of the packages; where, and by what.

    The last of them on rank 0 alone, which writes the result.
    """
    return {
        **(provenance() if run.ranks.main else {}),
        "world": run.ranks.world,
        "precision": run.config.precision,
        "zero": run.config.zero,
        "device": device_name(run.ranks.device),
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("torch", "deepspeed", "transformers", "timm", "webdataset")
        },
    }
