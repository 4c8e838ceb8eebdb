"""How good a model is on any labelled set: `python -m launcher.evaluate runs/mine shards/other`.

Several processes share the work, as of launcher.predict.
"""

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from selfdistill.data import pack
from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats import images
from selfdistill.data.formats.strays import is_stray
from selfdistill.data.inputs import packed
from selfdistill.data.inputs.packed import Packed
from selfdistill.data.shards.manifest import FILE as MANIFEST
from selfdistill.data.shards.manifest import is_remote
from selfdistill.data.sources import scored
from selfdistill.data.splits import ALIASES, DIVIDED
from selfdistill.engine.checkpoints.results import RESULT, read_result
from selfdistill.engine.inference import Precision, tables
from selfdistill.launcher import ranked
from selfdistill.launcher.predict import batch_of, opened, say

if TYPE_CHECKING:
    from selfdistill.engine.inference.evaluation import Evaluation
    from selfdistill.engine.inference.model import Loaded
    from selfdistill.engine.runtime.distributed import Ranks

FILE, PAGE = "evaluation.json", "evaluation.html"
_BARS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TextColumn("{task.fields[rate]}"),
    TimeRemainingColumn(),
)


def evaluate(
    model: str,
    data: str,
    split: str | None = None,
    out: str | None = None,
    path_column: str = "path",
    text_column: str = "text",
    pair_column: str = "text_pair",
    label_column: str = "label",
    label_separator: str | None = None,
    channels: str | None = None,
    max_pixels: int = images.MOST_PIXELS,
    precision: Precision = "auto",
    batch: int | None = None,
    workers: int | None = None,
    skip_broken: bool = False,
    seed: int = 0,
    overwrite: bool = False,
) -> "Evaluation | None":
    """Scores a classifier on a labelled set: every figure with its bootstrap interval.

    Args:
        model: A run, a stage or an export with a head: runs/mine, runs/mine/finetune/export.
        data: A packed set or one of its splits, or what data.pack reads with labels: class folders,
            a table (.csv, .tsv, .jsonl, .parquet). The latter is packed into a folder that is
            deleted afterwards, so that it is read exactly as a training would.
        split: Of a set with several; by default test.
        out: Folder for evaluation.json and evaluation.html.
        path_column: Column of the pictures' paths, relative to the table.
        text_column: Column of the texts.
        pair_column: Column of the second text of a pair; it need not be there.
        label_column: Column of the label.
        label_separator: What stands between the labels of a sample that may have several.
        channels: Of TIFFs with several pages or channels, as in data.pack.
        max_pixels: The largest picture, in pixels.
        precision: auto, fp32 or bf16; auto computes as the model was scored, if it can here.
        batch: Inputs that are computed together; by default as the model's own fine-tuning scored,
            so that it comes out the same to the last digit.
        workers: Processes that read and decode.
        skip_broken: Leave unreadable samples out, and say how many.
        seed: Of the intervals' draws.
        overwrite: Replace the files in OUT.
    """
    # torch: seconds, for which neither --help nor a wrong option waits.
    from selfdistill.engine.inference import evaluation, found, work
    from selfdistill.engine.inference.batches import workers_of
    from selfdistill.engine.runtime.distributed import cores

    images.allow(max_pixels)
    out = None if out is None else os.path.expanduser(out)
    ranks = work.join()
    loaded = opened(model, precision, None, channels, ranks)
    if not loaded.classes:
        raise found.no_classes(model)
    if out is not None:
        work.together(ranks, lambda: _writable(Path(out), overwrite))
    columns = {
        "path_column": path_column,
        "text_column": text_column,
        "pair_column": pair_column,
        "label_column": label_column,
        "label_separator": label_separator,
        "channels": channels,
        "max_pixels": max_pixels,
        "skip_broken": skip_broken,
    }
    if not is_remote(data):
        data = os.path.expanduser(data)
    with _opened(data, split, loaded, ranks, columns) as (given, left_out):
        evaluation.class_numbers(loaded, given.manifest, data)
        say(list(loaded.notes), ranks.main)
        size, shares = _as_scored(model, loaded, ranks)
        size = batch_of(batch, loaded) if batch is not None else size or batch_of(None, loaded)
        with _shown(given.samples, ranks) as seen:
            came = evaluation.evaluate(
                loaded,
                given.manifest,
                ranks,
                batch=size,
                shares=shares if batch is None else 1,
                workers=workers_of(loaded, cores()) if workers is None else workers,
                skip_broken=0.5 if skip_broken else 0.0,
                seed=seed,
                seen=seen,
            )
        if came is not None:
            came = replace(came, skipped=came.skipped + left_out)
            _tell(came, loaded, given, data, out)
    return came


