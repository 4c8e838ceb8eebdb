"""DICOM files (PS3.10, one picture each) -> 8-bit grey or RGB, by pydicom.

Stored values become those of the modality (rescale slope and intercept, or its table), and are
shown through the window or table that the file names; or, where the set has one, by its range
(`depth`). MONOCHROME1 is inverted, palettes are looked up, YBR becomes RGB. Nothing but the pixels
is kept, and no message holds what a file says of a patient.
"""

import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from selfdistill.data.errors import UserError
from selfdistill.data.formats.depth import ROWS, Range, Seen, joined

if TYPE_CHECKING:
    from pydicom import Dataset

_DEFLATED = b"1.2.840.10008.1.2.1.99"
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
_TOOLS = "convert it (gdcmconv --raw), or install pylibjpeg and its plug-ins"
# They quote what is wrong, which may be a patient's name.
warnings.filterwarnings("ignore", module=r"pydicom\.")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

#: Raises ValueError where a picture of a width and a height is too large.
Limit = Callable[[tuple[int, int]], None]


def is_dicom(content: bytes) -> bool:
    """Whether a file begins as DICOM files do."""
    return content[128:132] == b"DICM"


@contextmanager
def _one_line() -> Iterator[None]:
    """Makes a ValueError of what pydicom raises on broken files, which is almost anything.

    The text is left out where it could quote the file.
    """
    try:
        yield
    except (UserError, MemoryError, ValueError):
        raise
    except Exception as error:
        raise ValueError(f"its DICOM data cannot be read ({type(error).__name__})") from None


