"""Where the members of a tar lie, and whether a header is whole."""

import hashlib
import posixpath
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from selfdistill.data.formats.strays import is_stray

BLOCK = tarfile.BLOCKSIZE  # 512: headers and paddings are multiples of it

_HEADER = struct.Struct("100s24x12s12x8s356x")  # name, size and checksum; see tar(5)
_ZEROS = bytes(BLOCK)
_CHUNK = 2**20

_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
# What a tar may hold beside files and links, without contents of its own; V is a volume's label.
_EMPTY = (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b"V")
# Headers of a header: GNU's long names, and the records of pax, of the next member or of all.
_LONG = {tarfile.GNUTYPE_LONGNAME: "path", tarfile.GNUTYPE_LONGLINK: "linkpath"}
_RECORDS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_RECORD = re.compile(rb"(\d{1,10}) ([^=]+)=", re.DOTALL)

# WebDataset's naming: the key ends at the first dot of the base name.
_NAME = re.compile(r"^((?:.*/)?[^/.]+)\.([^/]*)$", re.DOTALL)
# WebDataset's own notes, as in webdataset.tariterators.
_META = re.compile(r"__[^/]*__($|/)")


class Member(NamedTuple):
    """One file in a tar: its name, and where its bytes are (offset and length in bytes)."""

    name: str
    offset: int
    size: int


class _Entry(NamedTuple):
    """A file, or a link to one (its offset and size are 0) with what it names."""

    name: str
    offset: int
    size: int
    target: str | None


def scan(path: Path) -> list[Member]:
    """The files of an uncompressed tar, in order; a link is the file that it names.

    Read to the last byte, and stricter than tarfile and GNU tar, which end in silence where a copy
    broke off and pass over what is broken: every block is a whole header, contents, or of zeros;
    the end mark is there; behind it comes nothing, or another tar (`cat a.tar b.tar`), read too.

    Args:
        path: The tar.

    Returns:
        Its members.

    Raises:
        tarfile.ReadError: It is not whole, or holds what cannot be read by place: says at which
            byte.
    """
    with path.open("rb") as file:
        entries = list(_entries(file, path.stat().st_size))
    places = {posixpath.normpath(entry.name): entry for entry in entries}
    return [
        Member(entry.name, *_place(entry, places))
        for entry in entries
        # A link that can be no part of a sample may lead anywhere.
        if entry.target is None or of_sample(entry.name)
    ]


