"""Checkpoints of a stage: whole tensors, atomic, verified, the last k kept, for any layout.

`checkpoints/step-00001000/` holds `part-00000-of-00004.safetensors` and so on, the shares of the
ranks that wrote it (see `training_state`), and `state.json`, which names each file's size and
sha256. It is written as `.draft-...`, forced to the disk and renamed; `latest` comes last and is
for people: what counts is the newest folder whose files are what was written. Nothing in it is
unpickled: safetensors and JSON hold data alone.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfdistill.data import records
from selfdistill.data.cli import format_error
from selfdistill.data.errors import TryAgain, UserError, printable
from selfdistill.data.files import fsync
from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.checkpoints.files import remove, sha256, write_text
from selfdistill.engine.checkpoints.results import numbered
from selfdistill.engine.checkpoints.state import VERSION, State, Written, differing, in_words
from selfdistill.engine.runtime.distributed import Ranks, broadcast, gather, main_only
from selfdistill.engine.runtime.failures import refused

#: What a rank wrote: its file's name, size and sha256; and what went wrong, or None.
_Share = tuple[list[Any], UserError | None]


class _Pending(NamedTuple):
    """A checkpoint on its way to the disk."""

    state: State
    draft: Path
    written: Future[_Share]


def _write(tensors: dict[str, Tensor], part: Path) -> _Share:
    """Writes a rank's share, forced to the disk."""
    try:
        save_file(tensors, part)
        fsync(part)
        return [part.name, part.stat().st_size, sha256(part)], None
    except (OSError, SafetensorError) as caught:
        reason = format_error(caught).rsplit("error: ", 1)[-1]  # safetensors names two layers
        line = f"{part.parent}: checkpoint not saved: {reason}; free space, or give it back its"
        line += " permissions, then launch again: it goes on from the one before"
        return [], refused(caught, line)


