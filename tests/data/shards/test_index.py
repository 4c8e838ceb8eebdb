"""Tars made by tar and by webdataset, indexed and read back; and what cannot be indexed."""

import gzip
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.data.formats import images
from selfdistill.data.index import index
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.kit.command import call
from tests.kit.shards import number_of, numbered, png


def encoded(number: int, kind: str = "png") -> bytes:
    """A picture of a number; lossless in each kind but jpg."""
    out = io.BytesIO()
    numbered(number, 16).save(out, format={"jpg": "JPEG"}.get(kind, kind), lossless=True)
    return out.getvalue()


def tar_of(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def read(folder: Path) -> list[tuple[int, int]]:
    """Number and label of every sample, in the order of the ids."""
    file = Manifest.load(str(folder))
    records = Reader(file).read(np.arange(file.samples))
    return [(number_of(images.decode(r.input, None)), r.label) for r in records]


def by_webdataset(paths: Sequence[Path], kind: str = "png") -> list[tuple[int, int]]:
    """The same, as webdataset reads the tars."""
    found = []
    for sample in webdataset.WebDataset([str(p) for p in paths], shardshuffle=False):
        image = next(v for k, v in sample.items() if k.split(".")[-1] == kind)
        label = next(v for k, v in sample.items() if k.split(".")[-1] in ("cls", "txt"))
        found.append((number_of(images.decode(image, None)), int(label)))
    return found


def test_tars_of_webdatasets_own_writer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "birds" / "train"
    folder.mkdir(parents=True)
    with webdataset.ShardWriter(str(folder / "b-%03d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            picture = np.asarray(numbered(number))
            writer.write({"__key__": f"k{number}", "png": picture, "cls": number % 3})
    assert call(index, folder.parent) == 0
    assert "10 samples in 3 shards, 3 classes" in capsys.readouterr().out
    assert read(folder) == by_webdataset(sorted(folder.glob("*.tar")))
    file = Manifest.load(str(folder))
    assert file.class_counts == [4, 3, 3]
    assert file.counts.tolist() == [4, 4, 2]
    assert call(verify, folder.parent, "--decode") == 0


@pytest.mark.parametrize("flavour", ["gnu", "ustar", "pax"])
def test_tars_of_the_tar_command(flavour: str, tmp_path: Path) -> None:
    """Long names make GNU and pax write a header of its own for the name."""
    source = tmp_path / "source"
    deep = f"{'d' * 60}/{'e' * 50}"
    (source / deep).mkdir(parents=True)
    for number in range(5):
        (source / deep / f"n{number}.png").write_bytes(encoded(number))
        (source / deep / f"n{number}.txt").write_text(f"{number % 2}\n")
    train = tmp_path / "birds" / "train"
    train.mkdir(parents=True)
    command = [
        "tar",
        f"--format={flavour}",
        "--sort=name",
        "-cf",
        train / "a.tar",
        "-C",
        source,
        ".",
    ]
    subprocess.run(command, check=True)
    assert call(index, train) == 0
    assert read(train) == [(n, n % 2) for n in range(5)] == by_webdataset([train / "a.tar"])
    assert call(verify, train) == 0


@settings(max_examples=25, deadline=None)
@given(
    shards=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    order=st.permutations(["png", "cls", "json", "seg.npy"]),
    dots=st.booleans(),
)
def test_any_order_of_members_and_uneven_shards(
    shards: list[int], order: list[str], dots: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if sum(shards) == 0:
        return
    train = tmp_path_factory.mktemp("index") / "train"
    number, paths = 0, []
    for shard, count in enumerate(shards):
        members = []
        for _ in range(count):
            content = {
                "png": encoded(number),
                "cls": str(number % 2).encode(),
                "json": b'{"label": 77}',
                "seg.npy": b"other",
            }
            # A dot in the key ends it: WebDataset's key is k3, its extension x.png.
            stem = f"some.folder/k{number}" + (".x" if dots else "")
            members += [(f"{stem}.{extension}", content[extension]) for extension in order]
            number += 1
        paths.append(tar_of(train / f"s{shard}.tar", members))
    assert call(index, train) == 0
    assert read(train) == by_webdataset(paths)
    assert Manifest.load(str(train)).counts.tolist() == shards


@pytest.mark.parametrize("kind", ["png", "webp", "jpg", "jpeg", "JPG"])
@pytest.mark.parametrize("label", ["cls", "txt", "json"])
def test_kinds_of_images_and_labels(kind: str, label: str, tmp_path: Path) -> None:
    members = []
    for number in (0, 1, 2):
        text = json.dumps({"label": number}) if label == "json" else f" {number}\n"
        members.append((f"k{number}.{label}", text.encode()))
        members.append((f"k{number}.{kind}", encoded(number, kind.lower().replace("jpeg", "jpg"))))
    tar_of(tmp_path / "train" / "a.tar", members)
    assert call(index, tmp_path) == 0
    file = Manifest.load(str(tmp_path / "train"))
    records = Reader(file).read(np.arange(3))
    assert [record.label for record in records] == [0, 1, 2]
    assert [record.input for record in records] == [content for _, content in members[1::2]]
    assert call(verify, tmp_path, "--decode") == 0


def test_splits_names_and_order_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes are those of all splits together, or those of the file."""
    tar_of(tmp_path / "train" / "a.tar", [("a.png", encoded(1)), ("a.cls", b"0")])
    tar_of(tmp_path / "test" / "a.tar", [("b.png", encoded(2)), ("b.cls", b"2")])
    assert call(index, tmp_path) == 0
    assert "2 classes have no sample in train, the first is 1" in capsys.readouterr().out
    for split, counts in (("train", [1, 0, 0]), ("test", [0, 0, 1])):
        file = Manifest.load_split(str(tmp_path), split)
        assert (file.classes, file.class_counts) == (["0", "1", "2"], counts)
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\ndog\n", encoding="utf-8-sig")
    assert call(index, tmp_path, "--classes", tmp_path / "names.txt", "--overwrite") == 0
    assert Manifest.load_split(str(tmp_path), "test").classes == ["ant", "bee", "cow", "dog"]
    assert call(verify, tmp_path) == 0


def test_without_labels_and_with_members_to_pass_over(tmp_path: Path) -> None:
    members = [
        ("__meta__/notes.json", b"{}"),
        ("__index__", b"x"),
        ("._a.png", b"macOS"),
        ("README", b"no extension"),
        ("a.png", encoded(1)),
        ("a.txt", b"a caption"),
    ]
    tar_of(tmp_path / "train" / "a.tar", members)
    assert call(index, tmp_path, "--unlabelled") == 0
    assert read(tmp_path / "train") == [(1, -1)]
    assert Manifest.load(str(tmp_path / "train")).classes == []


def test_some_tars_of_a_folder_as_a_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        tar_of(tmp_path / f"{n}.tar", [(f"{n}.png", encoded(i)), (f"{n}.cls", b"0")])
        for i, n in enumerate("abc")
    ]
    assert call(index, paths[2], paths[0], "--split", "val") == 0
    assert read(tmp_path) == [(2, 0), (0, 0)]
    assert Manifest.load(str(tmp_path)).split == "val"
    assert "training looks for DATA/val" in capsys.readouterr().out


def sample(key: str, number: int = 0, label: bytes = b"0") -> list[tuple[str, bytes]]:
    return [(f"{key}.png", encoded(number)), (f"{key}.cls", label)]


def compressed(folder: Path) -> None:
    path = tar_of(folder / "a.tar", sample("a"))
    path.write_bytes(gzip.compress(path.read_bytes()))


def cut(folder: Path) -> None:
    path = tar_of(folder / "a.tar", [*sample("a"), *sample("b")])
    path.write_bytes(path.read_bytes()[:1700])


def holding(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    return lambda folder: tar_of(folder / "a.tar", members) and None


MISTAKES: list[tuple[Callable[[Path], None], tuple[str, ...], tuple[str, ...]]] = [
    (compressed, (), ("a.tar", "compressed (gzip)", "(gzip -dc < a.tar > a-plain.tar)")),
    (cut, (), ("a.tar", "no whole tar")),
    (lambda folder: (folder / "a.tar").write_bytes(b"text" * 400) and None, (), ("no whole tar",)),
    (holding(*sample("a"), *sample("b"), *sample("a")), (), ("sample a", "comes twice")),
    (holding(*sample("a"), *sample("a")), (), ("sample a", "two files .png")),
    (holding(("a.cls", b"0")), (), ("sample a", "no image", ".cls")),
    (
        holding(("a.cls", b"0"), ("b.cls", b"1"), ("a.png", encoded(0)), ("b.png", encoded(1))),
        (),
        ("sample a", "do not stand together", "tar --sort=name"),
    ),
    (holding(("a.png", png(numbered(1))), ("a.jpg", b"")), (), ("sample a", "more than one image")),
    (holding(("a.1.png", b""), ("a.2.png", b"")), (), ("sample a", "ends at the first dot")),
    (holding(*sample("a", label=b"cat")), (), ("sample a", "b'cat' is no class number")),
    (holding(*sample("a", label=b"-1")), (), ("sample a", "is no class number")),
    (holding(("a.png", b""), ("a.json", b'{"name": 1}')), (), ("none of the names", "name")),
    (holding(("a.png", b""), ("a.json", b'{"label": true}')), (), ("True is no class number",)),
    (holding(("a.png", b""), ("a.json", b"{")), (), ("no valid JSON",)),
    (holding(*sample("a"), ("b.png", b"")), (), ("1 of 2 samples have no label", "sample 1")),
    (holding(*sample("a", label=b"20260101")), (), ("20260101", "hardly the number")),
    (holding(*sample("a")), ("--image", "jpg"), ("no .jpg", "--image")),
    (holding(*sample("a")), ("--classes", "nowhere.txt"), ("nowhere.txt", "a class name a line")),
    (holding(*sample("a")), ("--split", "vall"), ("Did you mean val?",)),
    (holding(*sample("a")), ("--worker", "2"), ("Did you mean --workers?",)),
    (holding(*sample("a")), ("--workers", "-3"), ("workers is -3: give 1 or more",)),
    (holding(), (), ("no samples",)),
    (lambda folder: (folder / "x.tar.gz").touch(), (), ("x.tar.gz is compressed", "> x.tar)")),
]


@pytest.mark.parametrize(("make", "options", "said"), MISTAKES)
def test_what_is_wrong_is_said_in_one_line(
    make: Callable[[Path], None],
    options: tuple[str, ...],
    said: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    make(folder)
    capsys.readouterr()
    assert call(index, folder, *options) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    for words in said:
        assert words in line
    assert not (folder / "manifest.json").exists()


def test_places_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tar_of(tmp_path / "train" / "a.tar", sample("a"))
    two = tar_of(tmp_path / "more" / "b.tar", sample("b"))
    for words, said in (
        ((), "nothing to index"),
        ((tmp_path / "x.tar",), "does not exist"),
        ((one, one), "given twice"),
        ((one, two), "2 folders"),
        ((one, two.parent), "is a folder"),
    ):
        assert call(index, *words) == 2
        assert said in capsys.readouterr().err
    assert call(index, one) == 0
    assert call(index, one) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train (1).tar", "a b.tar", "50%.tar", "a#1.tar", "a;b.tar"])
def test_a_name_that_could_not_be_read_is_refused_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """04. Nothing is written that no program can open afterwards."""
    tar_of(tmp_path / "train" / name, sample("a"))
    assert call(index, tmp_path) == 2
    assert "rename it (mv " in capsys.readouterr().err
    assert not (tmp_path / "train" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["größe.tar", "a+b=c@d.tar", "b.TAR", "-a.tar"])
def test_every_name_that_is_taken_can_be_read(name: str, tmp_path: Path) -> None:
    tar_of(tmp_path / "train" / name, sample("a"))
    assert call(index, tmp_path) == 0
    assert read(tmp_path / "train") == [(0, 0)]
    assert call(verify, tmp_path) == 0


def test_leavings_of_other_programs_are_no_shards(tmp_path: Path) -> None:
    """07. Of macOS, of a download that goes on, of NAS systems; and a folder with a tar's name."""
    tar_of(tmp_path / "train" / "a.tar", sample("a"))
    for stray in ("._a.tar", ".a.tar.partial", ".b.tar", "a.tar.part/x", "x.tar/y"):
        path = tmp_path / "train" / stray
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\5\x16\7 no tar")
    assert call(index, tmp_path) == 0
    assert call(verify, tmp_path) == 0


def test_a_compressed_tar_among_others_is_not_left_out_in_silence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "train" / "a.tar", sample("a"))
    for place, name in (("train", "b.tar.gz"), ("val", "b.tgz")):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / name).write_bytes(b"x")
        assert call(index, tmp_path) == 2
        assert f"{name} is compressed" in capsys.readouterr().err
        (tmp_path / place / name).unlink()
    # Tars in the folder itself, and in a split's: of which is the manifest to be?
    tar_of(tmp_path / "b.tar", sample("b"))
    assert call(index, tmp_path) == 2
    assert "and a folder train of tars, too" in capsys.readouterr().err


def test_a_split_is_called_what_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """08. Links to tars elsewhere, links to the folder itself, and the shell in such a folder."""
    store = tar_of(tmp_path / "blobs" / "0f3a", sample("a"))
    (tmp_path / "hub" / "val").mkdir(parents=True)
    (tmp_path / "hub" / "val" / "a.tar").symlink_to(store)
    assert call(index, tmp_path / "hub" / "val") == 0
    assert Manifest.load_split(str(tmp_path / "hub"), "val").samples == 1
    assert call(verify, tmp_path / "hub") == 0
    tar_of(tmp_path / "part-3" / "a.tar", sample("a"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "test").symlink_to(tmp_path / "part-3")
    assert call(index, tmp_path / "other" / "test") == 0
    assert Manifest.load_split(str(tmp_path / "other"), "test").samples == 1
    monkeypatch.chdir(tmp_path / "other" / "test")
    monkeypatch.setenv("PWD", str(tmp_path / "other" / "test"))  # what a shell says, and getcwd not
    for words in (["."], ["a.tar"]):
        assert call(index, *words, "--overwrite") == 0
        assert Manifest.load(".").split == "test"
    assert "training looks for" not in capsys.readouterr().out


def test_a_folder_of_img2dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Gaps where a download failed, captions, notes; tables beside the tars."""
    for shard in range(2):
        members = []
        for number in range(4):
            key, meta = (
                f"{shard:05d}{number:04d}",
                {"url": "x", "caption": "a", "status": "success"},
            )
            broken = (shard, number) in ((0, 1), (1, 3))
            picture = [] if broken else [(f"{key}.jpg", encoded(4 * shard + number, "png"))]
            members += [*picture, (f"{key}.json", json.dumps(meta).encode()), (f"{key}.txt", b"a")]
        if shard:
            members.append(("000010009.jpg", b""))
        tar_of(tmp_path / "train" / f"{shard:05d}.tar", members)
        (tmp_path / "train" / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / "train" / f"{shard:05d}_stats.json").write_text("{}")
    assert call(index, tmp_path, "--unlabelled") == 2
    assert "leave such samples out (--skip_incomplete)" in capsys.readouterr().err
    assert call(index, tmp_path, "--unlabelled", "--skip_incomplete") == 0
    said = capsys.readouterr().out
    assert "6 samples in 2 shards" in said
    assert "note: 3 samples without a picture are left out, such as 000000001 of 00000.tar" in said
    assert "note: 12 files beside the pictures are not used (6 .json, 6 .txt)" in said
    assert "note: 4 files beside the tars are not read (2 .parquet, 2 .json)" in said
    assert read(tmp_path / "train") == [(n, -1) for n in (0, 2, 3, 4, 5, 6)]
    assert call(verify, tmp_path, "--decode") == 0


def test_files_that_are_apart_are_no_gap(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All samples of a tar that nobody sorted would be left out."""
    members = [(f"{n}.txt", b"0") for n in "ab"] + [(f"{n}.png", encoded(0)) for n in "ab"]
    tar_of(tmp_path / "train" / "a.tar", members)
    assert call(index, tmp_path, "--skip_incomplete") == 2
    assert "do not stand together" in capsys.readouterr().err
