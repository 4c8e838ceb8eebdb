"""The node's cache of remote shards: fetched once, checked, kept while there is room.

Whatever `webdataset.gopen` opens can be fetched: http and https (through curl), ``pipe:COMMAND``,
gs, hf, sftp ... Files are named by their sha256, so two data sets or two addresses never mix.
Processes of a node agree through a lock file a shard (flock, which the system drops when a process
dies): the first fetches to ``NAME.part``, checks the sha256, and renames; the others wait and find
it done.
"""

import contextlib
import fcntl
import hashlib
import math
import os
import re
import subprocess
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import webdataset

from data.errors import BrokenData, UserError

DEFAULT_GB = 64.0
_CHUNK = 2**20

Wanted = tuple[str, str, int]  # URL, sha256 in hex, bytes
Report = Callable[[str], None]  # takes a line that the user should see


class NotThere(BrokenData):
    """A URL at which there is nothing, as its server says."""


# A worker forked while another thread starts curl would inherit curl's pipes, whose end then never
# comes: no fork while a command is being started.
_STARTING = threading.Lock()
os.register_at_fork(
    before=_STARTING.acquire,
    after_in_parent=_STARTING.release,
    after_in_child=_STARTING.release,
)


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


def _failure(url: str, error: Exception) -> BrokenData:
    # webdataset appends the child's whole command line; its exit status says enough.
    text = " ".join(str(error).split())
    reason = text[text.rfind("exit ") :].split(" (read)")[0] if "exit " in text else text
    return BrokenData(
        f"cannot fetch {url} ({reason}): check the address and that this node reaches it"
        " (schemes without a handler go through pipe:, e.g. 'pipe:aws s3 cp s3://... -')"
    )


def _chunks(url: str) -> Iterator[bytes]:
    """The bytes of a URL; whatever fails names the URL."""
    try:
        with _STARTING:
            opened = webdataset.gopen(url, "rb")
        with opened as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (OSError, ValueError, ImportError) as error:
        raise _failure(url, error) from None


def fetch_bytes(url: str) -> bytes:
    """A small remote file, such as a manifest, whole.

    Args:
        url: What `webdataset.gopen` opens.

    Returns:
        Its bytes.

    Raises:
        NotThere: There is no such file.
        BrokenData: It cannot be fetched.
    """
    try:
        content = b"".join(_chunks(url))
    except BrokenData as error:
        if _absent(url, str(error)):
            raise NotThere(str(error)) from None
        raise
    if not content:
        raise _failure(url, OSError("nothing came"))
    return content


def _absent(url: str, message: str) -> bool:
    """Whether a failure to fetch means that there is no such file."""
    if re.match(r"https?://", url, re.IGNORECASE):
        # To curl's -f all refusals are exit 22: the status tells 404 from 403 and 500.
        return "(exit 22)" in message and _http_status(url) in ("404", "410")
    # Commands have no status for it. `cat`, also through ssh, `aws s3 cp` and `gsutil` end with 1
    # (ssh itself with 255), curl for ftp with 78, for hf with 22; of file: Python says it.
    return any(f"({r})" in message for r in ("exit 1", "exit 22", "exit 78")) or (
        url.startswith("file:") and "[Errno 2]" in message
    )


def _http_status(url: str) -> str:
    """The status of a request, through curl as all others: its proxies, its .netrc."""
    words = ["curl", "-s", "-L", "--max-time", "60", "-o", os.devnull, "-w", "%{http_code}", url]
    with _STARTING:
        asked = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    return asked.communicate()[0].strip()


class ShardCache:
    """A folder of fetched files, shared by the processes of a node.

    Args:
        folder: On a disk of the node itself; by default `default_folder()`.
        limit_gb: About how much it may hold, in GB (1e9 bytes); the least recently opened files go
            first. By default 64.
        report: Told when it is too small; by default `as_python_warning`.

    Raises:
        UserError: The folder cannot be made.
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        limit_gb: float | None = None,
        report: Report | None = None,
    ) -> None:
        self.folder = Path(folder) if folder else default_folder()
        self.report = report or as_python_warning
        self.limit = round((DEFAULT_GB if limit_gb is None else limit_gb) * 1e9)
        if self.limit <= 0:
            raise UserError(f"the shard cache may hold {limit_gb} GB: give more than 0")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the shard cache {self.folder} ({error.strerror}): give a folder on a"
                " disk of this node (cache_dir, or the variable SELFDISTILL_CACHE)"
            ) from None
        self._reset()

    def _reset(self) -> None:
        self._wanted: deque[Wanted] = deque()
        self._keep: frozenset[str] = frozenset()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        """Only where and how much: each process has its own thread."""
        return {"folder": self.folder, "limit": self.limit, "report": self.report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process, and one thread of it, at a time."""
        fd = os.open(self.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            # Said outright: a worker forked meanwhile has a copy of fd, which would keep the lock.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def open(self, url: str, sha256: str, size: int | None) -> int:
        """A descriptor of the local copy of a file; see `path`."""
        while True:
            try:
                return os.open(self.path(url, sha256, size), os.O_RDONLY)
            except FileNotFoundError:  # dropped by another process between the two
                continue

    def path(self, url: str, sha256: str, size: int | None) -> Path:
        """The local copy of a file, fetched when it is not there.

        Args:
            url: Where it comes from.
            sha256: What it must be, in hex.
            size: In bytes, where known.

        Returns:
            Its path. Another process may drop it to make room: prefer `open`.

        Raises:
            BrokenData: It cannot be fetched, or is not the file that the manifest means.
            UserError: The cache is too small, or its disk full.
        """
        final = self.folder / sha256
        if self._hit(final, size):
            return final
        try:
            with self._locked(sha256):
                if not self._hit(final, size):
                    self._room(size or 0, frozenset((sha256,)), url)
                    self._fetch(url, sha256, size)
        except OSError as error:
            raise UserError(
                f"cannot keep {url} in {self.folder} ({error.strerror}): make room, or give another"
                " folder (cache_dir, or the variable SELFDISTILL_CACHE)"
            ) from None
        return final

    @staticmethod
    def _hit(final: Path, size: int | None) -> bool:
        """Whether the file is there and whole; notes its use."""
        try:
            if size is not None and final.stat().st_size != size:
                return False
            os.utime(final)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, url: str, sha256: str, size: int | None) -> None:
        """Downloads under the file's lock; one more try when the transfer fails."""
        part = self.folder / f"{sha256}.part"
        try:
            for attempt in (1, 2):
                try:
                    digest, count = hashlib.sha256(), 0
                    with part.open("wb") as file:
                        for chunk in _chunks(url):
                            digest.update(chunk)
                            count += len(chunk)
                            if size is not None and count > size:
                                break
                            file.write(chunk)
                    self._check(url, digest.hexdigest(), sha256, count, size)
                    break
                except BrokenData:
                    if attempt == 2:
                        raise
            part.rename(self.folder / sha256)
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def _check(url: str, found: str, wanted: str, count: int, size: int | None) -> None:
        if found != wanted:
            what = f"{count} bytes where {size} belong" if count != size else "another sha256"
            raise BrokenData(
                f"{url} is not the file that its manifest names ({what}): upload shards and"
                " manifest.json of the same packing again"
            )

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
                if total + need <= self.limit:
                    break
                if path.name in keep | self._keep and not drop_kept:
                    return False
                path.unlink(missing_ok=True)
                total -= size
        return True

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
                    self.path(url, sha256, size)
