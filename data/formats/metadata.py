"""What stands in an image file beside the picture: profiles, texts, the camera's notes.

Pillow refuses whole pictures for it: two megabytes of text, a colour profile cut short. The same
file without it has the same pixels. The orientation (EXIF) stays, where it is as it should be.
"""

import struct
import zlib
from collections.abc import Iterator

from selfdistill.data.formats.png import METADATA, SIGNATURE

_WEBP = {b"ICCP", b"XMP "}
# TIFF: what pixels and orientation hang on (TIFF 6.0, and JPEG's technical note 2).
_TIFF = {*range(254, 267), 266, 273, 274, *range(277, 281), 284, 292, 293, 317, 318, 319, 320}
_TIFF |= {*range(322, 326), 332, 334, *range(336, 342), 347, *range(512, 522), *range(529, 533)}


def without(content: bytes) -> bytes | None:
    """The same picture less what is not the picture.

    Args:
        content: An image file.

    Returns:
        The file; None where there is nothing to leave out, or the format is not one of PNG, JPEG,
        WebP and TIFF.
    """
    parts: Iterator[bytes]
    if content.startswith(SIGNATURE):
        parts = _png(content)
    elif content.startswith(b"\xff\xd8"):
        parts = _jpeg(content)
    elif content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        parts = _webp(content)
    elif content[:4] in (b"II*\0", b"MM\0*"):
        parts = _tiff(content)
    else:
        return None
    try:
        bare = b"".join(parts)
    except (struct.error, IndexError):
        return None
    return None if bare == content else bare


def _png(content: bytes) -> Iterator[bytes]:
    """All chunks but `METADATA`; an eXIf whose checksum is right stays."""
    at = len(SIGNATURE)
    yield content[:at]
    while at + 12 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        chunk = content[at : at + size + 12]
        whole = chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4, "big")
        if kind not in METADATA or (kind == b"eXIf" and whole):
            yield chunk
        at += len(chunk)


def _jpeg(content: bytes) -> Iterator[bytes]:
    """All segments but comments and what applications add, save EXIF (1) and Adobe's colours."""
    at = 2
    yield content[:at]
    while content[at] == 0xFF and content[at + 1] != 0xDA:
        marker = content[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        bare = marker == 0x01 or 0xD0 <= marker <= 0xD8
        end = at + 2 + (0 if bare else struct.unpack_from(">H", content, at + 2)[0])
        kept = content[at + 4 : at + 8] == b"Exif" if marker == 0xE1 else marker == 0xEE
        if kept or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            yield content[at:end]
        at = end
    yield content[at:]


def _webp(content: bytes) -> Iterator[bytes]:
    """All chunks but those of `_WEBP`."""
    chunks, at = [], 12
    while at + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, at)
        end = at + 8 + size + size % 2
        if kind not in _WEBP:
            chunks.append(content[at:end])
        at = end
    if chunks and chunks[0].startswith(b"VP8X"):
        head = bytearray(chunks[0])
        head[8] &= ~0x24  # it has neither profile nor XMP any more
        chunks[0] = bytes(head)
    body = b"".join([b"WEBP", *chunks])
    yield struct.pack("<4sI", b"RIFF", len(body)) + body


def _tiff(content: bytes) -> Iterator[bytes]:
    """The first picture, its other tags left out in place: nothing in the file moves."""
    order = "<" if content[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, at)
    entries = [content[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    kept = [e for e in entries if struct.unpack_from(f"{order}H", e)[0] in _TIFF]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    room = 2 + 12 * count + 4
    yield content[:at] + directory.ljust(room, b"\0") + content[at + room :]
