"""Features of pictures or texts: `python -m launcher.embed runs/mine photos/ features.npy`.

Several processes share the work, and an interrupted one goes on, as `launcher.predict` does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats import images
from selfdistill.data.inputs.find import Stdin, find
from selfdistill.data.inputs.tables import Wanted
from selfdistill.engine.inference import Asked, Precision, tables
from selfdistill.engine.inference.parts import Parts
from selfdistill.launcher import ranked
from selfdistill.launcher.predict import batch_of, opened, say

if TYPE_CHECKING:
    from selfdistill.engine.inference.model import Loaded
    from selfdistill.engine.inference.work import Done


def embed(
    model: str,
    inputs: str,
    out: str,
    feature: Asked = "own",
    nearest: int = 0,
    projector: str | None = None,
    size: images.Size | None = None,
    split: str | None = None,
    path_column: str = "path",
    text_column: str = "text",
    pair_column: str = "text_pair",
    stdin: Stdin = "auto",
    range: str | None = None,
    channels: str | None = None,
    max_pixels: int = images.MOST_PIXELS,
    precision: Precision = "auto",
    batch: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
) -> "Done":
    """Writes each picture's or text's feature: what the model makes of it before any head.

    Args:
        model: A run, a stage or an export, or what --model takes: runs/mine, runs/mine/pretrain.
        inputs: See launcher.predict.
        out: What to write: .npy, fp32, beside it OUT.ids.csv with what each row is; or .parquet.
        feature: own, what the model's head reads or its makers pool; cls, the first token; mean, of
            the patches or the text's tokens; tokens, every one of them.
        nearest: How many neighbours of each input to write to OUT.nearest.csv, by the cosine.
        projector: Folder for TensorBoard's projector, of pictures with thumbnails.
        size: Side of the pictures in pixels, or HEIGHTxWIDTH, whole patches; by default the
            model's. Another one moves its position embeddings, as --model.image_size does.
        split: See launcher.predict.
        path_column: See launcher.predict.
        text_column: See launcher.predict.
        pair_column: See launcher.predict.
        stdin: See launcher.predict.
        range: See launcher.predict.
        channels: See launcher.predict.
        max_pixels: See launcher.predict.
        precision: See launcher.predict.
        batch: See launcher.predict.
        workers: See launcher.predict.
        overwrite: Replace OUT, and parts of an interrupted launch with other settings.
    """
    # torch: seconds, for which neither --help nor a wrong option waits.
    from selfdistill.engine.inference import vectors, work

    images.allow(max_pixels)
    place = Path(out).expanduser()
    near = place.with_name(f"{place.name}.nearest.csv")
    points = None if projector is None else Path(projector).expanduser()
    if feature == "tokens" and (nearest or points):
        raise UserError("--feature tokens has no one vector an input: take cls, mean or own")
    if nearest < 0:
        raise UserError(f"--nearest {nearest}: give 0 or more")
    ranks = work.join()
    work.together(ranks, lambda: tables.check(place, vectors.SUFFIXES, overwrite=overwrite))
    loaded = opened(model, precision, range, channels, ranks, size)
    wanted = Wanted(path_column, text_column, pair_column)
    given = find(inputs, loaded.kind, wanted=wanted, split=split, stdin=stdin)
    say([*loaded.notes, *given.notes], ranks.main)
    size = batch_of(batch, loaded)
    settings = f"embed, feature {feature}, batch {size}{work.limits(max_pixels)}"
    made_by = {"model": loaded.sha256, "settings": settings, "inputs": given.digest()}
    parts = Parts(place, made_by, given.samples)

    def prepare() -> int:
        if points and points.is_dir() and any(points.iterdir()) and not overwrite:
            raise UserError(f"{points} holds files already: name another folder")
        if points and points.exists() and not points.is_dir():
            raise UserError(f"{points} is a file: name a folder for the projector")
        for beside in (vectors.ids_of(place), near):
            if beside.exists() and not overwrite:
                raise UserError(f"{beside} is there: --overwrite replaces it, or name another OUT")
        return parts.prepare(overwrite)

    done = work.together(ranks, prepare)
    if done:
        say([f"going on: {done} of {parts.blocks} parts are done"], ranks.main)

    def compute(found: dict[str, Any], count: int) -> tuple[list[dict[str, Any]], NDArray[Any]]:
        return features_of(loaded, found, count, feature)

    rate = work.through(loaded, given, parts, compute, ranks=ranks, batch=size, workers=workers)
    if not ranks.main:
        return work.Done(given.samples, 0, "", rate)
    vectors.remove_before(place)
    summary = work.summary(parts, rate)
    lines = [summary.line(place)]
    vectors.join(parts, given.column, nested=feature == "tokens")
    if summary.unreadable < given.samples and (nearest or points):
        array, names, places = vectors.whole(parts)
        if nearest:
            columns: tables.Columns = {"name": "text", "rank": "count", "neighbour": "text"}
            rows = vectors.nearest(array, names, nearest)
            tables.write(near, columns | {"cosine": "number"}, [rows])
            lines.append(f"{near}: the {min(nearest, given.samples - 1)} nearest of each")
        if points:
            shown = vectors.project(points, array, names, places, given, loaded)
            lines.append(f"{points}: {shown} points: tensorboard --logdir {points}")
    parts.remove()
    for line in lines:
        print(printable(line))
    return summary


def features_of(
    model: "Loaded", found: dict[str, Any], count: int, feature: Asked
) -> tuple[list[dict[str, Any]], NDArray[Any]]:
    """The features of a batch's readable inputs, and their rows.

    Args:
        model: Which.
        found: The batch.
        count: Its inputs.
        feature: Which.

    Returns:
        Rows, of texts' tokens with their number; fp32 [count, D], of images' tokens
        [count, T, D], of texts' [sum of T, D].
    """
    from selfdistill.engine.inference.vectors import TOKENS

    if feature != "tokens":
        return [{} for _ in range(count)], model.encode(found, feature)[:count].cpu().numpy()
    each = [tokens.cpu().numpy() for tokens in model.tokens(found)[:count]]
    if model.kind == "image":
        return [{} for _ in each], np.stack(each)
    return [{TOKENS: len(tokens)} for tokens in each], np.concatenate(each)


if __name__ == "__main__":
    ranked.run(embed)
