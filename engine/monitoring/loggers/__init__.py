"""Where a stage's figures go beside metrics.jsonl: TensorBoard, or other programs' logs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from selfdistill.engine.monitoring.loggers.base import Flat, Logger, Picture, Place
from selfdistill.engine.runtime import terminal

#: Option's word -> the class in the module of that name, which is its package's, too.
_CLASSES = {
    "tensorboard": "TensorBoard",
    "trackio": "Trackio",
    "wandb": "Wandb",
    "mlflow": "Mlflow",
}


def open_all(names: Sequence[str], place: Place) -> list[Logger]:
    """The loggers of a stage; what other programs cannot do is said once, and stops no training."""
    return [_open(name, place) for name in names]


def _open(name: str, place: Place) -> Logger:
    def make() -> Logger:
        module = importlib.import_module(f"{__name__}.{name}")
        logger: Logger = getattr(module, _CLASSES[name])(place)
        return logger

    return make() if name == "tensorboard" else Guarded(name, make)


class Guarded:
    """Another program's logger, which a fault of its own, or of its network, ends.

    Args:
        name: of the program.
        make: opens it.
    """

    def __init__(self, name: str, make: Callable[[], Logger]) -> None:
        self.name = name
        self.logger: Logger | None = None
        self._try(lambda: setattr(self, "logger", make()))

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # any: it is foreign, and only looks on
            self.logger = None
            line = " ".join(str(error).split())[:160] or type(error).__name__
            terminal.say(
                f"warning: --logger {self.name}: {line}: nothing more of this stage goes there;"
                " metrics.jsonl has it all"
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See `Logger`."""
        if (logger := self.logger) is not None:
            self._try(lambda: logger.scalars(step, values))

    def image(self, step: int, tag: str, picture: Picture) -> None:
        """See `Logger`."""
        if (logger := self.logger) is not None:
            self._try(lambda: logger.image(step, tag, picture))

    def text(self, step: int, tag: str, markdown: str) -> None:
        """See `Logger`."""
        if (logger := self.logger) is not None:
            self._try(lambda: logger.text(step, tag, markdown))

    def hparams(self, step: int, config: Flat, metrics: Mapping[str, float]) -> None:
        """See `Logger`."""
        if (logger := self.logger) is not None:
            self._try(lambda: logger.hparams(step, config, metrics))

    def close(self) -> None:
        """See `Logger`."""
        if (logger := self.logger) is not None:
            self._try(logger.close)
