"""Checkpoints on the nodes' own disks, beside those on the disk that all share.

`DIR/selfdistill-KEY/step-00000100/` of a node holds the shares of its ranks, and the record of the
whole (`state-00003.json`) by each of them. No rank writes a record before the shares of all are on
their disks: so a checkpoint is whole where there is a record, and each of its files lies on some
node. Which node that is may change; a file that is nowhere (a node was replaced) leaves the older
checkpoint on the shared disk. KEY names the folder of the stage and a number drawn at its start:
what another run, or a stage that was begun anew, left there is never taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from selfdistill.data.errors import UserError
from selfdistill.data.files import read, refuse_open
from selfdistill.engine.checkpoints.checkpoint import Checkpoints, missing, read_state, unreadable
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.checkpoints.results import numbered
from selfdistill.engine.checkpoints.state import State
from selfdistill.engine.config.schema import Config
from selfdistill.engine.runtime.distributed import Ranks, barrier, broadcast, gather, main_only
from selfdistill.engine.runtime.failures import refused

#: In the stage's folder: the second part of KEY.
_MARK = ".local"


def open_checkpoints(
    config: Config, stage: Path, ranks: Ranks, beat: Callable[[], None]
) -> Checkpoints:
    """The checkpoints of a stage, on the shared disk and, as `--save_local` says, on the nodes'.

    Args:
        config: of the run.
        stage: the stage's folder.
        ranks: who takes part; every one calls it.
        beat: called while long work goes on.

    Raises:
        UserError: a rank cannot write into its node's folder.
    """
    shared = Checkpoints(stage / "checkpoints", ranks, config.keep, beat)
    if config.save_local is not None:
        return Local(_folder(config.save_local, stage, ranks), shared)
    if ranks.main and (stage / _MARK).exists():
        shared.warn(f"{stage}: checkpoints on the nodes' disks are not looked at (--save_local)")
    return shared


def _folder(typed: str, stage: Path, ranks: Ranks) -> Path:
    """This rank's folder for the stage, which is there and its own."""

    def mark() -> str:
        path = stage / _MARK
        if not path.exists():
            write_text(path, secrets.token_hex(8))
        return read(path, "delete it", 64).decode("ascii", "replace")

    number = main_only(ranks, mark)
    if not re.fullmatch("[0-9a-f]{16}", number):
        raise UserError(f"{stage / _MARK} is not what a launch writes: delete it")
    place = hashlib.sha256(str(broadcast(str(stage.resolve()))).encode()).hexdigest()[:16]
    folder, error = Path(os.path.expandvars(typed)), None
    try:
        if "$" in str(folder):
            raise UserError("a variable is not set there: set it, or name a folder")
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"selfdistill-{place}-*"):
            if not other.name.endswith(number):  # of before an --overwrite
                shutil.rmtree(other, ignore_errors=True)
        folder /= f"selfdistill-{place}-{number}"
        folder.mkdir(mode=0o700, exist_ok=True)
        there = folder.lstat()
        if not stat.S_ISDIR(there.st_mode) or there.st_uid != os.geteuid():
            raise UserError(f"{folder} is no folder of yours: delete it, or name another")
        refuse_open(folder, "the checkpoints' folder")
    except UserError as caught:
        error = str(caught)
    except OSError as caught:
        error = f"{caught.filename}: {caught.strerror}: name a folder that you may write to"
    if errors := [found for found in gather(error and (socket.gethostname(), error)) if found]:
        raise UserError(f"--save_local {typed}, on {errors[0][0]}: {errors[0][1]}")
    return folder


class _Offer(NamedTuple):
    """A checkpoint of which something lies on the nodes.

    Attributes:
        digests: of the records, one if all is well.
        source: the lowest rank that sees a record.
        owners: which rank reads which file.
    """

    digests: set[str]
    source: int
    owners: dict[str, int]


