"""DICOM files: values and windows after PS3.3, colours, what is refused, and what must not leak."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut
from pydicom.pixels.utils import pixel_array
from pydicom.uid import ExplicitVRLittleEndian

from selfdistill.data.formats import dicom, images
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from tests.data.formats.test_depth import same, stored
from tests.kit.command import call
from tests.kit.launches import ROOT

RANDOM = np.random.default_rng(0)
VALUES = RANDOM.integers(0, 4096, (6, 5), dtype=np.uint16)
PATIENT = "Geheim^Person"


def made(values: np.ndarray, bits: int = 12, kind: str = "MONOCHROME2", **elements: Any) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    ds.PatientName, ds.PatientID = PATIENT, "ID-4711"
    ds.Rows, ds.Columns = values.shape[:2]
    ds.SamplesPerPixel = 3 if values.ndim == 3 else 1
    if values.ndim == 3:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = kind
    ds.BitsAllocated = 8 * values.dtype.itemsize
    ds.BitsStored, ds.HighBit = bits, bits - 1
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    ds.PixelData = values.tobytes() + b"\0" * (values.nbytes % 2)
    for name, value in elements.items():
        setattr(ds, name, value)
    return ds


def file(ds: Dataset) -> bytes:
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


def shown(ds: Dataset, **options: Any) -> np.ndarray:
    found = images.decode(file(ds), None, **options)
    return found[0] if (found[0] == found).all() else found.transpose(1, 2, 0)


def linear(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """The function LINEAR of PS3.3 C.11.2.1.2.1, onto 0 to 255."""
    inside = ((values - (centre - 0.5)) / (width - 1) + 0.5) * 255
    inside[values <= centre - 0.5 - (width - 1) / 2] = 0
    inside[values > centre - 0.5 + (width - 1) / 2] = 255
    return np.rint(inside).astype(np.uint8)


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (2.5, 0), (-1, 100)])
def test_rescaled_values_through_a_window(slope: float, intercept: float) -> None:
    ds = made(VALUES, RescaleSlope=slope, RescaleIntercept=intercept)
    ds.WindowCenter, ds.WindowWidth = [40, 300], [400, 1500]
    right = linear(VALUES.astype(float) * slope + intercept, 40, 400)
    assert np.array_equal(shown(ds), right)
    assert 0 < right.mean() < 255
    ds.PhotometricInterpretation = "MONOCHROME1"
    assert np.array_equal(shown(ds), 255 - right)


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_functions_of_windows(function: str) -> None:
    ds = made(VALUES, WindowCenter=2000, WindowWidth=1000, VOILUTFunction=function)
    at = VALUES.astype(float)
    right = {
        "LINEAR_EXACT": ((at - 2000) / 1000 + 0.5).clip(0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (at - 2000) / 1000)),
    }[function]
    assert np.array_equal(shown(ds), np.rint(255 * right))


def test_without_a_window_the_stored_bits_are_the_range() -> None:
    assert np.array_equal(shown(made(VALUES)), np.rint(VALUES * (255 / 4095)))
    signed = VALUES.astype(np.int16) - 2048
    assert np.array_equal(shown(made(signed)), np.rint(VALUES * (255 / 4095)))
    plain = (VALUES // 16).astype(np.uint8)
    assert np.array_equal(shown(made(plain, 8)), plain)
    assert np.array_equal(shown(made(plain, 8), span=(0, 9)), plain)


def test_a_range_in_place_of_the_window() -> None:
    ds = made(VALUES, WindowCenter=1, WindowWidth=9, RescaleSlope=1, RescaleIntercept=-1000)
    right = np.rint((VALUES.astype(float) - 1000) / 2000 * 255).clip(0, 255)
    assert np.array_equal(shown(ds, span=(0, 2000)), right)


def test_tables_of_values() -> None:
    """Modality and VOI tables: the first maps stored values, the second what comes out."""
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 16], list(range(4095, -1, -1))
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    shades = Dataset()
    shades.LUTDescriptor, shades.LUTData = [4096, 0, 8], [i // 16 for i in range(4096)]
    shades["LUTDescriptor"].VR = shades["LUTData"].VR = "US"
    ds = made(VALUES, ModalityLUTSequence=[table], VOILUTSequence=[shades])
    assert np.array_equal(shown(ds), (4095 - VALUES) // 16)


def test_colours() -> None:
    rgb = RANDOM.integers(0, 256, (4, 6, 3), dtype=np.uint8)
    assert np.array_equal(shown(made(rgb, 8, "RGB")), rgb)
    table = RANDOM.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    index = RANDOM.integers(0, 256, (4, 6), dtype=np.uint8)
    ds = made(index, 8, "PALETTE COLOR")
    for name, column in zip(("Red", "Green", "Blue"), table, strict=True):
        setattr(ds, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(ds, f"{name}PaletteColorLookupTableData", column.astype("<u2").tobytes())
    assert np.array_equal(shown(ds), (table // 257).T[index])
    ybr = made(rgb, 8, "YBR_FULL")
    y, blue, red = np.moveaxis(rgb.astype(float), -1, 0)
    right = y + 1.402 * (red - 128), None, y + 1.772 * (blue - 128)
    for channel in (0, 2):
        found = shown(ybr)[..., channel].astype(float)
        assert np.abs(found - right[channel].clip(0, 255)).max() <= 1


@pytest.mark.parametrize(
    "name",
    [
        *("CT_small.dcm", "MR_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm"),
        *("JPEG2000.dcm", "examples_palette.dcm", "examples_ybr_color.dcm", "SC_rgb_rle.dcm"),
        *("SC_rgb_jpeg_dcmtk.dcm", "SC_ybr_full_422_uncompressed.dcm", "examples_rgb_color.dcm"),
        *("liver_1frame.dcm", "693_J2KI.dcm", "SC_rgb_rle_16bit.dcm"),
    ],
)
def test_files_of_many_makers(name: str) -> None:
    """pydicom's own, which it shows by its functions one after the other."""
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.fail(f"pydicom no longer brings {name}")
    ds = pydicom.dcmread(path)
    if ds.get("NumberOfFrames", 1) != 1:
        with pytest.raises(ValueError, match="frames: write each into a file"):
            images.read(Path(path).read_bytes())
        return
    found = np.asarray(images.read(Path(path).read_bytes()))
    pixels = pixel_array(ds)
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        pixels = apply_color_lut(pixels, ds)
        assert np.abs(found.astype(float) - pixels / (257 if pixels.itemsize > 1 else 1)).max() <= 1
    elif pixels.ndim == 3:
        assert np.abs(found - pixels / (2**ds.BitsStored - 1) * 255).max() <= 0.5
    else:
        voi = apply_voi_lut(apply_modality_lut(pixels, ds), ds).astype(float)
        if ds.get("WindowCenter") is None:
            content = Path(path).read_bytes()
            found = np.asarray(images.read(content, span=(voi.min(), voi.max())))
        assert np.corrcoef(voi.ravel(), found.ravel())[0, 1] > 0.999
        assert found.shape == pixels.shape


