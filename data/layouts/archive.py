"""The official archive file itself in place of the folder it extracts to."""

import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.errors import UserError
from data.layouts.base import is_stray
from data.manifest import DIVIDED

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")


def is_archive(path: Path) -> bool:
    """Whether a path is a file with an archive's name."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


@contextmanager
def opened(root: Path, scratch: Path) -> Iterator[Path]:
    """The folder to read: `root` itself, or a temporary one with the archive's files.

    Nothing is written outside the temporary folder, whatever the names in the archive (PEP 706's
    ``data`` filter for tars; zipfile drops ``..`` and leading slashes itself). It is removed in
    the end.

    Args:
        root: A folder or an archive file.
        scratch: Where the temporary folder is made: on the disk of the output, which has to hold a
            data set anyway, and not in a ``/tmp`` that may be memory.

    Yields:
        The folder.

    Raises:
        UserError: The archive is broken or holds a path that leads outside.
    """
    if not is_archive(root):
        yield root
        return
    scratch.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".extracted-", dir=scratch))
    try:
        _extract(root, folder)
        yield _innermost(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _innermost(folder: Path) -> Path:
    """The folder that an archive wraps everything in, if it does; but never a split's."""
    inside = list(folder.iterdir())
    while len(inside) == 1 and inside[0].is_dir() and inside[0].name.lower() not in DIVIDED:
        folder = inside[0]
        inside = list(folder.iterdir())
    return folder


def _extract(path: Path, folder: Path) -> None:
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if not is_stray(name)]
                archive.extractall(folder, members=names)
        else:
            with tarfile.open(path) as tar:
                tar.extractall(folder, filter="data")
    except tarfile.FilterError as error:
        raise UserError(f"{path} leads outside its folder ({error}): do not use it") from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(
            f"{path} is broken or cut short ({error}): take the official archive again"
        ) from None
