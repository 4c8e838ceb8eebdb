"""Tars of any kind and with any damage: all samples with their labels, or a refusal; never fewer.

The oracles are what was put in, and GNU tar, which unpacks what was put in.
"""

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from selfdistill.data.errors import UserError
from selfdistill.data.index import index
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards import scan as scanning
from selfdistill.data.shards import tars
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.kit.command import call
from tests.kit.shards import numbered, png

PICTURES = ("png", "JPG", "webp", "tiff")
LABELS = ("cls", "txt", "json")
# Key, number, extension of its image, of its label, other extensions, whether it has a link's image
Sample = tuple[str, int, str, str, tuple[str, ...], str]

_segments = st.text("abcxyzABC0123456789_-é ", min_size=1, max_size=12).filter(
    lambda s: s.strip() == s and s not in (".", "..")
)
_long = st.builds(lambda s, n: (s * n)[:110], _segments, st.integers(8, 60))


@st.composite
def samples(draw: st.DrawFn) -> list[Sample]:
    folder = draw(st.sampled_from(["", "d/", "some.folder/", "./", f"{'e' * 90}/"]))
    keys = draw(st.lists(st.one_of(_segments, _long), min_size=1, max_size=5, unique=True))
    found = []
    for number, key in enumerate(keys):
        dots = draw(st.sampled_from(["", "", ".left", ".v1.2"]))
        found.append(
            (
                f"{folder}{key}{dots}",
                number,
                draw(st.sampled_from(PICTURES)),
                draw(st.sampled_from(LABELS)),
                tuple(draw(st.lists(st.sampled_from(["npy", "seg.npy"]), unique=True))),
                draw(st.sampled_from(["", "", "hard", "soft"])) if number else "",
            )
        )
    return found


def label_of(kind: str, number: int) -> bytes:
    return json.dumps({"label": number}).encode() if kind == "json" else str(number).encode()


def content_of(number: int) -> bytes:
    return b"picture" * 60 + bytes([number])


