"""Files that other programs leave beside data: never a part of it."""

from pathlib import PurePath

# Of macOS, Windows, Synology and QNAP disks, ext4, Python. Hidden ones need no name here.
_NAMES = (
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "$recycle.bin",
    "system volume information",
    "@eadir",
    "#recycle",
    "lost+found",
    "__pycache__",
)


def is_stray(path: str | PurePath) -> bool:
    """Whether a path is another program's leaving (``__MACOSX/``, ``._x.jpg``, ``.git/``, ...).

    Args:
        path: Of a file or folder, below the folder that the user named.
    """
    return any(
        part.casefold().startswith(_NAMES) or (part.startswith(".") and part not in (".", ".."))
        for part in PurePath(path).parts
    )