def _opened(content: bytes, limit: Limit) -> "Dataset":
    """A file's elements; refuses what holds no one picture."""
    try:
        import pydicom
    except ImportError:
        raise UserError(
            "DICOM files need the package pydicom, which is not installed here:"
            " pip install selfdistill[dicom]"
        ) from None
    if _DEFLATED in content:  # pydicom would inflate it whatever comes out
        raise ValueError("its DICOM data are deflated: convert it (gdcmconv --raw)")
    try:
        ds = pydicom.dcmread(BytesIO(content))
        if not any(name in ds for name in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise LookupError
        frames = int(ds.get("NumberOfFrames") or 1)
        size = int(ds.Columns), int(ds.Rows)
    except LookupError:
        raise ValueError("it has no pixel data: leave it out") from None
    except ValueError:  # which quotes the value
        raise ValueError("its DICOM data cannot be read") from None
    if frames != 1:
        raise ValueError(f"it has {frames} frames: write each into a file of its own")
    limit(size)
    return ds


def _pixels(ds: "Dataset") -> NDArray[Any]:
    """Stored values [H, W], or RGB [H, W, 3]."""
    from pydicom.pixels.utils import pixel_array

    syntax = ds.file_meta.TransferSyntaxUID
    try:
        return pixel_array(ds)
    except (RuntimeError, NotImplementedError):  # no decoder, or none that can
        name = str(syntax.name)[:80]
        raise ValueError(f"its compression ({name}) cannot be decoded here: {_TOOLS}") from None
    except ValueError:
        raise ValueError("its pixel data are cut short or broken") from None


def _has_window(ds: "Dataset") -> bool:
    tables = ds.get("VOILUTSequence")
    return bool(tables) or None not in (ds.get("WindowCenter"), ds.get("WindowWidth"))


def _is_deep(ds: "Dataset") -> bool:
    """Whether a grey picture's values are not simply those of 8 bits."""
    slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
    rescaled = None not in (slope, intercept) and (float(slope), float(intercept)) != (1, 0)
    tables = bool(ds.get("ModalityLUTSequence"))
    return rescaled or tables or _has_window(ds) or int(ds.get("BitsStored") or 32) > 8


def _grey(ds: "Dataset") -> bool:
    return str(ds.get("PhotometricInterpretation")) in ("MONOCHROME1", "MONOCHROME2")


def _looked_up(ds: "Dataset", table: "Dataset", found: NDArray[Any]) -> NDArray[np.int64]:
    """Values through a table (PS3.3 C.11.1.1.1); pydicom wraps those of 8 bits round at 256."""
    count, first, _ = (int(one) for one in table.LUTDescriptor)
    data = table.LUTData
    if isinstance(data, bytes):
        order = "<" if ds.original_encoding[1] else ">"
        data = np.frombuffer(data, "u1" if len(data) == count else f"{order}u2")
    entries = np.asarray(data, np.int64)[: count or 2**16]
    at = np.rint(found).astype(np.int64) - first
    found = entries[at.clip(0, len(entries) - 1)]
    return np.asarray(found)


def _modality(ds: "Dataset", stored: NDArray[Any]) -> NDArray[Any]:
    """Values of the modality, such as Hounsfield units."""
    if ds.get("ModalityLUTSequence"):
        return _looked_up(ds, ds.ModalityLUTSequence[0], stored)
    slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
    if slope is None or intercept is None:
        found = stored
    else:
        found = stored.astype(np.float64) * float(slope) + float(intercept)
    if not np.isfinite(found).all():
        raise ValueError("it has pixels that are no numbers (NaN or infinite)")
    return found


def _parts(pixels: NDArray[Any]) -> Iterator[slice]:
    """Rows that are computed at a time, so that large pictures need little memory."""
    rows = max(1, ROWS // max(1, pixels.shape[1]))
    yield from (slice(top, top + rows) for top in range(0, pixels.shape[0], rows))


def values(content: bytes, limit: Limit) -> Seen | None:
    """The values of a grey picture; None of colours and of plain 8 bits.

    Args:
        content: The file.
        limit: Of its size.

    Raises:
        ValueError: It cannot be read.
    """
    with _one_line():
        ds = _opened(content, limit)
        if not _grey(ds) or not _is_deep(ds):
            return None
        stored, padding = _pixels(ds), ds.get("PixelPaddingValue")
        found = []
        for part in _parts(stored):
            inside = _modality(ds, stored[part])
            if padding is not None:
                inside = inside[stored[part] != int(padding)]
            if inside.size:
                whole = bool((inside == np.rint(inside)).all())
                found.append(Seen(float(inside.min()), float(inside.max()), whole))
        if not found:
            return None
        return joined(found)._replace(windows=int(_has_window(ds)), pictures=1)


def _levels(ds: "Dataset", stored: NDArray[Any], span: Range | None) -> NDArray[np.uint8]:
    """Values of a grey picture in 8 bits."""
    from pydicom.pixels.processing import apply_windowing

    found = _modality(ds, stored)
    if span is not None and _is_deep(ds):
        black, white = span
    elif ds.get("VOILUTSequence"):
        table = ds.VOILUTSequence[0]
        found = _looked_up(ds, table, found)
        black, white = 0.0, 2.0 ** int(table.LUTDescriptor[2]) - 1
    elif _has_window(ds):
        ends = np.array([-1e30, 1e30])
        with np.errstate(over="ignore"):
            try:
                found = apply_windowing(found.astype(np.float64), ds)
                black, white = apply_windowing(ends, ds).tolist()
            except ValueError:
                raise ValueError(
                    "its window has no width: give the range of the values when packing (--range"
                    " auto, or LOW,HIGH)"
                ) from None
    else:
        bits, signed = int(ds.BitsStored), int(ds.PixelRepresentation)
        least = -(2 ** (bits - 1)) if signed else 0
        bounds = np.array([least, least + 2**bits - 1], stored.dtype)
        black, white = sorted(map(float, _modality(ds, bounds)))
    return _bytes(found, black, white)


def _bytes(found: NDArray[Any], black: float, white: float) -> NDArray[np.uint8]:
    """Values from 0 to 255."""
    if black == white or not math.isfinite(255 / (white - black)):
        raise ValueError("its values have no range")
    levels = np.rint((found.astype(np.float64) - black) * (255 / (white - black)))
    return levels.clip(0, 255).astype(np.uint8)


def _shown(ds: "Dataset", span: Range | None) -> NDArray[np.uint8]:
    """A grey picture."""
    stored = _pixels(ds)
    if stored.ndim != 2:
        raise ValueError("its grey values are not one channel: convert it")
    return np.concatenate([_levels(ds, stored[part], span) for part in _parts(stored)])


def _coloured(ds: "Dataset") -> NDArray[np.uint8]:
    """A picture with colours."""
    from pydicom.pixels.processing import apply_color_lut

    kind = str(ds.get("PhotometricInterpretation"))
    palette = kind == "PALETTE COLOR" and "RedPaletteColorLookupTableData" in ds
    if not palette and kind not in _COLOURS:
        raise ValueError("its photometric interpretation is none that is read here: convert it")
    stored, shown = _pixels(ds), []
    for part in _parts(stored):
        found: NDArray[Any] = stored[part]
        bits = int(ds.BitsStored)
        if palette:
            found = apply_color_lut(found, ds)[..., :3]
            bits = 8 * found.dtype.itemsize
        if found.ndim != 3 or found.shape[2] != 3 or not 1 <= bits <= 32:
            raise ValueError("its colours are not three channels: convert it")
        shown.append(np.asarray(found, np.uint8) if bits == 8 else _bytes(found, 0, 2.0**bits - 1))
    return np.concatenate(shown)


def read(content: bytes, span: Range | None, limit: Limit) -> Image.Image:
    """A DICOM file as mode L or RGB.

    Args:
        content: The file.
        span: Range of the set, in values of the modality; None to take the file's window.
        limit: Of its size.

    Raises:
        ValueError: It cannot be read.
        UserError: pydicom is not installed.
    """
    with _one_line():
        ds = _opened(content, limit)
        if not _grey(ds):
            return Image.fromarray(np.ascontiguousarray(_coloured(ds)))
        levels = _shown(ds, span)
        inverted = ds.PhotometricInterpretation == "MONOCHROME1"
        return Image.fromarray(np.ascontiguousarray(255 - levels if inverted else levels))
