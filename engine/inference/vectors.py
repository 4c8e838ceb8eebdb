"""Features -> .npy with a list of ids, or Parquet; neighbours; TensorBoard's projector."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import BrokenData
from selfdistill.data.files import fsync
from selfdistill.data.inputs.base import Inputs
from selfdistill.data.inputs.packed import Packed
from selfdistill.data.loading.codec import Images, Pictures
from selfdistill.engine.inference import tables
from selfdistill.engine.inference.model import Loaded
from selfdistill.engine.inference.parts import Parts, Row

SUFFIXES = (".npy", ".parquet")
#: Side of a picture in the projector, and points that it shows at most.
THUMBNAIL, POINTS = 48, 10_000
#: Column of how many tokens an input has, where they differ.
TOKENS = "tokens"


def ids_of(out: Path) -> Path:
    """The list that says what the rows of an .npy are."""
    return out.with_name(f"{out.name}.ids.csv")


def join(parts: Parts, name: str, nested: bool) -> None:
    """Joins parts to what the user asked for; rows are in the order of the inputs.

    An .npy holds the inputs that could be read, its list says which; of texts' tokens it holds all,
    and the list how many are each one's. A Parquet file has a row for each input.

    Args:
        parts: all of them.
        name: of the column of names.
        nested: an input has several vectors.
    """
    if parts.out.suffix.lower() == ".parquet":
        _parquet(parts, name, nested)
    else:
        _npy(parts)
        columns: tables.Columns = {"row": "count", name: "text"}
        columns |= {TOKENS: "count"} if _ragged(parts) else {}
        tables.write(ids_of(parts.out), columns, _ids(parts, name))


def _ragged(parts: Parts) -> bool:
    return any(TOKENS in row for rows in parts.rows() for row in rows)


def _ids(parts: Parts, name: str) -> Iterator[list[Row]]:
    at = 0
    for rows in parts.rows():
        found = []
        for row in rows:
            if not row["error"]:
                found.append(row | {"row": at, name: row["name"]})
                at += row.get(TOKENS, 1)
        yield found


def _npy(parts: Parts) -> None:
    shapes = [part.shape for part in parts.vectors()]
    shape = (sum(s[0] for s in shapes), *(shapes[0][1:] if shapes else (0,)))
    with tables.replacing(parts.out, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for part in parts.vectors():
            file.write(part.astype("<f4").tobytes())


def _parquet(parts: Parts, name: str, nested: bool) -> None:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    vectors = parts.vectors()
    writer: Any = None
    with tables.replacing(parts.out, "wb") as file:
        try:
            for rows in parts.rows():
                good = any(not row["error"] for row in rows)
                array = next(vectors) if good else np.zeros((0, 1), np.float32)
                column = _lists(rows, array, nested)
                table = pyarrow.table(
                    {
                        name: pyarrow.array([row["name"] for row in rows], pyarrow.string()),
                        "embedding": column,
                        "error": pyarrow.array([row["error"] for row in rows], pyarrow.string()),
                    }
                )
                writer = writer or ParquetWriter(file, table.schema)
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()


def _lists(rows: list[Row], array: NDArray[Any], nested: bool) -> Any:
    """A column of vectors, or of lists of them (`nested`); null for what could not be read."""
    import pyarrow

    counts = [0 if row["error"] else row.get(TOKENS, 1) for row in rows]
    width = array.shape[-1]
    flat = pyarrow.array(array.reshape(-1), pyarrow.float32())
    inner = pyarrow.ListArray.from_arrays(
        pyarrow.array(np.arange(0, len(flat) + 1, max(width, 1)), pyarrow.int32()), flat
    )
    each = array.shape[1] if array.ndim == 3 else 1
    if not nested:
        places = np.cumsum([0, *counts])
        taken = [None if row["error"] else int(at) for row, at in zip(rows, places, strict=False)]
        return inner.take(pyarrow.array(taken, pyarrow.int64()))
    ends = np.cumsum([0, *(count * each for count in counts)])
    starts = [None if row["error"] else int(at) for row, at in zip(rows, ends, strict=False)]
    offsets = pyarrow.array([*starts, int(ends[-1])], pyarrow.int32())
    return pyarrow.ListArray.from_arrays(offsets, inner)


def whole(parts: Parts) -> tuple[NDArray[Any], list[str], list[int]]:
    """All vectors [n, D] of inputs that could be read, their names, and their places."""
    names, places, at = [], [], 0
    for rows in parts.rows():
        for row in rows:
            if not row["error"]:
                names.append(row["name"])
                places.append(at)
            at += 1
    return np.concatenate(list(parts.vectors())), names, places


def nearest(vectors: NDArray[Any], names: list[str], count: int) -> list[Row]:
    """The neighbours of each input among the others, by the cosine of their features.

    Args:
        vectors: fp32 [n, D].
        names: n of them.
        count: neighbours of each.

    Returns:
        Rows `name`, `rank` (1 is the nearest), `neighbour`, `cosine`, n x count of them.
    """
    from sklearn.neighbors import NearestNeighbors

    wanted = min(count, len(names) - 1)
    model = NearestNeighbors(n_neighbors=wanted + 1, metric="cosine").fit(vectors)
    distances, found = model.kneighbors(vectors)
    rows = []
    for number, name in enumerate(names):
        others = [
            (int(o), float(d))
            for o, d in zip(found[number], distances[number], strict=True)
            if o != number  # of equal pictures another may come before itself
        ][:wanted]
        rows += [
            {"name": name, "rank": rank, "neighbour": names[o], "cosine": float(f"{1 - d:.6g}")}
            for rank, (o, d) in enumerate(others, 1)
        ]
    return rows


def project(
    folder: Path,
    vectors: NDArray[Any],
    names: list[str],
    places: list[int],
    inputs: Inputs,
    model: Loaded,
) -> int:
    """Leaves features for TensorBoard's projector, of pictures with thumbnails.

    Args:
        folder: of the event files.
        vectors: fp32 [n, D].
        names: n of them.
        places: of the inputs that they are of.
        inputs: all of them.
        model: that made them.

    Returns:
        Points that are shown: evenly spread ones where there are too many.
    """
    import torch
    from torch.utils.tensorboard import SummaryWriter

    chosen = np.unique(np.linspace(0, len(names) - 1, min(POINTS, len(names))).astype(int))
    pictures = None
    if inputs.kind == "image":
        codec: Images = Pictures(THUMBNAIL, *_deep(model.codec))
        if isinstance(inputs, Packed):
            codec = Images(THUMBNAIL, inputs.manifest.span)
        pictures = torch.stack([_thumbnail(codec, inputs, places[i]) for i in chosen])
    with SummaryWriter(str(folder)) as writer:
        writer.add_embedding(
            torch.from_numpy(np.asarray(vectors)[chosen]),
            metadata=[names[i].replace("\t", " ").replace("\n", " ") for i in chosen],
            label_img=pictures,
            tag="features",
        )
    fsync(folder)
    return len(chosen)


def _deep(codec: Any) -> tuple[Any, Any]:
    return codec.span, codec.chosen


def _thumbnail(codec: Images, inputs: Inputs, place: int) -> Any:
    import torch

    one = inputs.read(place)
    try:
        assert isinstance(one.content, bytes)
        pixels = codec.decode(one.content, one.name)
    except BrokenData:  # it was there a moment ago
        pixels = np.zeros((3, THUMBNAIL, THUMBNAIL), np.uint8)
    return torch.from_numpy(np.array(pixels)).float() / 255


def remove_before(out: Path) -> None:
    """Removes the lists of an earlier output that is to be replaced."""
    for path in (ids_of(out), out.with_name(f"{out.name}.nearest.csv")):
        if path.exists():
            os.unlink(path)