def _give_way() -> None:
    """Lets a thread that writes run where those that train leave a core: on Linux each has its own.

    A writer that took a core of two for a second would hold up a step by as much.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def read_state(path: Path, name: str) -> tuple[State | None, str]:
    """The record of a saved step, or None and what is wrong with it.

    Args:
        path: of the record.
        name: of the step, as its folder has it.

    Raises:
        UserError: it is of another format.
        TryAgain: the file system fails.
    """
    try:
        content = records.read_object(path)
        if content.get("version") == VERSION:
            records.checked(Written, content, path)
    except FileNotFoundError:
        return None, f"{path.name} is missing"
    except TryAgain:
        raise
    except UserError as error:
        return None, format_error(error).removeprefix(f"{path.parent}/")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path.parent} has format version {content.get('version')!r}, this program"
            f" reads {VERSION}: go on with the program that wrote it, or --overwrite starts it"
            " anew"
        )
    state = State(**content)
    whole = state.digest == state.content_digest() and name == f"step-{state.step:08d}"
    return (state, "") if whole else (None, f"{path.name} is not what was written")


class Checkpoints:
    """The folder `checkpoints/` of one stage.

    Args:
        folder: made when the first one is saved.
        ranks: who takes part; every one makes the same calls.
        keep: how many are kept.
        beat: called while long work goes on.

    Attributes:
        shared: those on the disk that all nodes share: these, unless a subclass has others.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, keep: int = 2, beat: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.ranks, self.keep, self.beat = folder, ranks, keep, beat
        self.shared: Checkpoints = self
        self._saved = 0
        self._pool = ThreadPoolExecutor(1, "checkpoint", _give_way)
        self._pending: _Pending | None = None
        self._buffers: dict[str, Tensor] = {}

    def names(self) -> list[str]:
        """Names of the saved steps, oldest first."""
        return [path.name for path in numbered(self.folder, "step-").values()]

    def save(self, engine: Any, state: State, *, wait: bool = True) -> None:
        """Saves engine and state as `step-N`. Every rank calls it; a step is saved once.

        Args:
            engine: copied to the host's memory before this returns.
            state: copied, too.
            wait: for the disk. Else a thread writes while the steps go on, and the checkpoint does
                not count before a later `settle`, or the next save.

        Raises:
            UserError: the disk refuses; the checkpoints before stay as they are. TryAgain, where
                that may be over at the next launch.
        """
        self._settle(wait=True)
        if state.step in (0, self._saved):
            return
        draft = self._begin(f"step-{state.step:08d}")
        rank, world = self.ranks.rank, self.ranks.world
        buffers = None if wait else self._buffers  # which are free: what was in them is written
        tensors = training_state.collect(engine, rank, world, self.beat, buffers)
        saved = copy.deepcopy(state)
        saved.world, saved.optimizer = world, training_state.numbers(engine, rank)
        part = draft / f"part-{rank:05d}-of-{world:05d}.safetensors"
        if wait:
            written: Future[_Share] = Future()
            written.set_result(_write(tensors, part))
        else:
            written = self._pool.submit(_write, tensors, part)
        self._pending = _Pending(saved, draft, written)
        del tensors
        self.beat()
        if wait:
            self._settle(wait=True)

    def settle(self, *, wait: bool = True) -> None:
        """Makes a checkpoint count that is written, on all ranks. Every rank calls it.

        Args:
            wait: for the threads that write; else what they have not finished is left for later.

        Raises:
            UserError: see `save`.
        """
        self._settle(wait=wait)

    def _settle(self, *, wait: bool) -> None:
        if self._pending is None:
            return
        if not wait and not all(gather(self._pending.written.done())):
            return
        state, draft, written = self._pending
        self._pending = None
        written_by = gather(written.result())
        self.beat()
        if errors := [error for _, error in written_by if error]:
            if self.ranks.main:
                shutil.rmtree(draft, ignore_errors=True)
            raise errors[0]
        state.files = {file: [size, digest] for (file, size, digest), _ in written_by}
        state.digest = state.content_digest()
        self._publish(draft, state)
        self._saved = state.step

    def _begin(self, name: str) -> Path:
        """The folder into which the ranks write their shares. Every rank calls it."""
        draft = self.folder / f".draft-{name}"

        def clear() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".draft-*"):
                remove(left)
            draft.mkdir()

        main_only(self.ranks, clear)
        return draft

    def _publish(self, draft: Path, state: State) -> None:
        """Makes what all ranks have written count. Every rank calls it."""
        main_only(self.ranks, lambda: self._rename(draft, state))

    def _rename(self, draft: Path, state: State) -> None:
        write_text(draft / "state.json", json.dumps(state.content(), indent=1))
        name = draft.name.removeprefix(".draft-")
        final = self.folder / name
        # Of this step or later ones there are at most broken ones, or they would have been resumed.
        for old in self.names():
            if int(old.removeprefix("step-")) >= state.step:
                aside = self.folder / f"broken-{old}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.folder / old, aside)
        os.replace(draft, final)
        fsync(self.folder)
        write_text(self.folder / "latest", name)
        for old in self.names()[: -self.keep]:
            shutil.rmtree(self.folder / old)
        for left in self.folder.glob(".draft-*"):
            remove(left)

    def _read_state(self, name: str) -> tuple[State | None, str]:
        """The record of a saved step, or None and what is wrong with it."""
        return read_state(self.folder / name / "state.json", name)

    def _fault(self, folder: Path, state: State, mine: Sequence[str]) -> str:
        """What is wrong with the files; each rank hashes its share of them. Every rank calls it."""
        fault, failure = "", ""
        for file in mine:
            path, (size, digest) = folder / file, state.files[file]
            try:
                if path.stat().st_size != size or sha256(path) != digest:
                    fault = f"{file} is not what was written"
            except FileNotFoundError:
                fault = f"{file} is missing"
            except TryAgain as error:  # of the file system, not of the checkpoint
                failure = str(error).removesuffix(": launch again")
            except UserError:
                fault = f"{file} is no regular file"
            except OSError as error:  # as above, of stat and read
                failure = f"{path}: {error.strerror}"
            self.beat()
        found = gather((fault, failure))
        for _, failure in found:
            if failure:
                raise TryAgain(f"a checkpoint cannot be read: {failure}: launch again")
        return next((fault for fault, _ in found if fault), "")

    def newest(self) -> tuple[Path, State] | None:
        """The newest whole checkpoint; broken ones are passed over with a warning.

        Raises:
            UserError: there are some, and none is whole; one is of another format.
            TryAgain: the file system fails.
        """
        names: list[str] = broadcast(self.names() if self.ranks.main else None)
        for name in reversed(names):
            if (state := self.whole(name)) is not None:
                return self.folder / name, state
        if names:
            raise self.none_whole(names)
        return None

    def whole(self, name: str) -> State | None:
        """The record of a saved step, or None, with a warning, where it is broken. All call it."""
        state: State | None
        state, fault = main_only(self.ranks, functools.partial(self._read_state, name))
        if state is not None:
            mine = sorted(state.files)[self.ranks.rank :: self.ranks.world]
            fault = self._fault(self.folder / name, state, mine)
        if fault:
            self.warn(f"{self.folder / name}: {fault}; skipped")
        return None if fault else state

    def warn(self, line: str) -> None:
        """Prints a line on rank 0."""
        if self.ranks.main:
            print(printable(f"warning: {line}"), file=sys.stderr)

    def none_whole(self, names: Sequence[str]) -> UserError:
        """What to say where there are checkpoints, and all are broken."""
        return UserError(
            f"{self.folder}: none of {len(names)} checkpoints is whole: put one back, or"
            " --overwrite starts the stage again"
        )

    def clear(self) -> None:
        """Deletes what is of no more use once the stage is complete. Every rank calls it."""

    def reader(self, found: tuple[Path, State]) -> Callable[[str], Tensor]:
        """Gives the tensors of what `find` found, by name. Every rank calls both, in step.

        Raises:
            UserError: a file is not safetensors; TryAgain: the file system fails.
        """
        return Reader(*found)

    def find(self, config: Mapping[str, Any], manifest: str) -> tuple[Path, State] | None:
        """The checkpoint to go on from, if there is one. Every rank calls it.

        Args:
            config: what must be equal to the checkpoint's; number of ranks, ZeRO stage and
                accumulation may differ.
            manifest: hash of the train split now.

        Raises:
            UserError: it belongs to another configuration or data set.
        """
        found = self.newest()
        if found is None:
            return None
        where, state = found
        cure = "give the same options, or --overwrite to start the stage again"
        for key, old, new in differing(state.config, config):
            raise UserError(f"{where} was {in_words(key, old, new)}: {cure}")
        if state.manifest != manifest:
            raise UserError(f"{where} was made on other data (its manifest's hash differs): {cure}")
        self.resumed(state.step)
        return found

    def resumed(self, step: int) -> None:
        """A launch goes on from a step, which is saved already."""
        self._saved = step