class Local(Checkpoints):
    """Checkpoints on the nodes' own disks, the newest kept; those on the shared disk beside them.

    Args:
        folder: of this rank, on its node; other ranks may have the same one.
        shared: those on the shared disk.
    """

    def __init__(self, folder: Path, shared: Checkpoints) -> None:
        super().__init__(folder, shared.ranks, 1, shared.beat)
        self.shared = shared
        self._owners: dict[str, int] = {}

    def settle(self, *, wait: bool = True) -> None:
        """See `Checkpoints`; of both disks."""
        self._settle(wait=wait)
        self.shared.settle(wait=wait)

    def _begin(self, name: str) -> Path:
        folder = self.folder / name
        with suppress(OSError):  # the write into it fails, and says so
            folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _publish(self, draft: Path, state: State) -> None:
        error, state = None, broadcast(state)  # rank 0's: its clock, its scalars
        try:
            text = json.dumps(state.content(), indent=1)
            write_text(draft / f"state-{self.ranks.rank:05d}.json", text)
        except OSError as caught:
            error = refused(caught, f"{draft}: checkpoint not saved: {caught.strerror}: free space")
        if errors := [found for found in gather(error) if found]:
            raise errors[0]
        self._delete(lambda step: step < state.step)  # now that all have written

    def _delete(self, these: Callable[[int], bool]) -> None:
        """Deletes steps in this rank's folder; the ranks of a node help each other."""
        for step, path in numbered(self.folder, "step-").items():
            if these(step):
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """See `Checkpoints`."""
        self._settle(wait=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _record(self, name: str) -> State | None:
        """A step's record, of the first that is whole."""
        for path in sorted((self.folder / name).glob("state-*.json")):
            with suppress(UserError):
                if (state := read_state(path, name)[0]) is not None:
                    return state
        return None

    def _offers(self) -> dict[int, _Offer]:
        """What lies on the nodes, by its step. Every rank calls it."""
        mine: dict[int, tuple[str | None, list[str]]] = {}
        for step, path in numbered(self.folder, "step-").items():
            record = self._record(path.name)
            files = sorted(part.name for part in path.glob("part-*.safetensors"))
            mine[step] = (record.digest if record else None, files)
        found: dict[int, _Offer] = {}
        for rank, offered in enumerate(gather(mine)):
            for step, (digest, files) in offered.items():
                one = found.setdefault(step, _Offer(set(), rank, {}))
                if digest is not None:
                    if not one.digests:
                        one = found[step] = one._replace(source=rank)
                    one.digests.add(digest)
                for file in files:  # ranks of a node see the same: each reads its own
                    if file not in one.owners or file.startswith(f"part-{rank:05d}-"):
                        one.owners[file] = rank
        return {step: one for step, one in found.items() if one.digests}

    def _whole_local(self, name: str, offer: _Offer) -> State | None:
        """Like `whole`, of what lies on the nodes."""
        state: State | None = broadcast(
            self._record(name) if self.ranks.rank == offer.source else None, offer.source
        )
        lost = sorted(state.files.keys() - offer.owners.keys()) if state else []
        if state is None or len(offer.digests) > 1:
            fault = "its records do not agree"
        elif lost:
            fault = f"{lost[0]} lies on no node (one was replaced, or its disk emptied)"
        else:
            mine = [file for file in state.files if offer.owners[file] == self.ranks.rank]
            fault = self._fault(self.folder / name, state, mine)
        if state is None or fault:
            self.warn(f"{self.folder / name}: {fault}; skipped")
            return None
        self._owners = {file: offer.owners[file] for file in state.files}
        return state

    def newest(self) -> tuple[Path, State] | None:
        """The newest whole checkpoint, of the nodes or of the shared disk; see `Checkpoints`."""
        names: list[str] = broadcast(self.shared.names() if self.ranks.main else None)
        there, offers = {int(name.removeprefix("step-")): name for name in names}, self._offers()
        if names and not offers:
            self.warn(f"{self.folder}: no checkpoint lies on the nodes' own disks")
        found = None
        for step in sorted(there.keys() | offers.keys(), reverse=True):
            name, state = f"step-{step:08d}", None
            if step in there:
                state, where = self.shared.whole(there[step]), self.shared.folder / there[step]
            if state is None and step in offers:
                state, where = self._whole_local(name, offers[step]), self.folder / name
            if state is not None:
                found = (where, state)
                break
        if found is None and names:
            raise self.shared.none_whole(names)
        kept = found[1].step if found else 0
        self._delete(lambda step: step > kept)  # or their shares would mix with new ones
        barrier()
        return found

    def find(self, config: Mapping[str, Any], manifest: str) -> tuple[Path, State] | None:
        """See `Checkpoints`."""
        found = super().find(config, manifest)
        if found is not None and found[0].parent == self.shared.folder:
            self.shared.resumed(found[1].step)
        return found

    def reader(self, found: tuple[Path, State]) -> Callable[[str], Tensor]:
        """See `Checkpoints`."""
        if found[0].parent == self.shared.folder:
            return self.shared.reader(found)
        return _Spread(found[0], self._owners, self.ranks)


class _Spread:
    """Gives the tensors of a checkpoint whose files lie on several nodes, each sent to all ranks.

    Every rank makes it, and asks for the same names in the same order.

    Args:
        folder: of the checkpoint, on this node.
        owners: which rank reads which file.
        ranks: this process.

    Raises:
        UserError: a file is not safetensors; TryAgain: the file system fails.
    """

    def __init__(self, folder: Path, owners: Mapping[str, int], ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self._files: dict[str, Any] = {}
        error, told = None, {}
        try:
            for file in (file for file, owner in owners.items() if owner == ranks.rank):
                opened = safe_open(folder / file, framework="pt")
                for name in opened.keys():  # noqa: SIM118 (no mapping)
                    part = opened.get_slice(name)
                    if part.get_dtype() != "F32":
                        raise UserError(f"{file}: {name} is {part.get_dtype()}, not F32")
                    told[name], self._files[name] = list(part.get_shape()), opened
        except (OSError, SafetensorError, UserError) as caught:
            error = unreadable(folder, caught)
        self._shapes: dict[str, tuple[int, list[int]]] = {}
        for rank, (failed, shapes) in enumerate(gather((error, told))):
            if failed:
                raise failed
            self._shapes |= {name: (rank, shape) for name, shape in shapes.items()}

    def __call__(self, name: str) -> Tensor:
        """The whole tensor "KEY/NAME", on the CPU. Every rank calls it.

        Raises:
            UserError: the checkpoint does not have it.
        """
        if name not in self._shapes:
            raise missing(self.folder, name)
        owner, shape = self._shapes[name]
        tensor = torch.empty(shape)
        if owner == self.ranks.rank:
            tensor = self._files[name].get_tensor(name)
        if self.ranks.world > 1:
            tensor = tensor.to(self.ranks.device)
            dist.broadcast(tensor, owner)
        return tensor.cpu()
