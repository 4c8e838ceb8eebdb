"""The official archive file itself in place of the folder it extracts to."""

import errno
import functools
import lzma
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.data.formats.strays import is_stray
from selfdistill.data.splits import ALIASES

_ZSTD = (".tar.zst", ".tzst")
SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", *_ZSTD, ".zip")
_PIECE = 2**20
#: The flag of a zip's entry whose name is in UTF-8.
_UTF8 = 0x800


def is_archive(path: Path) -> bool:
    """Whether a path is a file with an archive's name."""
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


@contextmanager
def opened(root: Path, scratch: Path) -> Iterator[Path]:
    """The folder to read: `root` itself, or a temporary one with the archive's files.

    Nothing is written outside the temporary folder, whatever the names in the archive (PEP 706's
    ``data`` filter for tars; zipfile drops ``..`` and leading slashes itself). Links are refused:
    one that leads to another could lead outside. The folder is removed in the end.

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
    while True:
        inside = [path for path in folder.iterdir() if not is_stray(path.name)]
        if len(inside) != 1 or not inside[0].is_dir() or inside[0].name.lower() in ALIASES:
            return folder
        folder = inside[0]


def _check_end(tar: tarfile.TarFile) -> None:
    """Refuses a tar of which tarfile read a part: it ends in silence at a broken or cut header."""
    file = tar.fileobj
    assert file is not None
    file.seek(tar.offset)
    at, rest = tar.offset, file.read(tarfile.BLOCKSIZE)
    if len(rest) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it ends at byte {at}, within a header or without end mark")
    while rest:
        if rest.strip(b"\0"):
            raise tarfile.ReadError(f"what stands at byte {at} is no tar header")
        at += len(rest)
        rest = file.read(2**20)


def _link(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} holds a link, {name!r}, which could lead outside its folder: extract it yourself,"
        " and pack the folder"
    )


def _no_link(path: Path, member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
    if member.issym() or member.islnk():
        raise _link(path, member.name)
    return tarfile.data_filter(member, folder)


def _unpacked(path: Path, folder: Path) -> Path:
    """A tar without its Zstandard compression, which tarfile does not know."""
    try:
        import zstandard
    except ImportError:
        raise UserError(
            f"{path} is compressed by Zstandard, and the package zstandard is not installed here:"
            " pip install selfdistill[zstd], or decompress it yourself (zstd -d)"
        ) from None
    made = folder / ".whole.tar"  # hidden: no part of the data
    try:
        with path.open("rb") as file, made.open("wb") as out:
            reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
            shutil.copyfileobj(reader, out, _PIECE)
    except zstandard.ZstdError as error:
        raise UserError(
            f"{path} is broken or cut short ({error}): take the official archive again"
        ) from None
    return made


def _extract(path: Path, folder: Path) -> None:
    if path.name.lower().endswith(_ZSTD):
        made = _unpacked(path, folder)
        _extract_plain(path, made, folder)
        made.unlink(missing_ok=True)
    else:
        _extract_plain(path, path, folder)


def _extract_plain(path: Path, content: Path, folder: Path) -> None:
    """Extracts what `content` holds of the archive that the user knows as `path`."""
    try:
        if path.name.lower().endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                wanted = [info for info in archive.infolist() if not is_stray(info.filename)]
                for info in wanted:
                    if stat.S_ISLNK(info.external_attr >> 16):
                        raise _link(path, info.filename)
                    if not info.flag_bits & _UTF8:  # macOS writes UTF-8, and does not say so
                        with suppress(UnicodeError):
                            info.filename = info.filename.encode("cp437").decode()
                archive.extractall(folder, members=wanted)
        else:
            with tarfile.open(content, "r" if content is path else "r:") as tar:
                tar.extractall(folder, filter=functools.partial(_no_link, path))
                _check_end(tar)
    except tarfile.FilterError as error:
        raise UserError(f"{path} leads outside its folder ({error}): do not use it") from None
    except (RuntimeError, NotImplementedError) as error:  # zipfile's: encrypted, another method
        raise UserError(
            f"{path} cannot be read ({error}): extract it yourself, and pack the folder"
        ) from None
    except OSError as error:
        if error.errno not in (None, errno.EINVAL):  # none: gzip; EINVAL: a place before the file
            raise
        raise UserError(f"{path} is broken: take the official archive again") from None
    except (
        *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
        *(ValueError, OverflowError, LookupError, struct.error),  # of parsers of their headers
    ) as error:
        raise UserError(
            f"{path} is broken or cut short ({error}): take the official archive again"
        ) from None