def _entries(file: BinaryIO, total: int) -> Iterator[_Entry]:
    """Files and links, as they stand in the tar."""
    at = 0
    own: dict[str, str] = {}
    shared: dict[str, str] = {}
    while True:
        file.seek(at)
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            raise tarfile.ReadError(f"it ends at byte {total}, within a header or without end mark")
        if block == _ZEROS:
            if own:
                raise tarfile.ReadError(f"it ends at byte {at}, amid a member's headers")
            following = _beyond_zeros(file)
            if following is None:
                return
            at, shared = following, {}
            continue
        if not own and not shared and (plain := _plain(block)):
            begin = at + BLOCK
            if begin + plain.size > total:
                raise tarfile.ReadError(f"it ends at byte {total}, within {plain.name}")
            at = begin + -(-plain.size // BLOCK) * BLOCK
            yield _Entry(plain.name, begin, plain.size, None)
            continue
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError:
            raise tarfile.ReadError(f"what stands at byte {at} is no tar header") from None
        given = shared | own
        name, begin = given.get("path", info.name), at + BLOCK
        size = 0 if info.type in (*_LINKS, *_EMPTY) else int(given.get("size", info.size))
        if size < 0 or begin + size > total:
            raise tarfile.ReadError(f"it ends at byte {total}, within {name}")
        at = begin + -(-size // BLOCK) * BLOCK
        if info.type in _LONG or info.type in (*_RECORDS, tarfile.XGLTYPE):
            if size > _CHUNK:
                raise tarfile.ReadError(f"the header at byte {begin} goes on for {size} bytes")
            content = file.read(size)
            if info.type in _LONG:
                text = content.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
                own[_LONG[info.type]] = text
            elif info.type == tarfile.XGLTYPE:
                shared.update(_records(content, begin))
            else:
                own.update(_records(content, begin))
            continue
        if info.type in _LINKS:
            target = given.get("linkpath", info.linkname)
            if info.type == tarfile.SYMTYPE and not target.startswith("/"):
                target = posixpath.join(posixpath.dirname(name), target)
            yield _Entry(name, 0, 0, target)
        elif info.type in _FILES and not any(key.startswith("GNU.sparse") for key in given):
            try:
                same = parse_header(block).size == size
            except ValueError:
                raise tarfile.ReadError(f"the header at byte {begin - BLOCK} is broken") from None
            if not same:
                raise tarfile.ReadError(
                    f"the header of {name} at byte {begin - BLOCK} gives another size than its pax"
                    " record"
                )
            if not name.endswith("/"):  # a folder, in the tars of the seventies
                yield _Entry(name, begin, size, None)
        elif info.type not in _EMPTY:
            raise tarfile.ReadError(
                f"{name} at byte {begin - BLOCK} is stored in parts (sparse, or of several volumes)"
                " or of a kind unknown here: make the tar anew without such"
            )
        own = {}


def _plain(block: bytes) -> Member | None:
    """The file of a header that says no more than a name and a size, as most do; else None.

    A tenth of what TarInfo.frombuf takes, which tells of all others.
    """
    # Byte 156 is the type, from 345 on stands what goes before a long name.
    if block[156] not in b"0\0" or block[345] or not block.isascii():
        return None
    try:
        found = parse_header(block)
    except ValueError:
        return None
    return None if found.size < 0 or found.name.endswith("/") else found


def _beyond_zeros(file: BinaryIO) -> int | None:
    """The next block that has anything but zeros; None where the file has no more."""
    while chunk := file.read(_CHUNK):
        if rest := chunk.lstrip(b"\0"):
            at = file.tell() - len(rest)
            return at - at % BLOCK
    return None


def _records(content: bytes, at: int) -> dict[str, str]:
    """The records of a pax header: "LENGTH KEY=VALUE" and a newline, each.

    Args:
        content: Of the header.
        at: Where that stands, for messages.

    Raises:
        tarfile.ReadError: They are broken.
    """
    found: dict[str, str] = {}
    begin = 0
    while begin < len(content):
        match = _RECORD.match(content, begin)
        end = begin + int(match[1]) if match else 0
        if match is None or end <= match.end() or content[end - 1 : end] != b"\n":
            raise tarfile.ReadError(f"the pax header at byte {at} is broken")
        key = match[2].decode("utf-8", "backslashreplace")
        found[key] = content[match.end() : end - 1].decode("utf-8", "backslashreplace")
        begin = end
    if not re.fullmatch("[0-9]{1,18}", found.get("size", "0")):
        raise tarfile.ReadError(f"the pax header at byte {at} is broken")
    return found


def _place(entry: _Entry, places: dict[str, _Entry]) -> tuple[int, int]:
    """Offset and size of a file, or of the one that a link leads to."""
    found, seen = entry, {entry.name}
    while found.target is not None:
        following = places.get(posixpath.normpath(found.target))
        if following is None or following.name in seen:
            where = "in a circle" if following else f"to {found.target}, which is no file in it"
            raise tarfile.ReadError(
                f"the link {entry.name} leads {where}: make the tar anew with files in place of"
                " links (tar --dereference --hard-dereference)"
            )
        found = following
        seen.add(found.name)
    return found.offset, found.size


def of_sample(name: str) -> bool:
    """Whether a member may be part of a sample.

    It is none without an extension, among WebDataset's own notes (``__index__``), or left by
    another program.
    """
    return split_name(name) is not None and _META.match(name) is None and not is_stray(name)


def beside(folder: Path) -> list[Path]:
    """The tars of a folder, in order of their names; none where there is no such folder."""
    found = folder.iterdir() if folder.is_dir() else []
    return sorted(
        path
        for path in found
        if path.suffix.lower() == ".tar" and path.is_file() and not is_stray(path.name)
    )


def split_name(name: str) -> tuple[str, str] | None:
    """A member's WebDataset key and its lower-case extension; None for names without one."""
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum(block: bytes) -> int:
    """Sum of a block's bytes."""
    # The low half of Adler-32 is 1 plus that sum, modulo 65521: 0.3 us in place of 4. 512 bytes
    # whose sum might be greater are added one by one: they have one above 127, which ASCII has not.
    if len(block) == BLOCK and block.isascii():
        return (zlib.adler32(block) & 0xFFFF) - 1
    return sum(block)


def parse_header(block: bytes) -> Member:
    """Name and size in a tar header, its checksum tested.

    Args:
        block: The 512 bytes before a member's data.

    Returns:
        The member, with offset -1; the name may be cut at 100 characters.

    Raises:
        ValueError: This is not a whole header.
    """
    # By hand where it can be: TarInfo.frombuf takes 30 us, a tenth of a small image's whole cost.
    try:
        name, size, checksum = _HEADER.unpack(block)
        if _sum(block) - sum(checksum) + 256 != int(checksum.strip(b" \0"), 8):
            raise ValueError
        if not size[0] & 0x80:
            return Member(
                name.split(b"\0", 1)[0].decode("utf-8", "replace"), -1, int(size.strip(b" \0"), 8)
            )
        info = tarfile.TarInfo.frombuf(block, "utf-8", "replace")  # 8 GB and more
    except (tarfile.HeaderError, ValueError, struct.error):
        raise ValueError("its tar header is broken") from None
    return Member(info.name, -1, info.size)
