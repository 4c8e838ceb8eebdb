"""The windows of a run's long texts: counted once, kept in the run's folder (`windows/`)."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import records
from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.files import fresh, fsync
from selfdistill.data.formats.texts import parse
from selfdistill.data.loading import windows
from selfdistill.data.loading.reader import Reader
from selfdistill.data.loading.windows import Windows
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.models.texts.tokenizer import tokenizer_hash
from selfdistill.engine.runtime.distributed import main_only

FOLDER = "windows"

#: Bytes of shards that are counted between two boundaries, at which the ranks may leave.
_PORTION = 2**24
#: Texts of a large split by which the bytes of a window are chosen: so many in a row, in so many
#: places, since each place of a remote set is a shard to fetch.
_IN_A_ROW, _PLACES = 64, 8
#: Tokens of a word on average, beyond which it is none.
_LONGEST_WORD = 8


class _Counted(records.Record):
    """KEY.json, which is written when KEY.npy is whole."""

    long: records.Count
    places: records.Count
    looked_at: records.Count
    tokens: records.Count
    left_out: records.Count


def _check_words(run: Run, manifest: Manifest, tokenizer: Any) -> None:
    """Refuses words that are whole texts to the tokenizer, as in Chinese, which has no spaces.

    Masked as a whole, most texts would have no masked token, and some no other.

    Raises:
        UserError: says so, by the first texts.
    """
    data, tokens, words = run.config.data, 0, 0
    reader = Reader(manifest, data.cache_dir, data.cache_gb)
    for sample in range(min(_IN_A_ROW, manifest.samples)):
        try:
            record = reader.record(sample)
            text = parse(record.input, record.name, manifest.text["stored"]).text
        except BrokenData:
            continue
        found = tokenizer(text, add_special_tokens=False, verbose=False).word_ids()
        tokens, words = tokens + len(found), words + len(set(found))
    reader.close()
    if tokens > _LONGEST_WORD * words:
        raise UserError(
            f"--mlm.whole_word true: words of {manifest.root} have {tokens / words:.0f} tokens on"
            " average: the tokenizer does not tell them apart, as of languages without spaces:"
            " leave it out"
        )


def windows_of(
    run: Run, manifest: Manifest, tokenizer: Any, max_length: int, special: int
) -> Windows | None:
    """The windows of a split; None where each text is one. Every rank calls it.

    A count that the run's folder has is taken again, so that a resumed run has the same samples.

    Args:
        run: the launch.
        manifest: the split.
        tokenizer: of transformers.
        max_length: tokens of a window.
        special: how many of them are special.

    Raises:
        UserError: `--text.overlap` leaves no room; the count in the folder is broken.
        Preempted: the ranks leave while texts are counted.
    """
    settings = run.config.text
    if run.config.mlm.whole_word:
        main_only(run.ranks, lambda: _check_words(run, manifest, tokenizer))
    if not settings.split or manifest.text.get("pairs"):
        return None
    most = (max_length - special) // 2
    if settings.overlap > most:
        raise UserError(
            f"--text.overlap {settings.overlap}: windows have {max_length} tokens: give at most"
            f" {most}"
        )
    room = max_length - special - settings.overlap

    def starts(text: str) -> list[int]:
        offsets = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        found = tokenizer(text, add_special_tokens=False, verbose=False, **offsets)
        if not offsets:  # then how many there are is all that is asked for
            return [0] * len(found["input_ids"])
        return [begin for begin, _ in found["offset_mapping"]]

    def kept() -> tuple[Path, bool]:
        content = [manifest.hash, room, tokenizer_hash(tokenizer)]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        file = run.folder / FOLDER / f"{key[:16]}.json"
        return file, file.exists()

    file, counted = main_only(run.ranks, kept)
    table = file.with_suffix(".npy")
    if not counted:
        size = sum(shard.bytes for shard in manifest.shards)
        if size <= windows.EXACT and tokenizer.is_fast:
            _count(run, manifest, starts, room, file)
        else:
            main_only(run.ranks, lambda: _estimate(run, manifest, starts, room, file))
    cure = f"delete {file.parent} to count the windows anew"
    record = main_only(run.ranks, lambda: records.read_object(file))
    found = records.checked(_Counted, record, file, cure)
    if not found.long:
        return None
    try:
        size = 3 * found.long + found.places
        made = Windows(records.read_table(table, np.int64, (size,), cure), found.long, manifest)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{table} is missing, or of another split ({error}): {cure}") from None
    share = f"about {100 * found.left_out / max(1, found.tokens):.2f}%, by their bytes"
    left = f"{share} (looked at {found.looked_at} texts)" if found.looked_at else found.left_out
    run.info_once(
        f"{manifest.root}: {manifest.samples} texts, {found.long} of them long, make"
        f" {made.samples} windows of at most {max_length} tokens; tokens left out: {left}"
    )
    return made


def _count(run: Run, manifest: Manifest, starts: windows.Starts, room: int, file: Path) -> None:
    """Finds the windows of every text of a split."""
    texts: list[int] = []
    parts: list[int] = []
    places: list[int] = []
    left_out, reported = 0, time.monotonic()

    def count(first: int, last: int) -> None:
        nonlocal left_out
        for number, text, _ in _texts(run, manifest, range(first, last)):
            if len(text) * 4 <= room:  # a character has four bytes at most, a token one at least
                continue
            found, over = windows.fitting(text, starts, room)
            left_out += over
            if len(found) > 1:
                texts.append(number)
                parts.append(len(found))
                places.extend(found)

    def keep() -> None:
        table = windows.table_of(np.array(texts, np.int64), np.array(parts, np.int64), places)
        counted = _Counted(
            long=len(texts), places=len(places), looked_at=0, tokens=0, left_out=left_out
        )
        _keep(table, counted, file)

    step = max(1, manifest.samples * _PORTION // max(1, sum(s.bytes for s in manifest.shards)))
    for first in range(0, manifest.samples, step):
        run.boundary(f"{manifest.root}: counting windows")
        last = min(first + step, manifest.samples)
        main_only(run.ranks, functools.partial(count, first, last))
        if time.monotonic() - reported > 10:
            run.info(f"{manifest.root}: windows counted of {100 * last // manifest.samples}%")
            reported = time.monotonic()
    main_only(run.ranks, keep)


def _estimate(run: Run, manifest: Manifest, starts: windows.Starts, room: int, file: Path) -> None:
    """Counts windows by bytes, whose number a sample of texts tells."""
    runs = np.linspace(0, max(0, manifest.samples - _IN_A_ROW), _PLACES).astype(np.int64)
    chosen = np.unique(np.add.outer(runs, np.arange(_IN_A_ROW)))
    sample = list(_texts(run, manifest, chosen[chosen < manifest.samples]))
    sizes, numbers = [s for *_, s in sample], [len(starts(text)) for _, text, _ in sample]
    each = windows.budget(sizes, numbers, room)
    left_out = 0
    for (_, text, _), parts in zip(sample, windows.parts_of(np.array(sizes), each), strict=True):
        pieces = [windows.Window(0, i, int(parts), None).pieces(text)[1] for i in range(parts)]
        left_out += sum(max(0, len(starts(piece)) - room) for piece in pieces)
    table, long = windows.by_bytes(manifest, each)
    counted = _Counted(
        long=long, places=0, looked_at=len(sample), tokens=sum(numbers), left_out=left_out
    )
    _keep(table, counted, file)


def _texts(run: Run, manifest: Manifest, chosen: Any) -> Iterator[tuple[int, str, int]]:
    """Number, text and bytes of some texts; those that are broken are the loader's to report."""
    config = run.config.data
    reader = Reader(manifest, config.cache_dir, config.cache_gb)
    for number in chosen:
        run.watchdog.beat()
        try:
            record = reader.record(int(number))
            text = parse(record.input, record.name, manifest.text["stored"]).text
        except BrokenData:
            continue
        yield int(number), text, len(record.input)
    reader.close()


def _keep(table: NDArray[np.int64], counted: _Counted, file: Path) -> None:
    """Writes the table, then the record."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".npy.tmp")
    with fresh(draft, "wb") as handle:
        np.save(handle, table)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(draft, file.with_suffix(".npy"))
    fsync(file.parent)
    write_text(file, json.dumps(counted.model_dump(), indent=1) + "\n")
