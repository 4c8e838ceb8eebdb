"""Files that are whole or not there: written beside their place, forced to the disk, renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from selfdistill.data.files import fresh, fsync, opened


def sha256(path: Path) -> str:
    """Hex digest of a regular file."""
    with opened(path, "remove it") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Deletes a folder with all in it, or whatever else somebody put in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: temporary, fsynced, renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Likewise."""
    draft = path.with_name(f".{path.name}.tmp")
    with fresh(draft, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    fsync(path.parent)