def folder(root: Path, *sets: Dataset) -> Path:
    for number, ds in enumerate(sets):
        place = root / "ab"[number % 2] / f"{number}.dcm"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file(ds))
    return root


def test_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A set keeps its windows, or one range; nothing of a patient is in what is written or said."""
    series = [made(VALUES + 7 * i, WindowCenter=2000, WindowWidth=1000) for i in range(4)]
    source = folder(tmp_path / "in", *series)
    assert call(pack, source, tmp_path / "out", "--splits", 1, "--size", 5) == 0
    said = capsys.readouterr()
    assert "4 pictures are shown through the windows" in said.err
    assert Manifest.load_split(str(tmp_path / "out"), "train").span is None
    assert call(pack, source, tmp_path / "auto", "--splits", 1, "--range", "auto") == 0
    low, high = int(VALUES.min()), int(VALUES.max()) + 21
    assert Manifest.load_split(str(tmp_path / "auto"), "train").span == (low, high)
    assert call(pack, source, tmp_path / "low", "--splits", 1, "--range", "-1000,400") == 0
    assert Manifest.load_split(str(tmp_path / "low"), "train").span == (-1000, 400)
    capsys.readouterr()
    assert call(pack, source, tmp_path / "kept", "--keep_original") == 2
    assert "with the patient's data in it" in capsys.readouterr().err
    written = b"".join(
        p.read_bytes() for p in tmp_path.rglob("*") if p.suffix != ".dcm" and p.is_file()
    )
    assert b"Geheim" not in written
    assert b"4711" not in written
    assert "Geheim" not in said.out + said.err


def test_without_windows_the_set_has_a_range(tmp_path: Path) -> None:
    series = [made(VALUES // 8 + i, RescaleSlope=1, RescaleIntercept=-1000) for i in range(4)]
    for ds in series:
        ds.PixelPaddingValue = 1
        pixels = np.frombuffer(ds.PixelData, np.uint16).copy()
        pixels[0] = 1  # outside of what was scanned
        ds.PixelData = pixels.tobytes()
    values = [np.frombuffer(ds.PixelData, np.uint16)[1:] - 1000.0 for ds in series]
    assert call(pack, folder(tmp_path / "in", *series), tmp_path / "out", "--splits", 1) == 0
    span = Manifest.load_split(str(tmp_path / "out"), "train").span
    assert span == (min(v.min() for v in values), max(v.max() for v in values))
    squares = [made(VALUES[:5]), made(VALUES[1:])]
    assert call(pack, folder(tmp_path / "sq", *squares), tmp_path / "o", "--splits", 1) == 0
    low, high = VALUES.min(), VALUES.max()
    right = [np.rint((v - float(low)) * 255 / (high - low)) for v in (VALUES[:5], VALUES[1:])]
    right = [np.repeat(r.astype(np.uint8)[..., None], 3, -1) for r in right]
    assert same(stored(tmp_path / "o"), sorted(right, key=lambda a: a.tobytes()))


def cut(content: bytes) -> bytes:
    return content[:-20]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (file(made(VALUES, NumberOfFrames=2)), "2 frames: write each into a file of its own"),
        (cut(file(made(VALUES))), "cut short or broken"),
        (file(made(VALUES, PhotometricInterpretation="HSV")), "photometric interpretation"),
        (file(made(VALUES, WindowCenter=1, WindowWidth=0)), "its window has no width"),
        (file(made(VALUES, Rows=60000, Columns=60000)), "too many pixels"),
        (file(made(VALUES, RescaleSlope="nan", RescaleIntercept=0)), ""),
        (b"\0" * 128 + b"DICM" + b"junk" * 9, ""),
        (b"\0" * 128 + b"DICM", ""),
        (
            file(made(VALUES)).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"),
            "deflated",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.dcm").write_bytes(content)
    assert call(pack, tmp_path, tmp_path.parent / "out") == 2
    printed = capsys.readouterr().err
    assert said in printed
    assert "x.dcm: the image cannot be read" in printed.splitlines()[-1]
    assert "Geheim" not in printed


def test_no_pixels_and_no_decoder() -> None:
    ds = made(VALUES)
    del ds.PixelData
    with pytest.raises(ValueError, match="no pixel data"):
        images.read(file(ds))
    path = get_testdata_file("MR_small_jpeg_ls_lossless.dcm", download=False)
    with pytest.raises(ValueError, match=r"compression \(JPEG-LS .*pylibjpeg"):
        images.read(Path(str(path)).read_bytes())


def test_large_pictures_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rgb = RANDOM.integers(0, 2**12, (6, 5, 3), dtype=np.uint16)
    sets = [made(VALUES, WindowCenter=9, WindowWidth=999), made(VALUES), made(rgb, 12, "RGB")]
    whole = [(shown(ds), images.values(file(ds))) for ds in sets]
    monkeypatch.setattr(dicom, "ROWS", 10)
    for ds, (pixels, found) in zip(sets, whole, strict=True):
        assert np.array_equal(shown(ds), pixels)
        assert images.values(file(ds)) == found
    assert np.array_equal(whole[2][0], np.rint(rgb * (255 / 4095)))


def test_without_pydicom(tmp_path: Path) -> None:
    folder(tmp_path / "in", made(VALUES), made(VALUES))
    code = (
        "import sys; sys.modules['pydicom'] = None; sys.argv = ['pack', 'in', 'out'];"
        " from selfdistill.data.cli import run; from selfdistill.data.pack import pack; run(pack)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "error: DICOM files need the package pydicom, which is not installed here:"
        " pip install selfdistill[dicom]"
    )
