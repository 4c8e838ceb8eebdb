"""`sd.pack`, `sd.train` and their like: a command's options as keyword arguments.

What a command prints on its error line comes as an exception with that line in Python's words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.launcher.api import tables, training
from selfdistill.launcher.api.inputs import Inputs, Listed, Place, place_of, plain
from selfdistill.launcher.api.mistakes import told
from selfdistill.launcher.api.results import Features, Scores
from selfdistill.launcher.api.run import Run

if TYPE_CHECKING:
    import pandas

    from selfdistill.engine.inference.model import Loaded


@told
def pack(source: Place, out: Place, **options: Any) -> Path:
    """Packs images or texts, as `selfdistill pack SOURCE OUT` does.

    Args:
        source: see `data.pack.pack`, as of all options.
        out: the data set's folder.
        options: of the command.

    Returns:
        The data set's folder, for `train`.

    Raises:
        UserError: as the command.
    """
    from selfdistill.data import pack as command

    place = os.path.expanduser(out)
    _call(command.pack, place_of(source, "source"), place, **options)
    return Path(place)


@told
def train(**options: Any) -> Run:
    """Trains, as `selfdistill train` does, in processes of their own.

    Their lines come through as they are printed. An interrupt reaches the ranks, which save; the
    same call then goes on.

    Args:
        options: of engine/run.py and of the launcher. An option with a dot is given in a
            dictionary (`distill={"epochs": 3}`), or by its name (`**{"distill.epochs": 3}`).

    Returns:
        The run.

    Raises:
        UserError: a mistake in options, data or files, with the line that the command prints.
        TryAgain: a rank is gone, or was asked to leave by others: the same call goes on.
        KeyboardInterrupt: interrupted here, and the ranks have saved: says at which step.
        RuntimeError: an error in this program.
    """
    return Run(training.train(options))


@told
def predict(
    model: Place | Run, inputs: Inputs, out: Place | None = None, **options: Any
) -> pandas.DataFrame:
    """Labels pictures or texts, as `selfdistill predict MODEL INPUTS OUT` does.

    Args:
        model: a run, the folder of a stage or an export.
        inputs: what the command takes; a list, a Series or an array of paths or texts; or a
            DataFrame with a column of them.
        out: the table to write; by default none is left.
        options: of the command.

    Returns:
        The table: an input a row, under the index of a Series or a DataFrame; of one that could not
        be read the column `error` says why, of others it is missing.

    Raises:
        UserError: as the command.
    """
    from selfdistill.launcher import predict as command

    with _places(model, inputs, out, "labels.jsonl", options) as (given, written, listed):
        _call(command.predict, model, given, written, **options)
        table = tables.read(written)
    table["error"] = table["error"].where(table["error"] != "", None)
    if listed is None:
        return table
    if "path" in table:
        table["path"] = tables.objects(listed.given)
    return table if listed.index is None else table.set_index(listed.index)


@told
def embed(model: Place | Run, inputs: Inputs, out: Place | None = None, **options: Any) -> Features:
    """The features of pictures or texts, as `selfdistill embed MODEL INPUTS OUT` writes them.

    Args:
        model: a run, the folder of a stage or an export, or what --model takes.
        inputs: what the command takes; a list, a Series or an array of paths or texts; or a
            DataFrame with a column of them.
        out: the .npy to write, with its OUT.ids.csv; by default none is left.
        options: of the command.

    Returns:
        The features, and what they are of.

    Raises:
        UserError: as the command.
    """
    import numpy as np

    from selfdistill.launcher import embed as command

    if out is not None and Path(out).suffix != ".npy":
        raise UserError(f"{out}: sd.embed writes .npy; `selfdistill embed` writes the others")
    with _places(model, inputs, out, "features.npy", options) as (given, written, listed):
        _call(command.embed, model, given, written, **options)
        ids = tables.read(Path(f"{written}.ids.csv"))
        vectors = np.load(written, allow_pickle=False)
        near = Path(f"{written}.nearest.csv")
        nearest = tables.read(near) if options.get("nearest") and near.exists() else None
    if listed is not None:
        if "path" in ids:
            ids["path"] = tables.objects(listed.as_given(ids["path"]))
        names = listed.by_name()
        for column in ("name", "neighbour") if nearest is not None else ():
            assert nearest is not None
            nearest[column] = tables.objects([names.get(one, one) for one in nearest[column]])
    return Features(ids, vectors, nearest)


@told
def evaluate(model: Place | Run, data: Place, out: Place | None = None, **options: Any) -> Scores:
    """Scores a classifier on a labelled set, as `selfdistill evaluate MODEL DATA` does.

    Args:
        model: a run, the folder of a stage or an export.
        data: a packed set or split, or what packing reads with labels.
        out: folder for the page and its figures; by default none is left.
        options: of the command.

    Returns:
        The figures; shares in 0..1.

    Raises:
        UserError: as the command.
    """
    from selfdistill.launcher import evaluate as command

    came = _call(command.evaluate, model, place_of(data, "data"), out=out, **options)
    none = (None, None)
    figures = [
        {"figure": name, "value": value}
        | dict(zip(("low", "high"), came.intervals.of.get(name, none), strict=True))
        for name, value in came.figures.items()
    ]
    classes = [
        {"class": name} | dataclasses.asdict(of_class)
        for name, of_class in zip(came.classes, came.by_class, strict=True)
    ]
    return Scores(
        tables.table(figures, ["figure", "value", "low", "high"]),
        tables.table(classes, ["class", "precision", "recall", "f1", "support", "predicted"]),
        came.confusion,
    )


@told
def load(model: Place | Run, **options: Any) -> Loaded:
    """Loads a trained model, for many small calls with lists of paths or texts.

    Args:
        model: a run, the folder of a stage or an export.
        options: of `engine.inference.model.load`: precision, device.

    Returns:
        The model, which gives probabilities or features; `classes`, `codec` and `forward` as well.

    Raises:
        UserError: there is none, or it is not complete.
    """
    import torch

    from selfdistill.engine.inference import model as models
    from selfdistill.engine.inference import work

    work.quiet()
    for name in options:
        if name not in (known := inspect.signature(models.load).parameters):
            raise UserError(f"unknown option {name}: there are {', '.join([*known][1:])}")
    if isinstance(options.get("device"), str):
        try:
            options["device"] = torch.device(options["device"])
        except RuntimeError:
            raise UserError(f"device {options['device']}: give cpu, cuda or cuda:1") from None
    return models.load(os.fspath(model), **options)


def _call(command: Any, *args: Any, **options: Any) -> Any:
    """`cli.call`, with values from numpy, and without what a command line does not have."""
    if "device" in options and "device" not in inspect.signature(command).parameters:
        raise UserError(
            'device is no option: a GPU is taken where there is one; sd.load(model, device="cpu")'
            " is for the choice"
        )
    return cli.call(command, *args, **{name: plain(one, name) for name, one in options.items()})


@contextmanager
def _places(
    model: Place | Run, inputs: Inputs, out: Place | None, name: str, options: dict[str, Any]
) -> Iterator[tuple[Place, Path, Listed | None]]:
    """Inputs and output as a command takes them; inputs in memory become a table of them.

    What is printed or raised within does not name files that are gone afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="selfdistill-") as folder:
        given: Place
        listed: Listed | None = None
        if isinstance(inputs, str | os.PathLike):
            given = inputs
        else:
            listed = Listed(inputs, model, options)
            given = Path(folder) / "inputs.jsonl"
            listed.write(given, options)
        inside = re.compile(rf"{re.escape(folder)}/(inputs)\.jsonl|{re.escape(folder)}/[\w.]+: ")
        written = Path(folder) / name if out is None else Path(out).expanduser()
        try:
            with contextlib.redirect_stdout(_Without(inside)):
                yield given, written, listed
        except UserError as error:
            error.args = (inside.sub(r"\1", str(error)),)
            raise


class _Without(io.TextIOBase):
    """Standard output as it is now, without some of the text."""

    def __init__(self, what: re.Pattern[str]) -> None:
        self.what, self.out = what, sys.stdout

    def write(self, text: str) -> int:
        return self.out.write(self.what.sub(r"\1", text))

    def flush(self) -> None:
        self.out.flush()
