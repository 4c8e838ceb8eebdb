"""The frozen teacher: replicated, sharded, or cached as a table of its features."""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from selfdistill.data import records
from selfdistill.data.errors import TryAgain, UserError
from selfdistill.data.files import fresh, fsync
from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.loader import Sequential
from selfdistill.data.loading.windows import Windows
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.runtime.allocator import release
from selfdistill.engine.runtime.distributed import Ranks, gather, main_only, sent, total
from selfdistill.engine.runtime.precision import autocast
from selfdistill.engine.runtime.zero import inference_config
from selfdistill.engine.training.objectives import FeatureExtractor

Module = TypeVar("Module", bound=nn.Module)


class Teacher(Protocol):
    """Gives the features of a batch."""

    mode: Literal["replicated", "sharded", "cached"]

    def close(self) -> None:
        """Gives its memory back."""
        ...

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Features fp32 [B, D] or [B, 1+K, D] of a loader's batch, on the device."""
        ...


class Replicated:
    """A whole frozen copy on each rank."""

    mode: Literal["replicated", "sharded", "cached"] = "replicated"

    def __init__(
        self,
        extractor: FeatureExtractor,
        names: tuple[str, ...],
        ranks: Ranks,
        dtype: torch.dtype,
    ) -> None:
        self.extractor = frozen(extractor, ranks.device, dtype)
        self.names, self.device, self.dtype = names, ranks.device, dtype

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """See `Teacher`."""
        with autocast(self.device, self.dtype):
            features: Tensor = self.extractor(**view(batch, self.names, self.device))
        return features

    def close(self) -> None:
        """See `Teacher`: it goes with its last reference."""


class Sharded:
    """A ZeRO-3 inference engine: each rank holds a part of every parameter."""

    mode: Literal["replicated", "sharded", "cached"] = "sharded"

    def __init__(
        self,
        extractor: FeatureExtractor,
        names: tuple[str, ...],
        ranks: Ranks,
        precision: str,
    ) -> None:
        import deepspeed

        self.engine, *_ = deepspeed.initialize(
            model=extractor, config=inference_config(ranks.world, precision)
        )
        self.engine.eval()
        self.names, self.device = names, ranks.device

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """See `Teacher`."""
        features: Tensor = self.engine(**view(batch, self.names, self.device))
        return features

    def close(self) -> None:
        """See `Teacher`."""
        release(self.engine)


class Cached:
    """A table of the features of every sample, computed once before step 0.

    Exact, because stage 2's full view is deterministic (no augmentation). The table is a plain
    float32 `.npy`, memory-mapped; row = sample id of the manifest. The row of a sample that was
    skipped as broken is NaN: training skips that sample as well.
    """

    mode: Literal["replicated", "sharded", "cached"] = "cached"

    def __init__(self, table: np.ndarray, device: torch.device, folder: Path) -> None:
        self.table, self.device, self.folder = table, device, folder

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """See `Teacher`.

        Raises:
            UserError: a sample was broken when the table was made and is not any more.
        """
        rows = torch.from_numpy(np.ascontiguousarray(self.table[batch["ids"].numpy()]))
        missing = rows.flatten(1).isnan().all(dim=1)
        if missing.any():
            sample = int(batch["ids"][missing][0])
            raise UserError(
                f"sample {sample} can be read now and has no features in {self.folder}, where it"
                " was skipped as broken: delete that folder to compute them anew"
            )
        return sent(rows, self.device)

    def close(self) -> None:
        """See `Teacher`: a file's pages are the system's."""


def frozen(module: Module, device: torch.device, dtype: torch.dtype) -> Module:
    """A module for forward passes alone, in the numbers of a student's pass.

    What autocast would round at each pass, weights of linear and convolutional layers, is rounded
    once; under fp16 all is, as DeepSpeed has it.

    Args:
        module: in fp32; changed in place.
        device: where it goes.
        dtype: of its matrix products.
    """
    module.to(device).eval().requires_grad_(False)
    if dtype == torch.float16:
        return module.half()
    embeddings = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    tied = {weight for part in embeddings for weight in part.parameters()}  # a head may share it
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and part.weight not in tied:
            part.to(dtype)
    return module


def view(
    batch: dict[str, Tensor], names: tuple[str, ...], device: torch.device
) -> dict[str, Tensor]:
    """Some entries of a batch, on the device; those that it lacks are left out."""
    return {k: sent(batch[k], device) for k in names if k in batch}


