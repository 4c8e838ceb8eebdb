"""A set in an object store, worked on in a temporary folder here that stands in its place.

The folder holds the set's manifests, and on request empty files of the names and sizes of all
others. So what reads folders need not know of stores; what it says is told with the address.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfdistill.data import records
from selfdistill.data.errors import UserError, printable
from selfdistill.data.remote.bucket import Bucket, NotThere
from selfdistill.data.shards.manifest import FILE, MEMBERS
from selfdistill.data.shards.places import is_remote
from selfdistill.data.shards.store import SETTINGS, Store
from selfdistill.data.splits import SPLITS

# What fetches a folder of a store.
_FETCH = {
    "s3": "aws s3 sync {place} FOLDER",
    "gs": "gcloud storage rsync --recursive {place} FOLDER",
    "hf": "hf download --repo-type dataset {rest} --local-dir FOLDER",
}
# Small files that are fetched at a time.
_THREADS = 16


@dataclass(frozen=True)
class Mirror:
    """Where a set is worked on.

    Attributes:
        folder: The set's folder, or the temporary one in its place.
        place: What the user named: that folder, or a split's in it.
        bucket: The set in its store; None for a local one.
    """

    folder: Path
    place: Path
    bucket: Bucket | None = None

    def told(self, text: str) -> str:
        """Text for the user, with addresses in place of the temporary folder's paths."""
        return text if self.bucket is None else text.replace(str(self.folder), self.bucket.address)

    def store(self, folder: Path, empty: Sequence[str] = ()) -> Store:
        """Where launches share a work: that folder, or one of its name in the store.

        Args:
            folder: In the set's folder, or beside it.
            empty: Folders of the set that hold nothing when the work begins.
        """
        if self.bucket is None:
            return Store(folder)
        return Away(folder, self.bucket, self._name(folder), empty)

    def refresh(self) -> None:
        """Fetches the manifests that have come since; nothing for a local one."""
        if self.bucket is not None:
            _fill(self, self.bucket, files=False)

    def publish(self, folder: Path) -> None:
        """Uploads the index of a split; nothing for a local one."""
        if self.bucket is not None:
            _publish(self.bucket, folder, self._name(folder))

    @contextmanager
    def filled(self, path: Path) -> Iterator[None]:
        """A file with its contents, which go at the end of the block."""
        if self.bucket is None:
            yield
            return
        size = path.stat().st_size
        try:
            self.bucket.fetch(self._name(path), path, size)
            yield
        finally:
            _hollow(path, size)

    def _name(self, path: Path) -> str:
        inside = path.is_relative_to(self.folder)
        return path.relative_to(self.folder).as_posix() if inside else path.name


class Away(Store):
    """A store of pieces in a bucket: the files go there as they come, and so do the records.

    Launches that join the pieces at the same time write the same bytes, so none is kept from it.

    Args:
        folder: Where files are made on their way.
        bucket: The set.
        name: Of the folder of records in it.
        empty: See `Mirror.store`.
    """

    def __init__(self, folder: Path, bucket: Bucket, name: str, empty: Sequence[str]) -> None:
        super().__init__(folder)
        self._bucket, self._name, self._empty = bucket, name.removeprefix("./"), empty
        self._digest = ""

    @property
    def place(self) -> str:
        """See `Store`."""
        return f"{self._bucket.address}/{self._name}"

    def joining(self) -> str:
        """See `Store`: never."""
        return ""

    def _begun(self, settings: str) -> dict[str, Any]:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of two that begin at once with other options, the last wins; their records never mix.
        self._digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        name = f"{self._name}/{SETTINGS}"
        try:
            content = self._bucket.read(name)
        except NotThere:
            for folder in self._empty:
                if there := self._bucket.names(folder):
                    raise UserError(
                        f"{self._bucket.address}/{folder} holds {next(iter(there))}, and no"
                        " interrupted packing: give another address, or remove what lies there"
                    ) from None
            self._bucket.write(name, settings.encode())
            content = self._bucket.read(name)
        found = records.from_json(content, self.place)
        return found if isinstance(found, dict) else {}

    def done(self, group: str) -> set[int]:
        """See `Store`."""
        return {int(Path(name).stem) for name in self._bucket.names(self._below(group))}

    def _write(self, group: str, number: int, content: bytes) -> None:
        self._bucket.write(self._below(group, number), content)

    def forget(self, group: str, number: int) -> None:
        """See `Store`."""
        self._bucket.remove(self._below(group, number))

    def _below(self, group: str, number: int | None = None) -> str:
        inside = f"{self._name}/{self._digest}/{group}"
        return inside if number is None else f"{inside}/{number:06d}.npz"

    def stow(self, group: str, path: Path) -> str:
        """See `Store`: uploads the file, and removes it here."""
        mark = self._bucket.upload(path, f"{group}/{path.name}").mark
        path.unlink()
        return mark

    def stowed(self, group: str) -> dict[str, tuple[int, str]] | None:
        """See `Store`."""
        listed = self._bucket.names(group)
        return {name.removeprefix(f"{group}/"): (s.size, s.mark) for name, s in listed.items()}

    def link(self, name: str, source: str, target: str) -> None:
        """See `Store`: a copy within the store."""
        self._bucket.copy(f"{source}/{name}", f"{target}/{name}")

    def publish(self, group: str, final: Path) -> None:
        """See `Store`: uploads the index, the manifest last."""
        _publish(self._bucket, self.folder / group, final.name)

    @contextmanager
    def claimed(self) -> Iterator[Path | None]:
        """See `Store`: with all records fetched, unless another launch has joined them."""
        names = [
            name
            for name in self._bucket.names(f"{self._name}/{self._digest}")
            if name.endswith(".npz")
        ]

        def get(name: str) -> None:
            *_, group, number = name.split("/")
            path = self._records(group) / number
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self._bucket.read(name))

        try:
            with ThreadPoolExecutor(_THREADS) as pool:
                list(pool.map(get, names))
        except NotThere:
            names = []
        yield self.folder if names else None

    def remove(self) -> None:
        """See `Store`."""
        self._bucket.remove(self._name)


