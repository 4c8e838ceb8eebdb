"""What a logger is told: scalars, pictures, texts, and at the end the settings and figures."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from selfdistill.data import records
from selfdistill.data.files import fresh

#: In a stage's folder: by which ids other programs know it.
IDS = "loggers.json"
#: The project, or experiment, that runs stand in where the program's own variables name none.
PROJECT = "selfdistill"

Flat = Mapping[str, int | float | str]
Picture = np.ndarray[Any, Any] | torch.Tensor


@dataclass(frozen=True)
class Place:
    """One stage of one launch.

    Attributes:
        folder: the stage's, in the run's.
        stage: its name, which for one of several seeds holds a slash.
        first: the first step of this launch; 0 where the stage begins.
    """

    folder: Path
    stage: str
    first: int

    @property
    def run(self) -> str:
        """Name of the run: that of its folder."""
        above = self.folder.absolute().parents
        return above[self.stage.count("/")].name

    def known(self, program: str) -> str | None:
        """The id by which a program knows this stage from an earlier launch."""
        path = self.folder / IDS
        found = records.read_object(path) if path.is_file() else {}
        value = found.get(program)
        return value if isinstance(value, str) else None

    def keep(self, program: str, value: str) -> str:
        """Keeps an id for later launches, and returns it."""
        path = self.folder / IDS
        found = records.read_object(path) if path.is_file() else {}
        temporary = path.with_suffix(".tmp")
        with fresh(temporary) as file:
            file.write(json.dumps(found | {program: value}) + "\n")
        temporary.replace(path)
        return value

    def id_of(self, program: str) -> str:
        """The id for a program that takes any: an earlier launch's, or a new one."""
        return self.known(program) or self.keep(program, secrets.token_hex(8))


class Logger(Protocol):
    """One program's side; rank 0 alone has one. Steps count finished optimiser steps."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Figures by their tags; they may be NaN or infinite."""

    def image(self, step: int, tag: str, picture: Picture) -> None:
        """A picture, uint8 [3, H, W]."""

    def text(self, step: int, tag: str, markdown: str) -> None:
        """A text."""

    def hparams(self, step: int, config: Flat, metrics: Mapping[str, float]) -> None:
        """All settings, and the final figures, which are finite; called once, at the end."""

    def close(self) -> None:
        """The stage leaves: complete, or to be continued."""


def rows_last(picture: Picture) -> np.ndarray[Any, Any]:
    """A picture as uint8 [H, W, 3]."""
    array = picture.numpy() if isinstance(picture, torch.Tensor) else picture
    return np.ascontiguousarray(array.transpose(1, 2, 0))