class Reader:
    """Gives the tensors of a checkpoint by name, each read when it is asked for.

    Args:
        folder: of the checkpoint.
        state: its record.

    Raises:
        UserError: a file is not safetensors; TryAgain: the file system fails.
    """

    def __init__(self, folder: Path, state: State) -> None:
        self.folder = folder
        self._files: dict[str, Any] = {}
        try:
            for file in state.files:
                opened = safe_open(folder / file, framework="pt")
                self._files |= dict.fromkeys(opened.keys(), opened)
        except (OSError, SafetensorError) as error:
            raise unreadable(folder, error) from error

    def __call__(self, name: str) -> Tensor:
        """The whole tensor "KEY/NAME", on the CPU.

        Raises:
            UserError: the checkpoint does not have it.
        """
        if name not in self._files:
            raise missing(self.folder, name)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def unreadable(folder: Path, error: OSError | SafetensorError | UserError) -> UserError:
    """What to say where a checkpoint's file cannot be opened, now or at all."""
    line = f"{folder}: {format_error(error)}"
    told = refused(error, f"{line}: delete this checkpoint")
    return TryAgain(f"{line}: launch again") if isinstance(told, TryAgain) else told


def missing(place: Path, name: str) -> UserError:
    """What to say where a checkpoint does not have a tensor."""
    return UserError(
        f"{place} has no {name}: it belongs to another model: --overwrite starts the stage again"
    )
