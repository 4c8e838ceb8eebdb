"""Readers of data: manifests, tables, tars, images, labels, texts, lists, archives."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import zstandard
from PIL import Image
from pydicom.uid import RLELossless

from selfdistill.data.errors import BrokenData
from selfdistill.data.formats import depth, images, labels, texts
from selfdistill.data.loading.reader import Reader
from selfdistill.data.pack import pack
from selfdistill.data.shards import checking, manifest
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.shards.scan import scan
from selfdistill.data.sources import images as image_sources
from selfdistill.data.sources import label_checks, parquet
from selfdistill.data.sources import texts as text_sources
from selfdistill.data.sources.layouts import archive
from selfdistill.data.sources.samples import Columns
from tests.data.formats import test_dicom
from tests.fuzz.harness import Target
from tests.fuzz.inputs import documents, edited

_READ = 12  # samples of a set


def picture(
    kind: str, mode: str = "RGB", size: tuple[int, int] = (20, 16), **options: Any
) -> bytes:
    """An image file with something in it."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode).save(out, kind, **options)
    return out.getvalue()


@functools.cache
def packed() -> Path:
    """A packed set of eight images of two classes."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    for name in ("a", "b"):
        (folder / "raw" / name).mkdir(parents=True)
        for number in range(4):
            place = folder / "raw" / name / f"{number}.png"
            place.write_bytes(picture("PNG", size=(16 + number, 16)))
    pack(str(folder / "raw"), str(folder / "set"), splits="1,0,0", size=16)
    return folder / "set" / "train"


@contextmanager
def _told() -> Iterator[None]:
    """What functions below the level of files raise, and their callers name the file of."""
    try:
        yield
    except ValueError as error:
        if not str(error):
            raise


def _content() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((packed() / manifest.FILE).read_text())
    return content


def _read_all(file: Manifest) -> None:
    """What a run does with a manifest, sample by sample."""
    reader = Reader(file)
    try:
        reader.check_shards()
        for sample in range(min(file.samples, _READ)):
            try:
                record = reader.record(sample)
                images.decode(record.input, 16, record.name)
            except BrokenData:
                continue
    finally:
        reader.close()


def read_manifest(content: bytes, folder: Path) -> None:
    """manifest.json beside whole shards."""
    file = Manifest(content, str(packed()))
    _ = file.counts, file.starts, file.labelled, file.members
    _read_all(file)


def read_table(content: bytes, folder: Path) -> None:
    """members.npy that its manifest names."""
    made = _content()
    made["members"]["sha256"] = hashlib.sha256(content).hexdigest()
    shard = packed() / made["shards"][0]["name"]
    for name, data in ((manifest.MEMBERS, content), (shard.name, shard.read_bytes())):
        (folder / name).write_bytes(data)
    file = Manifest(json.dumps(made).encode(), str(folder))
    _read_all(file)
    checking.check_shard(file, 0, file.members, True, lambda count: None)


def read_shard(content: bytes, folder: Path) -> None:
    """A shard of the size that its manifest says, and of any content."""
    made = _content()
    made["shards"][0] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / made["shards"][0]["name"]).write_bytes(content)
    (folder / manifest.MEMBERS).write_bytes((packed() / manifest.MEMBERS).read_bytes())
    file = Manifest(json.dumps(made).encode(), str(folder))
    _read_all(file)
    checking.check_shard(file, 0, file.members, True, lambda count: None)


def read_tar(content: bytes, folder: Path) -> None:
    """A tar made elsewhere: indexed, then read."""
    path = folder / "x.tar"
    path.write_bytes(content)
    found = scan(path)
    table = np.zeros((0, 4), np.int64) if not len(found.rows) else found.rows
    for at, size, label_at, label_size in table.tolist():
        assert 0 <= at <= at + size <= len(content)
        assert label_at == -1 or 0 <= label_at <= label_at + label_size <= len(content)


def read_image(content: bytes, folder: Path) -> None:
    """An image, packed and decoded."""
    with _told():
        images.decode(images.prepare(content, 16), 16)
        images.decode(content, None)
        images.kind_of(content)
    with _told():
        depth.choose("auto", images.values(content))
        images.decode(content, None, span=(0.0, 9.0))
    with _told():
        images.values(content, (1, 3, 2))
        images.prepare(content, 16, chosen=(1, 3, 2))


def read_label(content: bytes, folder: Path) -> None:
    """A label's member, and a text's."""
    named = functools.partial(labels.by_name, field="label")
    for parse in (labels.parse, named, texts.read, functools.partial(texts.read, stored="json")):
        with _told():
            parse(content)


def _texts(suffix: str, content: bytes, folder: Path) -> None:
    path = folder / f"x{suffix}"
    path.write_bytes(content)
    if text_sources.recognise(path, Columns()):
        label_checks.check(text_sources.find(path, Columns()))
        for samples, _ in text_sources.find(path, Columns(), unlabelled=True).values():
            for sample in samples:
                assert isinstance(sample.source, texts.Text)
                with _told():
                    texts.store(*sample.source, "json")


def read_list(content: bytes, folder: Path) -> None:
    """A CSV of images."""
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(b"")
    (folder / "x.csv").write_bytes(content)
    found = image_sources.find(folder / "x.csv")
    for samples, _ in found.values():
        for sample in samples:
            assert isinstance(sample.source, Path)
    label_checks.check(found)


def read_archive(suffix: str, content: bytes, folder: Path) -> None:
    """An archive: nothing of it lies outside, and nothing is left."""
    path = folder / f"x{suffix}"
    path.write_bytes(content)
    inside = folder / "in" / "here"
    inside.mkdir(parents=True, exist_ok=True)
    with archive.opened(path, inside) as made:
        for one in made.rglob("*"):
            assert not one.is_symlink()
    assert {p.name for p in folder.iterdir()} <= {"in", path.name}
    assert not list(inside.iterdir())


def read_parquet(content: bytes, folder: Path) -> None:
    """A Parquet file: nothing is left of it."""
    path = folder / "x.parquet"
    path.write_bytes(content)
    with parquet.opened(path, folder / "scratch", Columns()) as made:
        if made.suffix == ".csv":
            image_sources.find(made)
        else:
            text_sources.find(made, Columns())
    assert not list((folder / "scratch").iterdir())


def _parquet() -> list[bytes]:
    """Images with names of classes, and texts; with and without compression."""
    known = b'{"info": {"features": {"label": {"names": ["a", "b"]}}}}'
    pictures = [{"bytes": picture("PNG"), "path": "x"}] * 3
    tables = [
        pyarrow.table({"image": pictures, "label": [0, 1, 0]}, metadata={"huggingface": known})
    ]
    tables.append(pyarrow.table({"text": ["one", "two"], "label": ["a", "b"], "n": [1.0, None]}))
    found = []
    for table in tables:
        for compression in ("none", "snappy", "zstd"):
            out = io.BytesIO()
            pyarrow.parquet.write_table(table, out, compression=compression)
            found.append(out.getvalue())
    return found


def _tar(kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in (
            ("p/1.png", picture("PNG")),
            ("p/1.cls", b"1"),
            ("p/2.jpg", picture("JPEG")),
            ("p/2.json", b'{"label": 0}'),
            (f"{'n' * 120}.png", picture("PNG")),
            (f"{'n' * 120}.txt", b"1"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("p/3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "1.png"
        tar.addfile(link)
    return out.getvalue()


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name in ("train/a/1.png", "train/b/2.png", "../../out.png", "/abs.png"):
            made.writestr(name, picture("PNG"))
    return out.getvalue()


@functools.cache
def _pictures() -> list[bytes]:
    found = [picture("PNG", mode) for mode in ("RGB", "L", "RGBA", "P", "I;16", "1", "LA")]
    found += [picture("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    found += [picture("WEBP"), picture("BMP"), picture("BMP", "P"), picture("GIF", "P")]
    found += [picture("TIFF"), picture("TIFF", compression="tiff_lzw"), picture("PPM")]
    found += [picture("JPEG2000"), picture("TGA"), picture("AVIF"), picture("TIFF", "I;16")]
    found += [picture("TIFF", "F"), picture("TIFF", "I")]
    page = Image.new("L", (20, 16), 9)
    found.append(picture("TIFF", "L", save_all=True, append_images=[page, page]))
    found += [picture("DDS"), picture("EPS"), picture("ICO")]
    return found


def _dicom() -> list[bytes]:
    """With a window, without, palette, in colour, and compressed."""
    colours = {
        f"{name}PaletteColorLookupTable{part}": value
        for name in ("Red", "Green", "Blue")
        for part, value in (("Descriptor", [256, 0, 8]), ("Data", bytes(range(256))))
    }
    made = test_dicom.made
    small = (test_dicom.VALUES // 16).astype(np.uint8)
    found = [made(test_dicom.VALUES, WindowCenter=99, WindowWidth=50), made(test_dicom.VALUES)]
    found += [made(small, 8, "PALETTE COLOR", **colours)]
    found += [made(np.stack([small] * 3, -1), 8, kind) for kind in ("RGB", "YBR_FULL")]
    found += [made(test_dicom.VALUES, RescaleSlope=2, RescaleIntercept=-9)]
    found[-1].compress(RLELossless)
    return [test_dicom.file(ds) for ds in found]


_JSONL = [
    b'{"text": "one", "label": "a", "id": 1}\n{"text": "two", "label": "b", "id": 2}\n' * 1,
    b'{"text": "one", "text_pair": "x", "label": 0, "split": "train"}\n',
]
_CSV = [b"text,label,split\none,a,train\ntwo,b,test\n", b'text,label\n"a ""b""\nc",0\n']
_LIST = [b"path,label,split\na.png,x,train\nb.png,y,test\n", b"path;label\na.png;1\n"]

TARGETS = [
    Target("manifest", read_manifest, documents([_content()])),
    Target("table", read_table, edited([(packed() / manifest.MEMBERS).read_bytes()])),
    Target("shard", read_shard, edited([next(packed().glob("*.tar")).read_bytes()])),
    Target("tar", read_tar, edited([_tar(), _tar(tarfile.GNU_FORMAT)])),
    Target("image", read_image, edited(_pictures())),
    Target("dicom", read_image, edited(_dicom())),
    Target(
        "label", read_label, edited([b"3", b'{"label": 3}', b'{"text": "a", "text_pair": "b"}'])
    ),
    Target("jsonl", functools.partial(_texts, ".jsonl"), edited(_JSONL)),
    Target("csv", functools.partial(_texts, ".csv"), edited(_CSV)),
    Target("tsv", functools.partial(_texts, ".tsv"), edited([b"text\tlabel\none\ta\ntwo\tb\n"])),
    Target("txt", functools.partial(_texts, ".txt"), edited([b"one\ntwo\n\xc3\xa9\n"])),
    Target("list", read_list, edited(_LIST)),
    Target("parquet", read_parquet, edited(_parquet())),
    Target("zip", functools.partial(read_archive, ".zip"), edited([_zip()])),
    Target(
        "zst",
        functools.partial(read_archive, ".tar.zst"),
        edited([zstandard.ZstdCompressor().compress(_tar())]),
    ),
    Target("tgz", functools.partial(read_archive, ".tar"), edited([_tar(), gzip.compress(_tar())])),
]
