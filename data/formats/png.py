"""PNG files: their checksums, and the short way to the pixels of the plain ones.

With checksums, an image of 64 pixels takes 177 microseconds this way, and 209 by `Image.open`
(docs/performance-log.md, the loader).
"""

from __future__ import annotations

import math
import struct
import threading
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Chunks that are not the picture: texts, the camera's notes, colour profiles, sizes in print.
METADATA = frozenset(
    b"tEXt zTXt iTXt eXIf tIME pHYs iCCP sRGB gAMA cHRM cICP sBIT bKGD hIST sPLT".split()
)
_CHUNK = struct.Struct(">I4s")
# Of the header, after 16 bytes: width, height; bits, colour, compression, filter, interlacing.
_HEADER = struct.Struct(">16xII5B")
_PLAIN_MODES = {(8, 0, 0, 0, 0): "L", (8, 2, 0, 0, 0): "RGB"}
_PLAIN_CHUNKS = {b"IHDR", b"IDAT", b"IEND"}
_FIRST = _CHUNK.pack(13, b"IHDR")
# Of Adam7's passes: the first column and row, and the steps to the next.
_ADAM7 = (
    *((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2)),
    (0, 1, 1, 2),
)
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_PIECE = 2**20
_UNTOUCHED = 0x5A  # what a row that was not decoded shows; few are all of it
_KEPT = 2**20  # pixels, up to which an image stays to be decoded into


def check(content: bytes) -> tuple[set[bytes], bytes]:
    """Checks the CRC of every chunk that is of the picture, which Pillow does not of pixel data.

    Args:
        content: The whole file.

    Returns:
        The kinds of its chunks, and the compressed pixels.

    Raises:
        ValueError: A chunk is broken, or the end is missing.
    """
    at, kinds, parts = len(SIGNATURE), set(), []
    view = memoryview(content)
    while at + 12 <= len(content):
        size, kind = _CHUNK.unpack_from(content, at)
        end = at + 8 + size
        if end + 4 > len(content):
            break
        wrong = zlib.crc32(view[at + 4 : end]) != int.from_bytes(view[end : end + 4], "big")
        if wrong and kind not in METADATA:
            raise ValueError(f"the checksum of its chunk {kind.decode('latin-1')} is wrong")
        kinds.add(kind)
        if kind == b"IHDR" and (size != 13 or at != len(SIGNATURE)):
            raise ValueError("its header is broken")
        if kind == b"IDAT":
            parts.append(view[at + 8 : end])
        elif kind == b"IEND":
            return kinds, b"".join(parts)
        at = end + 4
    raise ValueError("it ends too early")


def size(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG that `check` has passed."""
    width, height, *_ = _HEADER.unpack_from(content)
    return width, height


def check_rows(content: bytes) -> None:
    """Refuses a PNG with fewer rows than its header says: Pillow leaves the others black.

    Args:
        content: The whole file, not larger than it may be.

    Raises:
        ValueError: Rows are missing, or cannot be decompressed.
    """
    _, compressed = check(content)
    width, height, bits, colour, _, _, interlaced = _HEADER.unpack_from(content)
    wanted = 0
    for left, top, across, down in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            wanted += rows * (1 + -(-columns * bits * _CHANNELS.get(colour, 1) // 8))
    inflate, found = zlib.decompressobj(), 0
    try:
        part = inflate.decompress(compressed, _PIECE)
        while part and found < wanted:
            found += len(part)
            part = inflate.decompress(inflate.unconsumed_tail, _PIECE)
    except zlib.error as error:
        raise ValueError(f"its pixels cannot be decompressed ({error})") from None
    if found < wanted:
        raise ValueError(f"it has {found} bytes of pixels, its size asks for {wanted}")


class _Canvas(threading.local):
    """The image that this thread decoded last: quicker to use again than another is to make."""

    image: Image.Image | None = None

    def of(self, mode: str, size: tuple[int, int]) -> Image.Image:
        """An image whose last row, where it is not decoded, shows `_UNTOUCHED`."""
        image = self._any(mode, size)
        width, height = size
        image.paste(
            _UNTOUCHED if mode == "L" else (_UNTOUCHED,) * 3, (0, height - 1, width, height)
        )
        return image

    def _any(self, mode: str, size: tuple[int, int]) -> Image.Image:
        image = self.image
        if image is not None and image.mode == mode and image.size == size:
            return image
        image = Image.new(mode, size)
        if math.prod(size) <= _KEPT:
            self.image = image
        return image


_canvas = _Canvas()


def plain(content: bytes) -> NDArray[np.uint8] | None:
    """The pixels of a PNG as `images.prepare` writes them, without Pillow's reader of chunks.

    Those have 8 bits, grey or RGB, rows in order, and no chunk that could change what pixels mean.
    Pillow's decompressor gets the pixels at once; its reader, in Python, takes a tenth of a small
    image's time.

    Args:
        content: The whole file.

    Returns:
        [H, W] or [H, W, 3]; None where the whole of Pillow must look: the file is of another kind,
        or its pixels are broken.

    Raises:
        ValueError: See `check`.
    """
    kinds, compressed = check(content)
    if kinds != _PLAIN_CHUNKS or not content.startswith(_FIRST, len(SIGNATURE)):
        return None
    width, height, *kind = _HEADER.unpack_from(content)
    mode, most = _PLAIN_MODES.get(tuple(kind)), Image.MAX_IMAGE_PIXELS
    if mode is None or not 0 < width * height <= (most or math.inf):
        return None
    try:
        image = _canvas.of(mode, (width, height))
        image.frombytes(compressed, "zip", mode, 0)
    except (ValueError, OSError, MemoryError):
        return None
    pixels = np.frombuffer(image.tobytes(), np.uint8)
    if pixels[-1] == _UNTOUCHED and (pixels[-width:] == _UNTOUCHED).all():
        check_rows(content)
    return pixels.reshape(height, width, *(() if mode == "L" else (3,)))
