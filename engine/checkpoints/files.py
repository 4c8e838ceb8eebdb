"""Files that are whole or not there: written beside their place, forced to the disk, renamed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from selfdistill.data.files import fresh


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Forces a file, or a folder's entries, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: temporary, fsynced, renamed."""
    draft = path.with_name(f".{path.name}.tmp")
    with fresh(draft) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    fsync(path.parent)
