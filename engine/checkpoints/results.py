"""result.json, which marks a stage complete, and the numbered stages of a run's folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pydantic

from selfdistill.data import records

RESULT = "result.json"

_Figures = dict[str, float]


class _Model(records.Record):
    path: str | None = None
    sha256: records.Hash


class _Result(records.Record):
    """What is used of it; the rest stays as it is."""

    stage: str | None = None
    n: Annotated[int, pydantic.Field(ge=1, lt=2**20)] | None = None
    seed: records.Count | None = None
    metric: str | None = None
    metrics: _Figures = pydantic.Field({})
    std: dict[str, float | None] = pydantic.Field({})
    analysis: dict[str, Any] = pydantic.Field({})
    seconds: Annotated[records.Finite, pydantic.Field(ge=0)]
    model: _Model | None = None
    manifest: str | None = None
    record: dict[str, Any] | None = None


def read_result(path: Path) -> dict[str, Any]:
    """What a complete stage left.

    Args:
        path: its result.json.

    Returns:
        Its entries, and "metrics" where a stage has none.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is not what a stage writes.
    """
    cure = "delete it to redo the stage"
    content = records.read_object(path, cure)
    records.checked(_Result, content, path, cure)
    return {"metrics": {}} | content


def numbered(folder: Path, prefix: str) -> dict[int, Path]:
    """The folders PREFIX1, PREFIX2, ... that are there, by their numbers, lowest first.

    Args:
        folder: where they lie.
        prefix: such as "distill-".
    """
    found = {}
    for path in folder.glob(f"{prefix}*"):
        if re.fullmatch("[0-9]{1,15}", path.name.removeprefix(prefix)) and path.is_dir():
            found[int(path.name.removeprefix(prefix))] = path
    return dict(sorted(found.items()))
