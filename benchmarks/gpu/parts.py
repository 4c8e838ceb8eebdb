"""The parts of the long call and of the first one, in order, with their shares of the time."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """A process of its own: what it does to the device ends with it.

    Attributes:
        name: in the records.
        title: in the table.
        seconds: planned; what earlier parts leave comes on top.
        words: of the command.
        tiny: of the command of a rehearsal; None: the same.
    """

    name: str
    title: str
    seconds: int
    words: tuple[str, ...]
    tiny: tuple[str, ...] | None = None

    def command(self, tiny: bool) -> list[str]:
        """What is run."""
        return [sys.executable, *(self.tiny if tiny and self.tiny else self.words)]


#: Needs a GPU.
GPU_TESTS = "tests/engine/runtime/test_gpu.py"


def _work(module: str, *words: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.gpu.{module}", *words)


def _both(module: str, *words: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return _work(module, *words), _work(module, *words, "--tiny=true")


#: Some 540 seconds, starts of Python (10 to 15 s each) included.
LONG = (
    Part("machine", "versions, bandwidth, ceiling", 25, *_both("machine")),
    Part(
        "tests",
        "pytest -m gpu",
        95,
        ("-m", "pytest", "-v", "-m", "gpu", GPU_TESTS),
    ),
    Part("distill", "ViT-B/16 distillation", 90, *_both("steps", "--what=distill")),
    Part("deterministic", "ViT-B/16, deterministic", 20, *_both("steps", "--what=deterministic")),
    Part("pretrain", "ViT-B/16 further pre-training", 55, *_both("steps", "--what=pretrain")),
    Part("plain", "the plain loop", 60, *_both("peers", "--who=plain")),
    Part("trainer", "Trainer + DeepSpeed", 40, *_both("peers", "--who=trainer")),
    Part("compiled", "torch.compile", 60, *_both("steps", "--what=compiled")),
    Part("texts", "RoBERTa-base at mixed lengths", 35, *_both("texts")),
    Part("loader", "loader, and data wait of a run", 40, *_both("feeding")),
    Part("checkpoint", "checkpoint save and load", 20, *_both("saving", "--patience=8")),
)

#: Some 100 seconds: whether the long call is worth starting. A machine that has just been started
#: reads torch and the others from its disk for the first time.
FIRST = (
    Part("machine", "versions, bandwidth, ceiling", 20, *_both("machine")),
    Part("doctor", "launcher.doctor", 15, ("-m", "launcher.doctor")),
    Part("one", "one bf16 step", 35, *_both("steps", "--what=one")),
    Part(
        "tests",
        "two tests",
        30,
        (
            "-m",
            "pytest",
            "-v",
            "-m",
            "gpu",
            "-k",
            "objective or page_locked",
            GPU_TESTS,
        ),
    ),
)