def table_bytes(samples: int, shape: tuple[int, ...]) -> int:
    """Size of the feature table in bytes (fp32)."""
    return 4 * samples * int(np.prod(shape))


def choose(mode: str, bytes_needed: int | None, config: Config, folder: Path) -> str:
    """Resolves `auto`: cached if the table fits the limit and half the free disk, else replicated.

    Stage 2 has no random view, so that a table is always exact.

    Args:
        mode: auto, replicated, sharded or cached.
        bytes_needed: size of the table; None where features differ in size between samples.
        config: of the run.
        folder: of the table.

    Raises:
        UserError: `cached` was asked for and the disk has no room, or there can be no table.
    """
    if bytes_needed is None:
        if mode == "cached":
            raise UserError(
                "--teacher.mode cached: all tokens of texts, which differ in length, make no table:"
                " take --teacher.mode replicated, or --distill.feature cls or mean"
            )
        return "replicated" if mode == "auto" else mode
    if mode == "auto" and ((folder / "table.json").exists() or (folder / "parts.json").exists()):
        return "cached"  # as it began: the table itself takes the room that is looked for below
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    parts = sum(part.stat().st_size for part in folder.glob("rows-*.npy"))
    most = 2 * bytes_needed - parts  # when they are joined
    if mode == "cached" and most > free and not (folder / "table.json").exists():
        raise UserError(
            f"{folder}: the feature table needs {bytes_needed / 2**30:.1f} GiB, twice that until it"
            f" is whole; {free / 2**30:.1f} GiB are free: free {(most - free) / 2**30:.1f} GiB, or"
            " take --teacher.mode replicated"
        )
    if mode != "auto":
        return mode
    fits = bytes_needed <= config.teacher.table_gb * 2**30 and bytes_needed <= free / 2
    return "cached" if fits else "replicated"


#: Samples of a forward pass of the table: fixed, so that the table is the same for all layouts. On
#: a GPU more, where a part has as many.
_BATCH, _LARGE_BATCH = 64, 256
#: A part of the table is at most so many rows; an interrupted pass loses one part a rank.
_PART = 4096
#: Parts, 4 GiB at most, that are joined between two collectives: the other ranks wait in these, and
#: for half an hour at most.
_JOINED = 64


