"""The record of a checkpoint: all that a resumed stage must know beside the engine's tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import pydantic

from selfdistill.data import records

#: Of the format.
VERSION = 2

#: What may differ at resume, and when a complete stage is met again: the layout, not the figures.
FREE = ("zero", "accumulation")

#: What was done before there were these options: records of then do not name them.
BEFORE = {
    "adapt": "full",
    "pretrain.objective": "mae",
    "distill.match": "feature",
    "finetune.test": True,
    "finetune.train_scored": 10_000,
    "finetune.regularizer": "none",
    "finetune.layer_decay": 1.0,
    "finetune.drop_path": 0.0,
    "finetune.ema": 0.0,
    "finetune.class_weights": "none",
    "finetune.sampler": "none",
    "finetune.label_smoothing": 0.0,
    "finetune.augment": "none",
    "finetune.mixup": 0.0,
    "finetune.cutmix": 0.0,
    **{f"{stage}.schedule": "linear" for stage in ("decoder", "pretrain", "distill", "finetune")},
    **{f"{stage}.keep": "last" for stage in ("pretrain", "distill", "finetune")},
    **{f"{stage}.patience": 0 for stage in ("pretrain", "distill", "finetune")},
}

#: What records of then do not name, and nobody knows: it is not compared with them.
SINCE = (
    *("model_settings", "text.max_length", "val split", "test split"),
    *("probe.feature", "probe.train", "probe.val"),
)


def differing(made: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """What keeps two records from being of the same figures: key, value then, value now.

    Args:
        made: of what is there.
        now: of this launch.
    """
    for key in sorted(made.keys() | now.keys()):
        old, new = made.get(key, BEFORE.get(key)), now.get(key)
        unknown = key in SINCE and key not in made
        if old != new and not unknown and key.rsplit(".", 1)[-1] not in FREE:
            yield key, old, new


def in_words(key: str, old: Any, new: Any) -> str:
    """How two records differ: hashes say nothing to a reader."""
    if isinstance(old, str) and len(old) == len(str(new)) == 64:
        return f"made with another {key.replace('_', ' ')}"
    return f"made with {key} = {old}, now it is {new}"


@dataclass
class State:
    """All that a resumed stage must know beside the engine's tensors. A plain record.

    Attributes:
        step: optimiser steps taken; the stream position is `step * batch`.
        position: stream position of the next sample.
        config: what must be equal at resume (`engine.training.record.record_of`).
        manifest: hash of the train split's manifest.
        world: number of ranks that wrote it.
        version: of this format.
        files: name -> [size, sha256].
        optimizer: numbers of the optimiser (`training_state.numbers`).
        scored: the step after which the validation data were scored last.
        last: scalars of the last log step.
        curve: what was measured on the way, `step` and the scalars of each, where it is looked back
            at (`engine.training.keep`).
        seconds: spent on the stage so far, over all launches.
    """

    step: int
    position: int
    config: dict[str, Any]
    manifest: str
    world: int
    version: int = VERSION
    files: dict[str, list[Any]] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scored: int = 0
    last: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    digest: str = ""
    curve: list[dict[str, float]] = field(default_factory=list)

    def content(self) -> dict[str, Any]:
        """As `state.json` has it; without a curve as it was before there were curves."""
        content = asdict(self)
        if not self.curve:
            del content["curve"]
        return content

    def content_digest(self) -> str:
        """sha256 of all other fields, as `state.json` keeps it in `digest`."""
        content = self.content() | {"digest": ""}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class _Optimizer(records.Record):
    step: records.Count
    scaler: dict[str, bool | int | records.Finite] = pydantic.Field({})


class Written(records.Record):
    """`State` as a file has it, which may be a stranger's."""

    model_config = pydantic.ConfigDict(strict=True, extra="forbid")

    step: records.Count
    position: records.Count
    config: dict[str, Any]
    manifest: str
    world: Annotated[int, pydantic.Field(ge=1, lt=2**31)]
    version: int
    files: dict[
        Annotated[str, pydantic.Field(pattern=r"^part-[0-9]{5,9}-of-[0-9]{5,9}\.safetensors$")],
        Annotated[tuple[records.Count, records.Hash], pydantic.Strict(False)],
    ]
    optimizer: _Optimizer
    scored: records.Count
    last: dict[str, float]
    seconds: Annotated[records.Finite, pydantic.Field(ge=0)]
    digest: records.Hash
    curve: list[dict[str, records.Finite]] = pydantic.Field([])
