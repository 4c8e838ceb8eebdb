"""Checkpoints of a DeepSpeed engine: atomic, verified, the last k kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data.errors import UserError
from engine.distributed import Ranks, barrier, broadcast, main_only


@dataclass
class State:
    """All that a resumed stage must know beside the engine's tensors. A plain record.

    Attributes:
        step: optimiser steps taken; the stream position is `step * batch`.
        position: stream position of the next sample.
        config: what must be equal at resume (see `engine.stages`).
        manifest: hash of the train split's manifest.
        world: number of ranks.
        files: name -> [size, sha256] of the engine's files.
        seconds: spent on the stage so far, over all launches.
    """

    step: int
    position: int
    config: dict[str, Any]
    manifest: str
    world: int
    version: int = 1
    files: dict[str, list[Any]] = field(default_factory=dict)
    seconds: float = 0.0


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Forces a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: temporary, fsynced, renamed."""
    draft = path.with_name(f".{path.name}.tmp")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    fsync(path.parent)


class Checkpoints:
    """The folder `checkpoints/` of one stage."""

    def __init__(self, folder: Path, ranks: Ranks, keep: int = 2) -> None:
        self.folder, self.ranks, self.keep = folder, ranks, keep

    def names(self) -> list[str]:
        """Names of the saved steps, oldest first."""
        found = [p.name for p in self.folder.glob("step-*") if p.is_dir()]
        return sorted(found, key=lambda n: int(n.removeprefix("step-")))

    def save(self, engine: Any, state: State) -> None:
        """Saves engine and state as `step-N`; `latest` moves last. All ranks call it.

        Raises:
            UserError: the disk refuses; the checkpoints before stay as they are.
        """
        name = f"step-{state.step:08d}"
        draft = self.folder / f".draft-{name}"

        def clear() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir()

        main_only(self.ranks, clear)
        error = None
        try:
            engine.save_checkpoint(str(draft), tag=name, save_latest=False)
        except (OSError, RuntimeError) as caught:
            # torch's zip writer reports a full disk as a RuntimeError.
            error = f"{draft}: checkpoint not saved: {caught}; free space, then run again"
        errors = [e for e in _gather(error) if e]
        if errors:
            if self.ranks.main:
                shutil.rmtree(draft, ignore_errors=True)
            raise UserError(str(errors[0]).splitlines()[0])

        def publish() -> None:
            inner = draft / name
            files = sorted(p for p in inner.rglob("*") if p.is_file())
            state.files = {str(p.relative_to(inner)): [p.stat().st_size, sha256(p)] for p in files}
            for path in files:
                fsync(path)
            write_text(inner / "state.json", json.dumps(asdict(state), indent=1))
            final = self.folder / name
            shutil.rmtree(final, ignore_errors=True)
            os.replace(inner, final)
            shutil.rmtree(draft)
            fsync(self.folder)
            write_text(self.folder / "latest", name)
            for old in self.names()[: -self.keep]:
                shutil.rmtree(self.folder / old)

        main_only(self.ranks, publish)

    def _check(self, name: str) -> tuple[State | None, str]:
        """The state of a saved step, or None and what is wrong with it."""
        folder = self.folder / name
        try:
            state = State(**json.loads((folder / "state.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            return None, f"state.json: {error}"
        for file, (size, digest) in state.files.items():
            path = folder / file
            if not path.is_file():
                return None, f"{file} is missing"
            if path.stat().st_size != size or sha256(path) != digest:
                return None, f"{file} is not what was written"
        return state, ""

    def newest(self) -> tuple[str, State] | None:
        """The newest whole checkpoint; broken ones are passed over with a warning."""

        def find() -> tuple[str, State] | None:
            for name in reversed(self.names()):
                state, fault = self._check(name)
                if state is not None:
                    return name, state
                print(f"warning: {self.folder / name}: {fault}; skipped", file=sys.stderr)
            return None

        found: tuple[str, State] | None = broadcast(find() if self.ranks.main else None)
        return found

    def load(self, engine: Any, config: Mapping[str, Any], manifest: str) -> State | None:
        """Restores the newest whole checkpoint, if there is one. All ranks call it.

        Args:
            engine: the DeepSpeed engine, built as it was.
            config: what must be equal to the checkpoint's.
            manifest: hash of the train split now.

        Raises:
            UserError: it belongs to another configuration, data set or number of ranks.
        """
        found = self.newest()
        if found is None:
            return None
        name, state = found
        where = f"{self.folder / name}"
        cure = "give the same options, or --overwrite to start the stage again"
        for key in sorted(state.config.keys() | config.keys()):
            old, new = state.config.get(key), config.get(key)
            if old != new:
                raise UserError(f"{where} was made with {key} = {old}, now it is {new}: {cure}")
        if state.manifest != manifest:
            raise UserError(f"{where} was made on other data (its manifest's hash differs): {cure}")
        if state.world != self.ranks.world:
            raise UserError(
                f"{where} was made with {state.world} ranks, now there are {self.ranks.world}: "
                f"resume with {state.world}, or --overwrite to start the stage again"
            )
        engine.load_checkpoint(str(self.folder), tag=name)
        barrier()
        return state


def _gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    if dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box
