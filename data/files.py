"""Opens files in folders that others may write to: run folders, caches.

A link that somebody left there could lead anywhere. It is neither followed nor written through.
"""

import errno
import os
import stat
from pathlib import Path
from typing import IO, Any

from selfdistill.data.errors import UserError


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
