"""Opens files that others may have put there: regular ones alone, and no more than is borne.

In folders that others may write to, run folders and caches, a link could lead anywhere: there it is
neither followed nor written through.
"""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from selfdistill.data.errors import PASSING, TryAgain, UserError, printable

#: Bytes of a file that is read whole, such as a manifest: a hundred times one of 10^5 shards.
LARGEST = 2**30


def regular(path: Path, cure: str) -> None:
    """Refuses what is there and no regular file: a library that opens a pipe waits for ever.

    Args:
        path: Of the file; a link is followed.
        cure: What the user can do.

    Raises:
        UserError: It is a folder, a device or a named pipe.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{printable(str(path))} is no regular file: {cure}")


def refuse_open(folder: Path, what: str) -> None:
    """Refuses a folder of ours that everybody may write to, who could put other data there.

    Args:
        folder: need not be there.
        what: it is, for the message.

    Raises:
        UserError: everybody may write to it.
    """
    if folder.is_dir() and folder.stat().st_mode & stat.S_IWOTH:
        raise UserError(
            f"{what} {folder} may be written by everybody, who could put other data there: take"
            f" that away (chmod o-w {folder}), or give another folder, which may lie in it"
        )


def read(path: Path, cure: str, most: int = LARGEST) -> bytes:
    """A whole file, where it is a regular one and not too large.

    Args:
        path: Of the file; a link is followed, as the caches of hubs are made of links.
        cure: What the user can do.
        most: Bytes beyond which it is refused.

    Returns:
        Its bytes.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is a folder, a device or a named pipe, too large, or cannot be read; TryAgain
            where the file system fails.
    """
    with opened(path, cure) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise UserError(f"{printable(str(path))} has {size:,} bytes, above {most:,}: {cure}")
        try:
            return file.read()
        except OSError as error:
            raise _unreadable(printable(str(path)), error, cure) from None


def opened(path: Path, cure: str) -> BufferedReader:
    """A regular file, open for reading; a link to one is followed.

    Args:
        path: Of the file.
        cure: What the user can do.

    Raises:
        FileNotFoundError: There is none.
        UserError: It is a folder, a device or a named pipe, or cannot be read; TryAgain where the
            file system fails.
    """
    place = printable(str(path))
    try:
        # Of a named pipe O_NONBLOCK does not wait for the writer.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise UserError(f"{place} is no regular file: {cure}")
        return open(handle, "rb")  # whoever calls closes it
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from None
    except ValueError:  # a NUL, or what cannot be a name here
        raise UserError(f"{place} can be no file's name: {cure}") from None
    except OSError as error:
        raise _unreadable(place, error, cure) from None


def _unreadable(place: str, error: OSError, cure: str) -> UserError:
    """What the system says of a file; of what passes the file itself is not to blame."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in PASSING:
        return TryAgain(f"{place} cannot be read ({reason}): launch again")
    return UserError(f"{place} cannot be read ({reason}): {cure}")


def nofollow(path: str, flags: int) -> int:
    """An opener for `open`: takes regular files alone, and no link in the last part of the path.

    Args:
        path: Of the file.
        flags: Of `os.open`.

    Returns:
        A descriptor.

    Raises:
        UserError: A link, a device, a named pipe.
        OSError: See `os.open`.
    """
    cure = "remove it, or take another folder"
    try:
        # A named pipe would be waited for without O_NONBLOCK, which regular files do not mind.
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UserError(f"{path} is a symbolic link, which is not followed: {cure}") from None
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise UserError(f"{path} is no regular file: {cure}") from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path} is no regular file: {cure}")
    return handle


def _exclusive(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def fresh(path: Path, mode: str = "w") -> IO[Any]:
    """A new file in place of what an earlier process, or somebody else, left there.

    A link is removed, not followed.

    Args:
        path: Of the file.
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        OSError: It cannot be made.
    """
    path.unlink(missing_ok=True)
    encoding = None if "b" in mode else "utf-8"
    # Whoever calls closes it.
    opened: IO[Any] = open(path, mode, encoding=encoding, opener=_exclusive)  # noqa: SIM115
    return opened


def fsync(*paths: Path) -> None:
    """Forces files, or folders' entries, to the disk."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