def build_table(
    run: Run,
    folder: Path,
    key: dict[str, Any],
    manifest: Manifest,
    windows: Windows | None,
    codec: Codec,
    teacher: Callable[[dict[str, Tensor]], Tensor],
    shape: tuple[int, ...],
) -> Cached:
    """Opens the table of `key`, computing it first if it is not there.

    The set is cut into parts that do not depend on the number of ranks. A rank computes every
    world-th of those that are missing, each into a file of its own; rank 0 joins them, fsyncs and
    renames. `table.json` holds the key (manifest, teacher, view) and comes last. A pass that was
    interrupted goes on, on any number of ranks.

    Raises:
        UserError: a table is there but belongs to another teacher, data set or view; broken data.
        Preempted: the ranks leave between two parts.
    """
    file, ranks, samples = folder / "features.npy", run.ranks, (windows or manifest).samples
    state = main_only(ranks, lambda: _read_key(folder / "table.json"))
    if state is not None:
        wrong = [k for k in key if state.get(k) != key[k]]
        if wrong or not file.exists():
            names = {"manifest": "data set"}
            what = names.get(wrong[0], wrong[0]) if wrong else "file"
            raise UserError(
                f"{folder}: the cached features were made with another {what}: delete that folder "
                "to compute them anew, or give the teacher and data they were made with"
            )
        return Cached(_open(file, samples, shape), ranks.device, folder)

    row = table_bytes(1, shape)
    size = max(1, min(_PART, 2**26 // row, max(_BATCH // 2, -(-samples // 64))))
    spans = [(a, min(a + size, samples)) for a in range(0, samples, size)]
    missing = main_only(ranks, lambda: _prepare(folder, key, spans))
    _compute(run, folder, manifest, windows, codec, teacher, shape, missing)
    _join(run, folder, key, spans, (samples, *shape))
    return Cached(_open(file, samples, shape), ranks.device, folder)


def _read_key(path: Path) -> dict[str, Any] | None:
    """A key that was written; None where there is none."""
    try:
        return records.read_object(path)
    except FileNotFoundError:
        return None
    except TryAgain:
        raise
    except UserError:
        return {"unreadable": True}


def _part(folder: Path, span: tuple[int, int]) -> Path:
    return folder / f"rows-{span[0]}-{span[1]}.npy"


def _prepare(
    folder: Path, key: dict[str, Any], spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Keeps the parts that an interrupted pass of this key left; says which are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    known = _read_key(folder / "parts.json")
    if known != key:
        for left in folder.glob("*rows-*"):
            left.unlink()
        write_text(folder / "parts.json", json.dumps(key, indent=1))
    return [span for span in spans if not _part(folder, span).exists()]


def _compute(
    run: Run,
    folder: Path,
    manifest: Manifest,
    windows: Windows | None,
    codec: Codec,
    teacher: Callable[[dict[str, Tensor]], Tensor],
    shape: tuple[int, ...],
    missing: list[tuple[int, int]],
) -> None:
    """Computes the missing parts of the table. Every rank calls it."""
    ranks, name = run.ranks, folder.parent.name
    mine = missing[ranks.rank :: ranks.world]
    size = _BATCH
    if ranks.device.type == "cuda" and missing:
        size = max(_BATCH, min(_LARGE_BATCH, missing[0][1] - missing[0][0]))
    passed = Sequential(
        manifest,
        batch=size,
        spans=mine,
        **run.reading(codec, windows),
    )
    batches, reported = iter(passed), time.monotonic()
    rounds = -(-len(missing) // ranks.world)
    try:
        for number in range(rounds):
            run.boundary(f"{name}: teacher features, part {number + 1} of {rounds}", wait=True)
            if time.monotonic() - reported > 10:
                run.info(f"{name}: teacher features {100 * number // rounds}%")
                reported = time.monotonic()
            error = None
            try:
                if number < len(mine):
                    first, last = mine[number]
                    # The row of a broken sample stays NaN.
                    rows = np.full((last - first, *shape), np.nan, np.float32)
                    found: list[Tensor] = []  # on the device, whose work the host runs ahead of
                    ids, valid = [], []
                    for _ in range(-(-(last - first) // size)):
                        batch = next(batches)
                        found.append(teacher(batch))
                        ids.append(batch["ids"])
                        valid.append(batch["valid"])
                        run.watchdog.beat()
                    counts = torch.cat(valid)
                    places = torch.cat(ids)[counts].numpy() - first
                    rows[places] = torch.cat(found).cpu().numpy()[counts.numpy()]
                    _save_part(_part(folder, mine[number]), rows)
            except UserError as caught:
                error = caught
            # What one rank meets, all leave for: the others would wait for it.
            for met in gather(error):
                if met is not None:
                    raise met
    finally:
        passed.close()
    passed.tolerate(int(total(torch.tensor(len(passed.broken), device=ranks.device))))


def _save_part(part: Path, rows: np.ndarray) -> None:
    draft = part.with_name(f".{part.name}.tmp")
    with fresh(draft, "wb") as file:
        np.save(file, rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, part)


def _join(
    run: Run,
    folder: Path,
    key: dict[str, Any],
    spans: list[tuple[int, int]],
    shape: tuple[int, ...],
) -> None:
    """Rank 0 makes the table of its parts. Every rank calls it."""
    draft = folder / ".features.npy.tmp"

    def begin() -> None:
        draft.unlink(missing_ok=True)  # no link that somebody left there is written through
        np.lib.format.open_memmap(draft, "w+", np.float32, shape)

    def copy(some: list[tuple[int, int]]) -> None:
        table = np.lib.format.open_memmap(draft, "r+")
        for first, last in some:
            table[first:last] = _open(_part(folder, (first, last)), last - first, shape[1:])
            run.watchdog.beat()
        table.flush()  # now: all of it at the end could take as long as the copy

    def finish() -> None:
        fsync(draft)
        os.replace(draft, folder / "features.npy")
        write_text(folder / "table.json", json.dumps(key, indent=1))
        for left in (*(_part(folder, span) for span in spans), folder / "parts.json"):
            left.unlink(missing_ok=True)

    main_only(run.ranks, begin)
    for at in range(0, len(spans), _JOINED):
        main_only(run.ranks, functools.partial(copy, spans[at : at + _JOINED]))
    main_only(run.ranks, finish)


def _open(file: Path, samples: int, shape: tuple[int, ...]) -> np.ndarray:
    cure = "delete its folder to compute the features anew"
    return records.read_table(file, np.float32, (samples, *shape), cure)