def write(path: Path, wanted: list[Sample], format_: int, orders: st.DataObject | None) -> None:
    """A tar of the samples; those with a link have the picture of the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = f"{wanted[0][0]}.{wanted[0][2]}"
    with tarfile.open(path, "w", format=format_) as tar:
        for key, number, image, label, others, link in wanted:
            members = [(f"{key}.{image}", b"" if link else content_of(number))]
            members += [(f"{key}.{label}", label_of(label, number))]
            members += [(f"{key}.{other}", b"other") for other in others]
            if orders is not None:
                members = orders.draw(st.permutations(members))
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                if link and name == f"{key}.{image}":
                    info.type = tarfile.LNKTYPE if link == "hard" else tarfile.SYMTYPE
                    info.linkname = first
                    if link == "soft":
                        info.linkname = os.path.relpath(first, os.path.dirname(name) or ".")
                    info.size = 0
                tar.addfile(info, None if info.islnk() or info.issym() else io.BytesIO(content))


def truth(wanted: list[Sample]) -> list[tuple[bytes, int]]:
    return [(content_of(0 if link else n), n) for _, n, _, _, _, link in wanted]


def found_in(path: Path, rows: np.ndarray, labels: np.ndarray) -> list[tuple[bytes, int]]:
    content = path.read_bytes()
    return [
        (content[at : at + size], int(label))
        for (at, size, _, _), label in zip(rows.tolist(), labels, strict=True)
    ]


def by_gnu_tar(path: Path, folder: Path) -> list[tuple[bytes, int]]:
    """Unpacked by tar, then grouped by name; in the order of the labels."""
    folder.mkdir()
    subprocess.run(["tar", "-xf", path, "-C", folder, "--ignore-zeros"], check=True)
    found = []
    for picture in (p for p in folder.rglob("*") if p.suffix[1:] in PICTURES):
        stem = str(picture)[: -len(picture.suffix)]
        (label,) = [Path(f"{stem}.{k}") for k in LABELS if Path(f"{stem}.{k}").exists()]
        text = label.read_text()
        number = json.loads(text)["label"] if label.suffix == ".json" else int(text)
        found.append((picture.read_bytes(), number))
    return sorted(found, key=lambda one: one[1])


FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(wanted=samples(), form=FORMATS, cut=st.integers(0, 5), data=st.data())
def test_any_whole_tar_is_what_was_put_in(
    wanted: list[Sample],
    form: int,
    cut: int,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("whole")
    path = root / "train" / "a.tar"
    # Some of them are two archives in one file: cat a.tar b.tar. (A link may lead to the other.)
    write(path, wanted[: cut or None], form, data)
    if cut and wanted[cut:]:
        rest = [(*one[:-1], "") for one in wanted[cut:]]
        wanted = [*wanted[:cut], *rest]
        write(root / "b.tar", rest, form, data)
        path.write_bytes(path.read_bytes() + (root / "b.tar").read_bytes())
    scanned = scanning.scan(path)
    assert found_in(path, scanned.rows, scanned.labels) == truth(wanted)
    assert by_gnu_tar(path, root / "unpacked") == truth(wanted)
    assert call(index, path.parent) == 0
    file = Manifest.load(str(path.parent))
    records = Reader(file).read(np.arange(file.samples))
    assert [(r.input, r.label) for r in records] == truth(wanted)
    assert call(verify, path.parent) == 0


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    wanted=samples(),
    form=FORMATS,
    share=st.floats(0, 1, exclude_max=True),
    xor=st.integers(1, 255),
    cuts=st.booleans(),
)
@example(wanted=[("a", 0, "png", "cls", (), "")], form=0, share=0.2, xor=1, cuts=True)
def test_no_damage_loses_a_sample_in_silence(
    wanted: list[Sample],
    form: int,
    share: float,
    xor: int,
    cuts: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "a.tar"
    write(path, wanted, form or tarfile.GNU_FORMAT, None)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    last = members[-1]
    end = last.offset_data + -(-last.size // 512) * 512 if last.isreg() else last.offset_data
    at = int(share * (end + 1024))
    if cuts:
        path.write_bytes(whole[:at])
    else:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ xor]) + whole[at + 1 :])
    try:
        scanned = scanning.scan(path)
    except UserError:
        return
    now = found_in(path, scanned.rows, scanned.labels)
    if cuts:
        assert at >= end + 512, "a tar without its end was taken"
        assert now == truth(wanted)
        return
    assert at < end, "a byte amid the end mark was taken"
    inside = next((m for m in reversed(members) if m.offset <= at), None)
    assert inside is not None
    if at >= inside.offset_data:  # contents, or the padding after them
        assert [len(one[0]) for one in now] == [len(one[0]) for one in truth(wanted)]
        others = [one for one in zip(now, truth(wanted), strict=True) if one[0] != one[1]]
        links = sum(1 for one in wanted if one[5])
        assert len(others) <= 1 + links
        return
    # A header of its own for a long name or for records has no checksum of its contents: a name may
    # be another now. No file is without its sample or its mention.
    files = [m.name for m in members if m.isreg() or m.islnk() or m.issym()]
    assert inside.offset_data - inside.offset > 512, "a broken header was taken"
    unused = sum(len(sample[4]) for sample in wanted)
    assert 2 * len(now) + len(scanned.extras) >= len(files) - unused


def three(path: Path, *more: tarfile.TarInfo, format_: int = tarfile.GNU_FORMAT) -> bytes:
    """Three samples, the last with the members besides; the tar's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format_) as tar:
        for number in range(3):
            for extension, content in (("png", png(numbered(number))), ("cls", b"0")):
                info = tarfile.TarInfo(f"k{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        for info in more:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return path.read_bytes()


def member(name: str, type_: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type_, target
    return info


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        scanning.scan(path)
    return str(caught.value)


def test_a_broken_header_names_its_byte(tmp_path: Path) -> None:
    """01. tarfile stops there in silence; GNU tar skips to the next header."""
    whole = three(tmp_path / "a.tar")
    at = tars.scan(tmp_path / "a.tar")[4].offset - 512
    for damage in (b"\x55" * 512, b"\x55", bytes(511) + b"\x01"):
        (tmp_path / "a.tar").write_bytes(whole[:at] + damage + whole[at + len(damage) :])
        said = refusal(tmp_path / "a.tar")
        assert f"byte {at}" in said
        assert "a.tar is no whole tar" in said


def test_a_tar_that_broke_off_is_refused_wherever_it_did(tmp_path: Path) -> None:
    """02. Between two members, within a header, within contents, before the end mark."""
    whole = three(tmp_path / "a.tar")
    members = tars.scan(tmp_path / "a.tar")
    end = members[-1].offset + 512
    for at in (members[4].offset - 512, members[4].offset - 412, members[4].offset + 3, end):
        (tmp_path / "a.tar").write_bytes(whole[:at])
        assert f"ends at byte {at}" in refusal(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole[: end + 512])  # with its end mark, short as it may be
    assert len(scanning.scan(tmp_path / "a.tar").rows) == 3


def test_zeros_within_a_tar_and_what_comes_after_its_end(tmp_path: Path) -> None:
    whole = three(tmp_path / "a.tar")
    at = tars.scan(tmp_path / "a.tar")[2].offset - 512
    # Zeros in place of a header: what follows is no header.
    (tmp_path / "a.tar").write_bytes(whole[:at] + bytes(512) + whole[at + 512 :])
    assert "is no tar header" in refusal(tmp_path / "a.tar")
    # Something else behind the end mark.
    (tmp_path / "a.tar").write_bytes(whole + b"a log line\n")
    assert f"ends at byte {len(whole) + 11}, within a header" in refusal(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole + b"a log line\n" * 99)
    assert f"byte {len(whole)} is no tar header" in refusal(tmp_path / "a.tar")
    # The same tar again is the same keys again.
    (tmp_path / "a.tar").write_bytes(whole + whole)
    assert "comes twice" in refusal(tmp_path / "a.tar")


def test_links_are_the_files_that_they_name(tmp_path: Path) -> None:
    """03. Hard, symbolic, to one another, to a file further on; with the labels of their own."""
    train = tmp_path / "train"
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    train.mkdir()
    (source / "deep" / "z.png").write_bytes(png(numbered(5)))
    (source / "a.png").symlink_to("deep/z.png")  # which comes later in the tar
    (source / "b.png").symlink_to("a.png")
    os.link(source / "deep" / "z.png", source / "c.png")
    for number, name in enumerate(("a", "b", "c", "deep/z")):
        (source / f"{name}.cls").write_text(str(number % 2))
    names = ["a.png", "a.cls", "b.png", "b.cls", "c.png", "c.cls", "deep/z.png", "deep/z.cls"]
    subprocess.run(["tar", "-cf", train / "a.tar", "-C", source, *names], check=True)
    assert call(index, train) == 0
    file = Manifest.load(str(train))
    records = Reader(file).read(np.arange(4))
    assert [r.label for r in records] == [0, 1, 0, 1]
    assert {r.input for r in records} == {png(numbered(5))}
    assert call(verify, tmp_path, "--decode") == 0