def _tell(came: "Evaluation", model: "Loaded", given: Packed, data: str, out: str | None) -> None:
    """The table on the terminal, and the files."""
    from selfdistill.launcher.pages import evaluation as pages  # a second, for matplotlib

    console = Console(emoji=False, markup=False)
    console.print(pages.table(came, printable(f"{model.origin} on {data}, {came.n} samples")))
    for note in pages.notes(came):
        console.print(printable(note), style="dim")
    if out is None:
        console.print("--out DIR writes a page with the classes, the confusion and the mistakes")
        return
    folder = Path(out)
    content = pages.finite(pages.record(came, model, given, data))
    _write(folder / FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    _write(folder / PAGE, pages.page(came, model, given, data))
    told = printable(f"{folder / PAGE} (figures for programs: {folder / FILE})")
    console.print(told, soft_wrap=True)


def _write(path: Path, content: str) -> None:
    """A file that is whole or not there."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(content, encoding="utf-8", errors="replace")
    scratch.replace(path)


def _writable(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that cannot be written, or that holds an evaluation.

    Raises:
        UserError: says which.
    """
    if folder.is_file():
        raise UserError(f"{folder} is a file: give a folder")
    there = [name for name in (FILE, PAGE) if (folder / name).exists()]
    if there and not overwrite:
        raise UserError(
            f"{folder / there[0]} is there already: take another --out, or --overwrite true"
        )
    tables.make(folder)


@contextlib.contextmanager
def _opened(
    data: str, split: str | None, model: "Loaded", ranks: "Ranks", columns: dict[str, Any]
) -> Iterator[tuple[Packed, int]]:
    """The labelled samples, packed now where they are not; how many of them packing left out.

    Raises:
        UserError: there are none, or they are of another kind.
    """
    if split is not None and split not in DIVIDED:
        raise UserError(f"there is no split {split!r}: give one of {', '.join(DIVIDED)}")
    folder = Path(data)
    several = not is_remote(data) and any((folder / s / MANIFEST).is_file() for s in DIVIDED)
    given = packed.find(data, split or ("test" if several else None))
    if given is not None:
        yield given, 0
        return
    if ranks.world > 1:
        raise UserError(f"{data} is no packed set, which several processes need: pack it first")
    source, name = _split_folder(Path(data), split or "test"), split or "test"
    if model.kind == "image":
        columns = columns | _fitted(model)
    with tempfile.TemporaryDirectory(prefix="evaluate-") as scratch:
        if source.exists():
            say([f"packing {source} for the time of this evaluation"], ranks.main)
        with contextlib.redirect_stdout(io.StringIO()) as told, scored.by(model.classes):
            done = pack.pack(str(source), f"{scratch}/data", split=name, **columns)
        # Nobody will find the folder.
        lines = told.getvalue().replace(f"{scratch}/data/{name}: ", "").splitlines()
        say(lines, ranks.main)
        given = packed.find(f"{scratch}/data", name)
        assert given is not None
        yield given, sum(one.skipped for one in done)


def _split_folder(folder: Path, split: str) -> Path:
    """The folder of a split, where all folders of the source are splits; else the source.

    Raises:
        UserError: it has other splits alone.
    """
    if not folder.is_dir():
        return folder
    folders = [p for p in folder.iterdir() if p.is_dir() and not is_stray(p.name)]
    inside = {path: ALIASES.get(path.name.lower()) for path in folders}
    if not inside or None in inside.values():
        return folder
    for path, name in inside.items():
        if name == split:
            return path
    has = ", ".join(sorted(path.name for path in inside))
    raise UserError(f"{folder} has no split {split!r}, it has {has}: name one (--split)")


def _fitted(model: "Loaded") -> dict[str, Any]:
    """How pictures are packed as those that the model learned from were."""
    codec: Any = model.codec
    span = codec.span
    stored = {"size": codec.size} if codec.whole else {"keep_original": True}
    return stored | {"fit": codec.how} | ({} if span is None else {"range": f"{span[0]},{span[1]}"})


def _as_scored(source: str, model: "Loaded", ranks: "Ranks") -> tuple[int | None, int]:
    """Batch and ranks with which a model's own fine-tuning scored it; None where it is not known.

    The last digits of a sum depend on them. See `engine.training.scoring.evaluation.scored_batch`.
    """
    from selfdistill.engine.inference import found

    place = Path(found.locate(source).path).expanduser()
    if model.device.type == "cuda" or not (place.parent / RESULT).is_file():
        return None, 1
    result = read_result(place.parent / RESULT)
    trained, world = (result.get("record") or {}).get("finetune.batch"), result.get("world")
    if not isinstance(trained, int) or not isinstance(world, int) or min(trained, world) < 1:
        return None, 1
    dealt = world if ranks.world == 1 else ranks.world
    return max(1, min(256, 4 * trained) // dealt), world


@contextlib.contextmanager
def _shown(samples: int, ranks: "Ranks") -> Iterator[Any]:
    """A bar with rate and time left, on a terminal."""
    console, began, done = Console(stderr=True), time.monotonic(), 0
    with Progress(*_BARS, console=console, disable=not ranks.main) as progress:
        task = progress.add_task("scoring", total=samples // ranks.world, rate="")

        def seen(count: int) -> None:
            nonlocal done
            done += count
            rate = done * ranks.world / max(time.monotonic() - began, 1e-9)
            progress.update(task, advance=count, rate=f"{rate:,.0f} a second")

        yield seen


if __name__ == "__main__":
    ranked.run(evaluate)
