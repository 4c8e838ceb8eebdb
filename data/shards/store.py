"""A folder in which several launches share a work of numbered pieces, until the last joins them.

Each piece has a record, whole or not there. So launches may run on any machines that see the
folder, in any order and number, and one that was killed goes on with what is missing.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.files import fsync

SETTINGS = "parts.json"
#: Parts that a message lists.
_LISTED = 8


class Part(NamedTuple):
    """One of so many launches, counted from 1."""

    number: int
    of: int

    def has(self, piece: int) -> bool:
        """Whether a piece, by its number, is this part's."""
        return piece % self.of == self.number - 1


def parse(text: str) -> Part:
    """A part from text such as "3/64".

    Raises:
        UserError: It is none.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    part = Part(int(found[1]), int(found[2])) if found else Part(0, 0)
    if not 1 <= part.number <= part.of:
        raise UserError(f"--part {text}: give a number and how many there are, such as 3/64")
    return part


class Store:
    """The folder.

    Args:
        folder: Its place, the same for all launches; made by `begin`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def _own(self) -> str:
        """Ends the names of what this process alone uses."""
        return f"{socket.gethostname()}-{os.getpid()}"

    def joining(self) -> str:
        """A line if a launch joins the pieces, or was killed while it did; else ""."""
        found = list(self.folder.parent.glob(f"{self.folder.name}.joining-*"))
        if not found:
            return ""
        return (
            f"{found[0]}: another part, which was the last, joins the pieces. If it no longer runs:"
            f" mv {found[0]} {self.folder}, and launch any part again"
        )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Notes what the first launch was told; the others compare.

        Args:
            settings: Of values that JSON keeps as they are.

        Raises:
            UserError: They differ; the folder cannot be made.
        """
        begun = self._begun(json.dumps(settings, indent=1) + "\n")
        for name in sorted(settings.keys() | begun.keys()):
            ours, theirs = settings.get(name), begun.get(name)
            if ours == theirs:
                continue
            told = "another source" if name == "source" else f"{name} {theirs}, not {ours}"
            raise UserError(
                f"{self.place} was begun with {told}: give every part the same source and options,"
                " or remove that folder to begin anew"
            )

    @property
    def place(self) -> str:
        """Where the records lie, for messages."""
        return str(self.folder)

    def _begun(self, settings: str) -> dict[str, Any]:
        """What the first launch was told: this one, if no other was before."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the folder {self.folder} ({error.strerror}): choose a place that you"
                " may write to"
            ) from None
        place = self.folder / SETTINGS
        draft = self.folder / f".{SETTINGS}.{self._own}"
        draft.write_text(settings, encoding="utf-8")
        try:
            os.link(draft, place)  # the first one wins, and nobody sees half a file
        except OSError:  # it is there; or this file system has no links
            if not place.exists():
                draft.replace(place)
        draft.unlink(missing_ok=True)
        return records.read_object(place)

    def done(self, group: str) -> set[int]:
        """Numbers of the pieces of a group that are finished."""
        found = self._records(group).glob("[0-9]*.npz")
        return {int(path.stem) for path in found if path.stat().st_size}  # not of a power cut

    def keep(self, group: str, number: int, told: Any, **arrays: NDArray[Any]) -> None:
        """Writes a piece's record: what JSON keeps, and arrays."""
        content = io.BytesIO()
        parts: dict[str, Any] = {"told": np.frombuffer(json.dumps(told).encode(), np.uint8)}
        np.savez(content, **(parts | arrays))
        self._write(group, number, content.getvalue())

    def _write(self, group: str, number: int, content: bytes) -> None:
        path = self._records(group) / f"{number:06d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{self._own}")
        draft.write_bytes(content)
        fsync(draft)
        draft.replace(path)

    def kept(self, group: str, number: int) -> tuple[Any, dict[str, NDArray[Any]]]:
        """A piece's record."""
        content = io.BytesIO(self._read(group, number))
        with np.load(content, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
        return json.loads(arrays.pop("told").tobytes()), arrays

    def _read(self, group: str, number: int) -> bytes:
        return (self._records(group) / f"{number:06d}.npz").read_bytes()

    def forget(self, group: str, number: int) -> None:
        """Removes a piece's record, so that it is made again."""
        (self._records(group) / f"{number:06d}.npz").unlink(missing_ok=True)

    def stow(self, group: str, path: Path) -> str:
        """Takes a whole file of a group, before its piece is recorded.

        Returns:
            What `stowed` says of it as long as it is the same; "" where nothing is said.
        """
        return ""

    def stowed(self, group: str) -> dict[str, tuple[int, str]] | None:
        """Size and mark of each file of a group; None where they lie here, and nobody asks."""
        return None

    def link(self, name: str, source: str, target: str) -> None:
        """The same file in another group; a copy where the file system has no second names."""
        paths = [self.folder / group / name for group in (source, target)]
        paths[1].unlink(missing_ok=True)  # of a launch that was stopped here
        try:
            os.link(*paths)
        except OSError:
            shutil.copyfile(*paths)

    def publish(self, group: str, final: Path) -> None:
        """Puts a group's folder, with its index, in place."""
        fsync(self.folder / group)
        (self.folder / group).rename(final)
        fsync(final.parent)

    def remove(self) -> None:
        """Removes all of it."""
        shutil.rmtree(self.folder)

    def missing(self, part: Part, groups: Mapping[str, int]) -> str:
        """A line about the pieces that are not finished; "" where all are.

        Args:
            part: In which way they are shared.
            groups: How many pieces each has.
        """
        left = [n for group, of in groups.items() for n in set(range(of)) - self.done(group)]
        if not left:
            return ""
        parts = sorted({n % part.of + 1 for n in left})
        listed = ", ".join(map(str, parts[:_LISTED])) + (", ..." if len(parts) > _LISTED else "")
        total = sum(groups.values())
        return f"{len(left)} of {total} shards are not done yet: of parts {listed} of {part.of}"

    @contextmanager
    def claimed(self) -> Iterator[Path | None]:
        """The folder under a name that no other launch looks for, so that one alone joins.

        Yields:
            Its place until the end of the block, which removes it; None if another was faster.
        """
        mine = self.folder.with_name(f"{self.folder.name}.joining-{self._own}")
        try:
            self.folder.rename(mine)
        except FileNotFoundError:
            yield None
            return
        before, self.folder = self.folder, mine
        try:
            yield mine
        except BaseException:
            mine.rename(before)
            raise
        finally:
            self.folder = before

    def _records(self, group: str) -> Path:
        return self.folder / ".records" / group
