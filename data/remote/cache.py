"""The node's cache of remote shards: fetched once, checked, kept while there is room.

Files are named by their sha256, so two data sets or two addresses never mix. Processes of a node
agree through a lock file a shard (flock, which the system drops when a process dies): the first
fetches to ``NAME.part`` (see `data.remote.fetch`), checks the sha256, and renames; the others wait
and find it done, or find in ``NAME.failed`` what the first met.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import stat
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selfdistill.data import records
from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.files import fresh, nofollow, refuse_open
from selfdistill.data.remote import fetch
from selfdistill.data.remote.fetch import NotThere, Report, fetch_bytes

__all__ = ["NotThere", "Report", "ShardCache", "as_python_warning", "default_folder", "fetch_bytes"]

DEFAULT_GB = 64.0
_FULL = (errno.ENOSPC, errno.EDQUOT)

Wanted = tuple[str, str, int]  # URL, sha256 in hex, bytes


def default_folder() -> Path:
    """$SELFDISTILL_CACHE, or selfdistill/shards in the user's cache folder."""
    own = os.environ.get("SELFDISTILL_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "selfdistill" / "shards"


def as_python_warning(line: str) -> None:
    """The report of who names no other: a Python warning."""
    warnings.warn(line, stacklevel=3)


class _Note(records.Record):
    """NAME.failed: when a fetch failed, and how."""

    time: float
    error: str
    away: bool = False


class ShardCache:
    """A folder of fetched files, shared by the processes of a node.

    Args:
        folder: On a disk of the node itself; by default `default_folder()`.
        limit_gb: About how much it may hold, in GB (1e9 bytes); the least recently opened files go
            first. By default 64; infinite for small files beside shards of another limit.
        report: Told when it or its disk is too small, and of transfers that are tried again; by
            default Python warnings, `as_python_warning` and `fetch.as_retrying`.
        verify: Whether a process hashes what it finds in the folder before its first use: somebody
            else may have put it there.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        limit_gb: float | None = None,
        report: Report | None = None,
        verify: bool = False,
    ) -> None:
        self.verify = verify
        self.folder = Path(folder) if folder else default_folder()
        self.report = report or as_python_warning
        self._retrying = report or fetch.as_retrying
        limit = (DEFAULT_GB if limit_gb is None else limit_gb) * 1e9
        self.limit = limit if limit == math.inf else round(limit)
        self._fits = self.limit
        if self.limit <= 0:
            raise UserError(f"the shard cache may hold {limit_gb} GB: give more than 0")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the shard cache {self.folder} ({error.strerror}): give a folder on a"
                " disk of this node (cache_dir, or the variable SELFDISTILL_CACHE)"
            ) from None
        refuse_open(self.folder, "the shard cache")
        self._reset()

    def _reset(self) -> None:
        self._wanted: deque[Wanted] = deque()
        self._keep: frozenset[str] = frozenset()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._told = False
        # Name, inode and size of what this process has hashed.
        self._verified: set[tuple[str, int, int]] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Only where and how much: each process has its own thread."""
        kept = ("folder", "limit", "report", "verify", "_fits", "_retrying")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[None]:
        """One process, and one thread of it, at a time; without `wait`, BlockingIOError."""
        fd = nofollow(str(self.folder / f"{name}.lock"), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            # Said outright: a worker forked meanwhile has a copy of fd, which would keep the lock.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def open(self, url: str, sha256: str, size: int | None, most: int | None = None) -> int:
        """A descriptor of the local copy of a file; see `path`."""
        while True:
            try:
                return nofollow(str(self.path(url, sha256, size, most)), os.O_RDONLY)
            except FileNotFoundError:  # dropped by another process between the two
                continue

    def path(self, url: str, sha256: str, size: int | None, most: int | None = None) -> Path:
        """The local copy of a file, fetched when it is not there.

        Args:
            url: Where it comes from.
            sha256: What it must be, in hex.
            size: In bytes, where known.
            most: Where it is not known: bytes beyond which it is refused.

        Returns:
            Its path. Another process may drop it to make room: prefer `open`.

        Raises:
            BrokenData: It cannot be fetched, or is not the file that the manifest means.
            UserError: The cache is too small, or its disk full.
        """
        return self._obtain(url, sha256, size, most, drop_kept=True)

    def _obtain(
        self, url: str, sha256: str, size: int | None, most: int | None, *, drop_kept: bool
    ) -> Path:
        """See `path`; what prefetching wants is dropped last, or not at all."""
        final = self.folder / sha256
        began = time.time()
        while not self._hit(final, size):
            try:
                with self._locked(sha256):
                    if not self._hit(final, size):
                        self._heed(sha256, began)
                        self._room(size or 0, frozenset((sha256,)), url)
                        self._fetch(url, sha256, size, most)
                return final
            except OSError as error:
                with contextlib.suppress(OSError):
                    if error.errno in _FULL and self._give_way(size or 1, drop_kept):
                        continue
                raise UserError(
                    f"cannot keep {url} in {self.folder} ({error.strerror}): make room, or give"
                    " another folder (--data.cache_dir, or the variable SELFDISTILL_CACHE)"
                ) from None
        return final

    def _hit(self, final: Path, size: int | None) -> bool:
        """Whether the file is there and whole; notes its use."""
        try:
            status = final.lstat()
            if not stat.S_ISREG(status.st_mode) or size not in (None, status.st_size):
                return False
            known = (final.name, status.st_ino, status.st_size)
            if self.verify and known not in self._verified:
                with open(final, "rb", opener=nofollow) as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                if digest != final.name:
                    self.report(f"{final} is not what its name says: it is fetched again")
                    final.unlink(missing_ok=True)
                    return False
                self._verified.add(known)
            with contextlib.suppress(PermissionError):
                os.utime(final)
        except FileNotFoundError:
            return False
        except OSError as error:
            return error.errno == errno.EROFS  # it is read all the same
        return True

    def _fetch(self, url: str, sha256: str, size: int | None, most: int | None) -> None:
        """Downloads under the file's lock."""
        part, note = (self.folder / f"{sha256}.{end}" for end in ("part", "failed"))
        wrong: set[str] = set()
        most = most if size is None else size

        def once(attempt: int) -> None:
            digest, count = hashlib.sha256(), 0
            with (
                fresh(part, "wb") as file,
                contextlib.closing(fetch.chunks(url, fresh=attempt > 1)) as stream,
            ):
                for chunk in stream:
                    digest.update(chunk)
                    count += len(chunk)
                    if most is not None and count > most:
                        break
                    file.write(chunk)
            if digest.hexdigest() != sha256:
                found, what = digest.hexdigest(), "another sha256"
                if most is not None and count > most:
                    found, what = "more", f"more than {most} bytes"
                elif size is not None and count < size:
                    what = f"{count} bytes where {size} belong"
                # Twice the same is no accident of the transfer.
                again = found not in wrong
                wrong.add(found)
                raise fetch.Failure(what, again=again, damaged=True)

        try:
            fetch.retry(url, once, self._retrying)
            part.rename(self.folder / sha256)
            note.unlink(missing_ok=True)
        except BrokenData as error:
            # For those that wait behind the lock: they would try for as long, one after another.
            with contextlib.suppress(OSError), fresh(note) as file:
                away = isinstance(error, fetch.Away)
                json.dump({"time": time.time(), "error": str(error), "away": away}, file)
            raise
        finally:
            part.unlink(missing_ok=True)

    def _heed(self, sha256: str, began: float) -> None:
        """Raises what another process met while this one waited for it."""
        try:
            place = self.folder / f"{sha256}.failed"
            with open(place, encoding="utf-8", opener=nofollow) as file:
                note = records.checked(_Note, records.from_json(file.read(2**16), place), place)
        except (OSError, ValueError, UserError):
            return
        if began < note.time <= time.time():
            raise (fetch.Away if note.away else BrokenData)(note.error)

    def _files(self) -> list[tuple[float, int, Path]]:
        """Last use, size and path of what is kept."""
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if "." not in entry.name:
                    try:
                        status = entry.stat()
                    except FileNotFoundError:
                        continue
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return sorted(found)

    def _room(self, need: int, keep: frozenset[str], url: str, drop_kept: bool = True) -> bool:
        """Drops the least recently used files until `need` bytes fit.

        Args:
            need: Bytes to come.
            keep: Names to drop last.
            url: For the message.
            drop_kept: Whether those may be dropped at all.

        Returns:
            Whether there is room now.

        Raises:
            UserError: There never can be.
        """
        if need > self.limit:
            raise UserError(
                f"{url} has {need / 1e9:.2f} GB, the shard cache holds {self.limit / 1e9:.2f} GB:"
                " give it more (cache_gb)"
            )
        with self._locked("room"):
            files = self._files()
            total = sum(size for _, size, _ in files)
            # Oldest first, and what is needed now after all others.
            for _, size, path in sorted(files, key=lambda f: (f[2].name in keep | self._keep, f)):
                if total + need <= max(self._fits, need):
                    break
                if path.name in keep | self._keep and not drop_kept:
                    return False
                path.unlink(missing_ok=True)
                total -= size
        return True

    def _give_way(self, need: int, drop_kept: bool) -> bool:
        """Drops abandoned downloads, then the least recently used files, from a full disk.

        Args:
            need: Bytes to come.
            drop_kept: Whether files that prefetching wants may go, too.

        Returns:
            Whether there is room now.
        """
        freed = 0

        def free() -> int:
            status = os.statvfs(self.folder)
            return status.f_bavail * status.f_frsize

        def enough() -> bool:
            # A file that somebody has open gives its room back later; a quota shows in no figure.
            return freed >= need and free() >= need

        with self._locked("room"):
            for part in self.folder.glob("*.part"):
                with contextlib.suppress(OSError), self._locked(part.stem, wait=False):
                    size = part.stat().st_size
                    part.unlink()
                    freed += size
            files = self._files()
            total = sum(size for _, size, _ in files)
            if free() + total < need:
                return False  # not even then
            for _, size, path in sorted(files, key=lambda f: (f[2].name in self._keep, f)):
                if enough() or (path.name in self._keep and not drop_kept):
                    break
                path.unlink(missing_ok=True)
                freed += size
        # More than this does not fit: from now on `_room` makes the room before it is needed.
        if total < self._fits and freed:
            self._fits = total
            self.report(
                f"the disk of the shard cache {self.folder} is full: it holds {total / 1e9:.2g} GB"
                " from here on: make room, or give another folder (--data.cache_dir)"
            )
        return freed > 0 and enough()

    def prefetch(self, wanted: list[Wanted]) -> None:
        """Fetches files in the background, in this order; what was asked before is dropped.

        Args:
            wanted: URL, sha256 and size of each; the files of the current window, then of the next.
                While they are wanted they are dropped last, and nothing is fetched in their place.
        """
        if self._pid != os.getpid():
            self._reset()  # forked: the parent's thread is not here
        total = sum(size for _, _, size in wanted)
        if total > self.limit and not self._told:
            self._told = True  # each window has another size, and the cure is the same
            self.report(
                f"two shuffle windows of shards have {total / 1e9:.2f} GB, the shard cache holds"
                f" {self.limit / 1e9:.2f} GB: shards will be fetched again and again: give it more"
                f" (--data.cache_gb {math.ceil(total / 1e9)}), or shuffle smaller windows"
                " (--data.window)"
            )
        with self._wake:
            self._wanted = deque(wanted)
            self._keep = frozenset(sha256 for _, sha256, _ in wanted)
            self._wake.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._prefetching, daemon=True)
            self._thread.start()

    def _prefetching(self) -> None:
        while True:
            with self._wake:
                while not self._wanted:
                    self._wake.wait()
                url, sha256, size = self._wanted.popleft()
            # Whatever fails will fail again, and be reported, where the shard is read.
            with contextlib.suppress(UserError, OSError):
                if self._hit(self.folder / sha256, size):
                    continue
                if self._room(size, frozenset((sha256,)), url, drop_kept=False):
                    self._obtain(url, sha256, size, None, drop_kept=False)