def refuse(place: str, what: str) -> None:
    """Refuses an address where files are needed.

    Args:
        place: That the user gave.
        what: Needs them, for the message.

    Raises:
        UserError: It is an address.
    """
    if is_remote(place):
        scheme, _, rest = place.partition("://")
        command = _FETCH.get(scheme, "").format(place=place, rest=rest.removeprefix("datasets/"))
        how = f" ({command})" if command else ""
        raise UserError(f"{place}: {what} folders and files of this machine: fetch it first{how}")


def _publish(bucket: Bucket, folder: Path, name: str) -> None:
    """Uploads a split's index, the manifest last: until then there is no such split."""
    for file in (MEMBERS, SETTINGS, FILE):
        if (folder / file).exists():
            bucket.upload(folder / file, f"{name}/{file}".removeprefix("./"))


def _say(line: str) -> None:
    """A line about a transfer that is tried again."""
    print(printable(line), file=sys.stderr, flush=True)


def _hollow(path: Path, size: int) -> None:
    """A file of that size without contents."""
    with path.open("wb") as file:
        os.truncate(file.fileno(), size)


@contextmanager
def mirrored(place: str, files: bool = False) -> Iterator[Mirror]:
    """A set's folder, or one here for a set in an object store.

    Args:
        place: A folder, or an address.
        files: Whether hollow files stand for what is there beside the manifests; then the address
            may be that of a split.

    Raises:
        UserError: It is no address of a store; whatever the block raises, told with addresses.
    """
    if not is_remote(place):
        yield Mirror(Path(place), Path(place))
        return
    above, _, last = place.rstrip("/").rpartition("/")
    split = last if files and last in SPLITS and not above.endswith("/") else ""
    bucket = Bucket(above if split else place, _say)
    scratch = Path(tempfile.mkdtemp(prefix="selfdistill-"))
    try:
        folder = scratch / bucket.address.rpartition("/")[2]
        mirror = Mirror(folder, folder / split, bucket)
        try:
            _fill(mirror, bucket, files)
            yield mirror
        except UserError as error:
            error.args = (mirror.told(str(error)),)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _fill(mirror: Mirror, bucket: Bucket, files: bool) -> None:
    """Makes the files of a mirror."""
    mirror.place.mkdir(parents=True, exist_ok=True)
    listed = bucket.names()
    for name, found in listed.items():
        folder, _, base = name.rpartition("/")
        path = mirror.folder / name
        index = base in (FILE, SETTINGS) and f"{folder}/{FILE}".removeprefix("/") in listed
        if "/" in folder or not (index or files):
            continue
        try:
            path.parent.mkdir(exist_ok=True)
            if index and folder in ("", *SPLITS):
                bucket.fetch(name, path, found.size)
            else:
                _hollow(path, found.size)
        except (FileExistsError, IsADirectoryError, NotADirectoryError):
            raise UserError(
                f"{bucket.address} holds a file and a folder of one name, {name}: rename one"
            ) from None
