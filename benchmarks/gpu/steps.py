"""Our step, as shipped and with each switch alone, one after the other in one process."""

import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import ours
from benchmarks.contestant import LR
from benchmarks.gpu.counted import tell
from benchmarks.gpu.say import failed
from benchmarks.sizes import Stage, batches
from selfdistill.data import cli
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.monitoring import flops
from selfdistill.engine.runtime import precision
from selfdistill.engine.runtime.allocator import release
from selfdistill.engine.runtime.zero import DTYPES

#: ViT-B/16, of which MFU is told.
BASE = Shape(224, 16, 768, 12, 12, 3072)

#: Name -> options of `benchmarks.ours.make` beside the shipped ones: bf16, zero0, cached teacher.
SHIPPED: dict[str, dict[str, Any]] = {"as shipped": {}}
SWITCHES: dict[str, dict[str, Any]] = {
    "teacher replicated": {"teacher": "replicated"},
    "fp32 with TF32": {"precision": "fp32"},
    "fp32": {"precision": "fp32", "tf32": False},
    "zero1": {"zero": "zero1"},
    "zero2": {"zero": "zero2"},
    "zero3": {"zero": "zero3"},
    "zero1, DeepSpeed's timer on": {
        "zero": {"zero_optimization": {"stage": 1}, "timers": {"throughput": {"enabled": True}}}
    },
}
COMPILED: dict[str, dict[str, Any]] = {
    "compiled": {"compiled": True},
    "compiled, CUDA graphs": {"compiled": True, "mode": "reduce-overhead"},
}

#: What to do: (stage, batch, variants, seconds of each one's rounds).
PLAN: dict[str, list[tuple[Stage, int, dict[str, dict[str, Any]], float]]] = {
    "one": [("distill", 64, SHIPPED, 2.0)],
    "distill": [("distill", 256, SHIPPED | SWITCHES, 3.0), ("distill", 64, SHIPPED, 3.0)],
    "deterministic": [("distill", 256, {"deterministic": {"deterministic": True}}, 3.0)],
    "pretrain": [
        ("pretrain", 256, SHIPPED | {"fp32 with TF32": {"precision": "fp32"}}, 3.0),
        ("pretrain", 64, SHIPPED, 3.0),
    ],
    "compiled": [
        ("distill", 64, COMPILED, 3.0),
        ("distill", 256, {"compiled": {"compiled": True}}, 3.0),
    ],
}


def main(
    what: Literal["one", "distill", "deterministic", "pretrain", "compiled"], tiny: bool = False
) -> None:
    """Times variants of our step.

    Args:
        what: which.
        tiny: the tiny size.
    """
    # Before CUDA begins: the switch of one variant is one of the process.
    precision.before_cuda(Config(deterministic=what == "deterministic"))
    size = "tiny" if tiny else "vit_base"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    for stage, batch, variants, seconds in PLAN[what]:
        data = batches(size, 8 if tiny else batch)
        for name, options in variants.items():
            title = f"{stage}, batch {batch}, {name}"
            try:
                _one(title, size, stage, data, options, 0.2 if tiny else seconds, device)
            except Exception as error:  # of any library: the others are timed all the same
                failed(title, error)


def _one(
    title: str,
    size: str,
    stage: Stage,
    data: list[Any],
    options: dict[str, Any],
    seconds: float,
    device: str,
) -> None:
    told = options.get("precision", "bf16")
    switches = {k: options[k] for k in ("tf32", "deterministic") if k in options}
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision.set_switches(Config(**switches), place)
    zero = options.get("zero", "auto")
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(zero, dict):
            (Path(folder) / "zero.json").write_text(json.dumps(zero), encoding="utf-8")
            zero = str(Path(folder) / "zero.json")
        step, engine = ours.make(
            size,
            stage,
            LR,
            told,
            data,
            zero=zero,
            teacher=options.get("teacher", "cached"),
            compiled=options.get("compiled", False),
            compile_mode=options.get("mode", "default"),
        )
    mode = options.get("teacher", "cached")
    one = flops.step_flops(BASE, stage, teacher=mode, classes=10, cls_only=True)
    tell(
        title,
        step,
        len(data[0]["labels"]),
        seconds,
        flops=one if size == "vit_base" else 0.0,
        peak_flops=flops.peak_flops(device, DTYPES[told]),
        base=f"plain: {stage}, batch {_batch(title)}, fp32",
    )
    release(engine)
    torch.compiler.reset()


def _batch(title: str) -> str:
    return title.split("batch ")[1].split(",")[0]


if __name__ == "__main__":
    cli.run(main)
