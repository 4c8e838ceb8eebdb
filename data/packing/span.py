"""What all splits of a set share: the range of pictures of more than 8 bits, and the fit.

The range is asked for, that of its other splits, or found.
"""

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.progress import Progress

from selfdistill.data.errors import UserError
from selfdistill.data.formats import channels, depth, fitting
from selfdistill.data.packing.encoding import values_of
from selfdistill.data.shards import manifest
from selfdistill.data.sources import scored
from selfdistill.data.sources.samples import Splits
from selfdistill.data.splits import SPLITS

_BATCH = 4096  # samples that wait for a thread at a time


def beside(folder: Path, packed: set[str], wanted: depth.Range | str | None) -> depth.Range | None:
    """The range of the splits that stay as they are: all of a set have one.

    Args:
        folder: The data set's.
        packed: The splits that are made now.
        wanted: From `depth.parse`.

    Raises:
        UserError: Another one is asked for.
    """
    for split in SPLITS:
        if split in packed or not (folder / split / manifest.FILE).is_file():
            continue
        span = manifest.Manifest.load(str(folder / split)).span
        if span is not None and isinstance(wanted, tuple) and wanted != span:
            raise UserError(
                f"--range {wanted[0]:g},{wanted[1]:g}: {folder / split} has the range"
                f" {span[0]:g},{span[1]:g}: leave the option out, or pack all splits together"
            )
        if span is not None:
            return span
    return None


def same_fit(folder: Path, packed: set[str], how: fitting.Fit) -> None:
    """All splits of a set are fitted alike.

    Args:
        folder: The data set's.
        packed: The splits that are made now.
        how: They are fitted.

    Raises:
        UserError: Those that stay as they are were fitted in another way.
    """
    for split in SPLITS:
        if split in packed or not (folder / split / manifest.FILE).is_file():
            continue
        theirs = fitting.of(manifest.Manifest.load(str(folder / split)).image)
        if theirs != how:
            raise UserError(
                f"--fit {how}: {folder / split} was packed with --fit {theirs}: give the same, or"
                " pack all splits together"
            )


def find(
    splits: Splits,
    folder: Path,
    replaced: set[str],
    wanted: depth.Range | str | None,
    chosen: channels.Channels | None,
    progress: Progress,
) -> tuple[depth.Range | None, str]:
    """The range of what is to be packed, and a line about it ("" for none).

    Args:
        splits: What is packed.
        folder: The data set's, where other splits may lie.
        replaced: Those that do not stay there.
        wanted: From `depth.parse`.
        chosen: From `channels.parse`.
        progress: Where to show how far it is.

    Raises:
        UserError: The pictures are blank, or another range is asked for than the other splits have.
    """
    span = beside(folder, replaced, wanted)
    if span is not None:
        return span, f"range {span[0]:.10g} to {span[1]:.10g}, that of the other splits"
    if isinstance(wanted, tuple):
        return wanted, ""
    if scored.classes() is not None:  # each file by itself, as launcher.predict shows it
        return None, ""
    values = functools.partial(values_of, chosen=chosen)
    samples = list(itertools.chain.from_iterable(part for part, _ in splits.values()))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        try:
            found: list[depth.Seen] = []
            task = progress.add_task("range", total=len(samples))
            for at in range(0, len(samples), _BATCH):
                batch = samples[at : at + _BATCH]
                found += [one for one in pool.map(values, batch) if one is not None]
                progress.advance(task, len(batch))
            progress.remove_task(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return depth.choose(wanted, depth.joined(found) if found else None)
