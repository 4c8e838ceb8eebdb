"""Labels new pictures or texts: `python -m launcher.predict runs/mine photos/ labels.csv`.

Several processes share the work: `deepspeed --module launcher.predict runs/mine photos/ labels.csv`
(or torchrun, or srun). An interrupted one goes on when it is launched again.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats import depth, images
from selfdistill.data.formats.channels import parse as parse_channels
from selfdistill.data.inputs.find import Stdin, find
from selfdistill.data.inputs.tables import Wanted
from selfdistill.engine.inference import Precision, tables
from selfdistill.engine.inference.parts import Parts
from selfdistill.launcher import ranked

if TYPE_CHECKING:
    from selfdistill.engine.inference.model import Loaded
    from selfdistill.engine.inference.work import Done

#: Above this a class of a model that gives several is named.
OVER = 0.5


def predict(
    model: str,
    inputs: str,
    out: str,
    top: int = 1,
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
    """Says of each picture or text its class and how probable that is.

    Args:
        model: A run, a stage or an export with a head: runs/mine, runs/mine/finetune/export.
        inputs: A file, a folder of any shape, a pattern in quotation marks, a table (.csv, .tsv,
            .jsonl, .parquet), texts a line (.txt), a tar, a packed set, or - for standard input.
        out: The table to write: .csv, .jsonl or .parquet.
        top: How many classes to name for each input, the most probable first.
        split: Of a packed set with several.
        path_column: Column of the pictures' paths, relative to the table; of Parquet also of bytes.
        text_column: Column of the texts.
        pair_column: Column of the second text of a pair; it need not be there.
        stdin: What comes by standard input, a line each: texts, or paths.
        range: LOW,HIGH, the values of pictures of more than 8 bits that are black and white; by
            default those of the set that the model was trained on.
        channels: Of TIFFs with several pages or channels, as in data.pack.
        max_pixels: The largest picture, in pixels.
        precision: auto, fp32 or bf16; auto computes as the model was scored, if it can here.
        batch: Inputs that are computed together; by default 64 on a processor, 256 on a GPU.
        workers: Processes that read and decode.
        overwrite: Replace OUT, and parts of an interrupted launch with other settings.
    """
    # torch: seconds, for which neither --help nor a wrong option waits.
    from selfdistill.engine.inference import work
    from selfdistill.engine.inference.found import no_classes

    images.allow(max_pixels)
    place = Path(out).expanduser()
    ranks = work.join()
    work.together(ranks, lambda: tables.check(place, overwrite=overwrite))
    loaded = opened(model, precision, range, channels, ranks)
    if not loaded.classes:
        raise no_classes(model)
    if top < 1:
        raise UserError(f"--top {top}: give 1 or more")
    top = min(top, len(loaded.classes))
    wanted = Wanted(path_column, text_column, pair_column)
    given = find(inputs, loaded.kind, wanted=wanted, split=split, stdin=stdin)
    say([*loaded.notes, *given.notes], ranks.main)
    size = batch_of(batch, loaded)
    made_by = {
        "model": loaded.sha256,
        "settings": f"predict, top {top}, batch {size}{work.limits(max_pixels)}",
        "inputs": given.digest(),
    }
    parts = Parts(place, made_by, given.samples)

    done = work.together(ranks, lambda: parts.prepare(overwrite))
    if done:
        say([f"going on: {done} of {parts.blocks} parts are done"], ranks.main)

    def compute(found: dict[str, Any], count: int) -> tuple[list[dict[str, Any]], None]:
        return rows_of(loaded, found, count, top), None

    rate = work.through(loaded, given, parts, compute, ranks=ranks, batch=size, workers=workers)
    summary = work.Done(given.samples, 0, "", rate)
    if ranks.main:
        summary = work.summary(parts, rate)
        tables.write(
            place, columns(given.column, top, loaded.several), _renamed(parts, given.column)
        )
        parts.remove()
        print(printable(summary.line(place)))
    return summary


def opened(
    model: str,
    precision: Precision,
    range: str | None,
    channels: str | None,
    ranks: Any,
    size: images.Size | None = None,
) -> "Loaded":
    """The model, with what is said of deep pictures on the command line."""
    from selfdistill.engine.inference.model import load

    span = depth.parse(range)
    if isinstance(span, str):
        raise UserError("--range auto is for packing: give LOW,HIGH, such as 0,4095")
    return load(
        model,
        precision=precision,
        span=span,
        channels=parse_channels(channels),
        size=size,
        device=ranks.device,
    )


def batch_of(asked: int | None, model: "Loaded") -> int:
    """Inputs of a batch.

    Raises:
        UserError: fewer than one.
    """
    from selfdistill.engine.inference import work

    if asked is not None and asked < 1:
        raise UserError(f"--batch {asked}: give 1 or more")
    return asked or (work.ON_GPU if model.device.type == "cuda" else work.ON_CPU)


def say(lines: list[str], main: bool) -> None:
    """Lines for the user, of one rank."""
    for line in lines if main else ():
        print(printable(line), flush=True)


def rows_of(model: "Loaded", found: dict[str, Any], count: int, top: int) -> list[dict[str, Any]]:
    """What is said of each readable input of a batch.

    Args:
        model: A classifier.
        found: The batch.
        count: Its inputs.
        top: Classes to name.

    Raises:
        UserError: The model gives no numbers.
    """
    logits = model.forward(found)["logits"][:count].cpu()
    if not logits.isfinite().all():
        raise UserError(f"{model.origin} gives NaN: its training went wrong: take another model")
    # As evaluation's argmax: of equal ones the first.
    order = logits.sort(dim=1, descending=True, stable=True).indices
    if model.several:
        shares = logits.double().sigmoid()
        return [
            _several(model.classes, s, o)
            for s, o in zip(shares.tolist(), order.tolist(), strict=True)
        ]
    shares = logits.double().softmax(dim=1)
    rows = []
    for share, best in zip(shares.tolist(), order[:, :top].tolist(), strict=True):
        row: dict[str, Any] = {}
        for number, label in enumerate(best, 1):
            end = "" if number == 1 else f"_{number}"
            row |= {f"class{end}": model.classes[label], f"probability{end}": _short(share[label])}
        rows.append(row)
    return rows


def _several(classes: list[str], shares: list[float], order: list[int]) -> dict[str, Any]:
    named = [label for label in order if shares[label] > OVER]
    return {
        "classes": [classes[label] for label in named],
        "probabilities": [_short(shares[label]) for label in named],
    }


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def columns(name: str, top: int, several: bool) -> tables.Columns:
    """The columns of the table, in order."""
    found: tables.Columns = {name: "text"}
    if several:
        found |= {"classes": "texts", "probabilities": "numbers"}
    for number in range(1, top + 1) if not several else ():
        end = "" if number == 1 else f"_{number}"
        found |= {f"class{end}": "text", f"probability{end}": "number"}
    return found | {"error": "text"}


def _renamed(parts: Parts, name: str) -> Any:
    """The parts' rows, the input's name in its column."""
    for rows in parts.rows():
        yield [{name: row["name"], **row} for row in rows]


if __name__ == "__main__":
    ranked.run(predict)
