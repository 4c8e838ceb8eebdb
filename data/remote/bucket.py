"""A folder in an object store: listed, read and written through fsspec (s3, gs, az, hf).

What is written appears whole or not at all, as stores have it. The endpoint and the credentials are
those of the environment, as each file system's library reads them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec

from selfdistill.data.errors import UserError
from selfdistill.data.remote import fetch
from selfdistill.data.remote.fetch import NotThere, Report

__all__ = ["SCHEMES", "Bucket", "NotThere", "Stored"]

T = TypeVar("T")

#: Of stores that can be written to; memory is fsspec's own, for trying.
SCHEMES = ("s3", "gs", "az", "hf", "memory")
# What stores call their own hash of a content: s3, gs, az, hf.
_MARKS = ("ETag", "md5Hash", "content_md5", "blob_id")


class Stored(NamedTuple):
    """What a store says of a file: bytes, and its own hash of them; "" where it has none."""

    size: int
    mark: str


class Bucket:
    """A folder in an object store.

    Args:
        address: Such as ``s3://bucket/set``.
        report: Told of transfers that are tried again; by default `fetch.as_retrying`.

    Raises:
        UserError: It is no address of a store.
    """

    def __init__(self, address: str, report: Report | None = None) -> None:
        scheme, _, rest = address.partition("://")
        self.address = address.rstrip("/")
        self.report = report
        if scheme not in SCHEMES or not rest.strip("/") or "::" in address:
            raise UserError(
                f"{address}: only object stores can be written to, or listed: give a folder, or an"
                " address such as s3://bucket/set"
            )

    def names(self, below: str = "") -> dict[str, Stored]:
        """The files below a folder of it, by their names from the bucket's own folder on.

        Raises:
            UserError: It cannot be asked; a name could lead out of a folder here.
        """

        def listed(files: Any, place: str) -> dict[str, Stored]:
            root = str(files._strip_protocol(self.address)).rstrip("/")
            found = files.find(place, detail=True)
            return {name.removeprefix(f"{root}/"): _stored(info) for name, info in found.items()}

        found = self._do("list", below, listed)
        for name in found:
            if not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise UserError(
                    f"{self.address} holds {name!r}, which can be no file's name here: rename it"
                )
        return found

    def read(self, name: str) -> bytes:
        """A small file, whole; see `fetch.fetch_bytes`."""
        return fetch.fetch_bytes(self._url(name), self.report)

    def fetch(self, name: str, path: Path, size: int) -> None:
        """A file of so many bytes, into a local one.

        Raises:
            BrokenData: It cannot be fetched whole.
        """

        def once(attempt: int) -> None:
            count = 0
            stream = fetch.chunks(self._url(name), fresh=attempt > 1)
            with path.open("wb") as file, contextlib.closing(stream):
                for chunk in stream:
                    count += file.write(chunk)
            if count != size:
                raise fetch.Failure(f"{count} bytes where {size} belong")

        fetch.retry(self._url(name), once, self.report)

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file."""
        self._do("write", name, lambda files, place: files.pipe_file(place, content))

    def upload(self, path: Path, name: str) -> Stored:
        """Uploads a local file.

        Returns:
            What the store then says of it.
        """
        size = path.stat().st_size

        def put(files: Any, place: str) -> Stored:
            files.put_file(str(path), place)
            there = _stored(files.info(place))
            if there.size != size:
                raise fetch.Failure(f"{there.size} bytes came of {size}")
            return there

        return self._do("write", name, put)

    def copy(self, name: str, other: str) -> None:
        """Copies a file within the store."""
        root = self._url(name)
        self._do("write", other, lambda files, place: files.copy(root, place))

    def remove(self, name: str) -> None:
        """Removes a file, or all below a folder; nothing where there is none."""

        def gone(files: Any, place: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                files.rm(place, recursive=True)

        self._do("remove", name, gone)

    def _url(self, name: str) -> str:
        return f"{self.address}/{name}" if name else self.address

    def _do(self, verb: str, name: str, action: Callable[[Any, str], T]) -> T:
        """Acts on the file system, in several tries."""
        url = self._url(name)

        def once(_: int) -> T:
            try:
                # Not the instance that reads: what this one writes would be old in its listings.
                files, place = fsspec.url_to_fs(url, use_listings_cache=False)
                return action(files, str(place))
            except fetch.Failure:
                raise
            except Exception as error:  # each file system has its own
                raise fetch.of_store(error, url) from None

        return fetch.retry(url, once, self.report, verb=verb)


def _stored(info: dict[str, Any]) -> Stored:
    mark = next((str(info[key]) for key in _MARKS if info.get(key)), "")
    return Stored(int(info["size"]), mark.strip('"'))
