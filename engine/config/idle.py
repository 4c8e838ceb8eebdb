"""Options that were typed and change nothing: of other stages, methods and kinds of input."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from selfdistill.engine.config.schema import Config

#: The stages of each section, and of single options; of what is not named here, all.
_STAGES: dict[str, tuple[str, ...]] = {
    **{stage: (stage,) for stage in ("decoder", "pretrain", "distill", "finetune")},
    **dict.fromkeys(("recadam", "mars", "r3f"), ("finetune",)),
    **dict.fromkeys(("supcon", "diet"), ("pretrain",)),
    "teacher": ("distill",),
    **dict.fromkeys(("adapt", "lora", "probe"), ("pretrain", "distill")),
    **dict.fromkeys(
        ("mae", "mlm", "data.mix", "data.split", "text.split", "text.overlap"),
        ("decoder", "pretrain", "distill"),
    ),
}
#: What a section, or an option, goes with: another option and its value.
_WITH: dict[str, tuple[str, Any]] = {
    **{name: ("finetune.regularizer", name) for name in ("recadam", "mars", "r3f")},
    **{name: ("pretrain.objective", name) for name in ("supcon", "diet")},
    "lora": ("adapt", "lora"),
    "compile_mode": ("compile", True),
    **dict.fromkeys(("model.shape", "model.tokenizer"), ("model.path", "scratch")),
}
#: Of one kind of input; `base.PICTURED`, which change pictures, are refused with texts.
_KINDS = {
    "image": (
        *("mae", "model.image_size", "finetune.flip", "diet.augment"),
        *("decoder.width", "decoder.depth"),
    ),
    "text": ("mlm", "text", "model.tokenizer"),
}


def idle(config: Config) -> list[str]:
    """Lines that name what the command line gives and this launch has no use for.

    Args:
        config: of the launch, its model that of the run.
    """
    stages, lines = {config.stage}, list[str]()
    if config.stage == "all":
        stages = {"decoder", "pretrain", "distill", "finetune"}
    foreign = {
        name
        for section, own in _STAGES.items()
        if not stages & set(own)
        for name in _of(config.typed, section)
    }
    if config.pretrain.objective == "diet" or config.probe.every:
        foreign.discard("distill.feature")  # which is read there, too
    if stages & {"pretrain", "distill"}:  # a new decoder may be theirs, a random one
        foreign -= {"decoder.width", "decoder.depth"}
    if foreign:
        lines.append(f"of no use to --stage {config.stage}: {_options(foreign)}")
    for section, (other, value) in _WITH.items():
        found = set(_of(config.typed, section)) - foreign
        now = operator.attrgetter(other)(config)
        if found and now not in (value, None):
            option = other.removesuffix(".path")
            lines.append(
                f"of no use with --{option} {_word(now)}: {_options(found)}, which"
                f" {'go' if len(found) > 1 else 'goes'} with --{option} {_word(value)}"
            )
    return lines


def of_other_kind(config: Config, kind: str) -> str:
    """A line that names what the command line gives for another kind of input; "" for nothing.

    Args:
        config: of the launch.
        kind: image or text.
    """
    others = {
        name
        for other, sections in _KINDS.items()
        if other != kind
        for section in sections
        for name in _of(config.typed, section)
    }
    return f"of no use to {kind}s: {_options(others)}" if others else ""


def _of(typed: Iterable[str], section: str) -> list[str]:
    return [name for name in typed if name == section or name.startswith(f"{section}.")]


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _options(names: Iterable[str]) -> str:
    return ", ".join(f"--{name}" for name in sorted(names))
