"""Broken shards in training: each error names shard, sample and cure; skipping is asked for."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.loading.codec import Images
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards import tars
from selfdistill.data.shards.checking import check_hashes
from selfdistill.data.shards.manifest import Manifest
from tests.kit.shards import uneven


@pytest.fixture
def split(tmp_path: Path) -> Manifest:
    return uneven(tmp_path / "train", [4, 6, 5])


def place(split: Manifest, shard: int) -> Path:
    return Path(split.shard_place(shard))


def flip(split: Manifest, sample: int, column: int, offset: int, mask: int = 1) -> None:
    """Flips a bit of a byte of a sample's member (column 0: input, 2: label)."""
    shard = int(np.searchsorted(split.starts, sample, side="right")) - 1
    at = int(split.members[sample, column]) + offset
    content = bytearray(place(split, shard).read_bytes())
    content[at] ^= mask
    place(split, shard).write_bytes(content)


def read_all(split: Manifest, **options: object) -> set[int]:
    """One epoch of training; the ids seen."""
    loader = Loader(Manifest.load(split.root), batch=5, **options)
    stream = iter(loader)
    seen = {i for _ in range(3) for i in next(stream)["ids"].tolist()}
    stream.close()
    return seen


def test_whole_data_reads(split: Manifest) -> None:
    assert read_all(split) == set(range(15))
    records = Reader(split).read(np.array([7, 0]))
    assert [r.label for r in records] == [1, 0]
    assert records[0].name == f"shard {place(split, 1)}, k00007.png"


@pytest.mark.parametrize(
    ("column", "offset", "mask", "said"),
    [
        (0, 45, 1, "the image cannot be read: the checksum of its chunk IDAT"),
        (0, 1, 1, "the image cannot be read"),
        (0, -512, 1, "tar header is broken"),
        (0, -512 + 130, 1, "tar header is broken"),
        (2, -400, 1, "tar header is broken"),
        (2, 0, 0x40, "is no class number"),
        (2, 0, 8, "label 9 is outside the 3 classes"),
    ],
)
def test_a_flipped_byte(split: Manifest, column: int, offset: int, mask: int, said: str) -> None:
    flip(split, 7, column, offset, mask)
    with pytest.raises(UserError, match=said) as caught:
        read_all(split)
    line = str(caught.value)
    assert f"shard {place(split, 1)}" in line
    assert "anew" in line or "again" in line
    if offset != -512:  # there the name itself is broken
        assert "k00007" in line or "sample 3" in line
    assert "\n" not in line


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_one_line_from_workers_too(split: Manifest, workers: int) -> None:
    flip(split, 7, 0, 45)
    with pytest.raises(UserError) as caught:
        read_all(split, workers=workers)
    assert str(caught.value).startswith(f"shard {place(split, 1)}, k00007.png: the image cannot")
    with pytest.raises(UserError, match="k00007"):
        list(Sequential(split, batch=4, workers=workers))


def truncate(split: Manifest) -> None:
    content = place(split, 1).read_bytes()
    place(split, 1).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: place(s, 1).unlink(), "cannot be opened: No such file"),
        (truncate, "is cut off"),
        (lambda s: shutil.copy(place(s, 0), place(s, 1)), "is cut off|is another file"),
        (lambda s: place(s, 1).write_bytes(b"x" * 99_999), "is another file"),
    ],
)
def test_a_damaged_shard_is_named_at_the_start(
    split: Manifest, damage: Callable[[Manifest], object], said: str
) -> None:
    damage(split)
    with pytest.raises(BrokenData, match=said) as caught:
        Loader(split, batch=5)
    assert str(place(split, 1)) in str(caught.value)
    with pytest.raises(BrokenData, match=said):
        Sequential(split, batch=5)
    with pytest.raises(BrokenData, match=said):  # many shards are checked when they are opened
        Reader(split).record(7)


def test_a_shard_of_the_right_size_but_other_members(split: Manifest) -> None:
    place(split, 1).write_bytes(bytes(split.shards[1].bytes))
    with pytest.raises(UserError, match="tar header is broken"):
        read_all(split)
    other = uneven(Path(split.root).parent / "other", [6, 6], size=40)
    assert other.shards[0].bytes == split.shards[1].bytes
    shutil.copy(place(other, 0), place(split, 1))
    with pytest.raises(UserError, match=r"the tar holds \d+ bytes where the manifest says"):
        read_all(split)


def edit(split: Manifest, /, **changes: object) -> None:
    path = Path(split.root) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda s: (Path(s.root) / "manifest.json").unlink(), "no manifest.json in"),
        (lambda s: (Path(s.root) / "manifest.json").write_text("{"), "is no manifest"),
        (lambda s: edit(s, format="other"), "format"),
        (lambda s: edit(s, version=2), "version"),
        (lambda s: edit(s, samples=16), "do not add up to 16"),
        (lambda s: edit(s, classes=["ant"]), "differ in length"),
        (
            lambda s: edit(
                s, shards=[{"name": "../x", "sha256": "0" * 64, "bytes": 1, "samples": 15}]
            ),
            "'../x' is neither a plain file name",
        ),
        (lambda s: (Path(s.root) / "members.npy").unlink(), "members.npy is missing"),
        (lambda s: (Path(s.root) / "members.npy").write_bytes(b"x"), "cannot be read"),
        (
            lambda s: np.save(Path(s.root) / "members.npy", np.zeros((15, 4), np.int64)),
            "is not the table",
        ),
    ],
)
def test_a_damaged_index(split: Manifest, damage: Callable[[Manifest], object], said: str) -> None:
    damage(split)
    with pytest.raises(UserError, match=said) as caught:
        read_all(split)
    assert "python -m data" in str(caught.value)


def test_a_foreign_manifest(split: Manifest, tmp_path: Path) -> None:
    uneven(tmp_path / "foreign", [5, 6, 4])
    shutil.copy(tmp_path / "foreign" / "manifest.json", Path(split.root))
    with pytest.raises(UserError, match=r"t-000000.tar is cut off|is another file"):
        read_all(split)
    # With its own table, and shards of equal size by chance.
    same = uneven(tmp_path / "same", [4, 6, 5], labels=False)
    shutil.copy(Path(same.root) / "manifest.json", Path(split.root))
    with pytest.raises(UserError, match="t-00000"):
        read_all(split)


def test_missing_data_sets_and_splits(split: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data set at"):
        Manifest.load_split(str(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match=r"no split 'test' \(it has train\)"):
        Manifest.load_split(str(tmp_path), "test")
    assert Manifest.load_split(str(tmp_path), "train").hash == split.hash
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    with pytest.raises(UserError, match="holds the split 'train', not 'test'"):
        Manifest.load_split(str(tmp_path), "test")
    with pytest.raises(UserError, match="is a file"):
        Manifest.load(str(place(split, 0)))


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_is_asked_for_counted_and_reported(split: Manifest, workers: int) -> None:
    flip(split, 7, 0, 45)
    flip(split, 2, 2, 0, 4)
    loader = Loader(split, batch=5, skip_broken=0.2, workers=workers, partitions=5, seed=1)
    stream = iter(loader)
    with pytest.warns(UserWarning, match="skipped: .*k0000"):
        batches = [next(stream) for _ in range(6)]
    assert set(loader.broken) == {2, 7}
    assert "label 6 is outside" in loader.broken[2]
    ids = np.concatenate([b["ids"].numpy() for b in batches])
    assert len(ids) == 30
    assert not {2, 7} & set(ids.tolist())
    stream.close()
    # The replacement too depends on the position alone.
    for rank in range(5):
        one = Loader(split, batch=5, skip_broken=0.2, partitions=5, seed=1, rank=rank, world=5)
        single = iter(one)
        mine = [int(next(single)["ids"]) for _ in range(6)]
        assert mine == ids.reshape(6, 5)[:, rank].tolist()


@pytest.mark.filterwarnings("ignore:skipped")
def test_too_many_broken_samples_are_an_error(split: Manifest) -> None:
    flip(split, 7, 0, 45)
    flip(split, 2, 0, 45)
    with pytest.raises(
        UserError, match=r"2 broken .* share 0.1 of 15: .*--data.skip_broken.*; the last: shard"
    ):
        read_all(split, skip_broken=0.1)
    place(split, 1).unlink()
    assert read_all(split, skip_broken=0.5) == set(range(15)) - {2, *range(4, 10)}


@pytest.mark.filterwarnings("ignore:skipped")
def test_skipped_rows_of_one_pass_are_not_valid(split: Manifest) -> None:
    flip(split, 7, 0, 45)
    run = Sequential(split, batch=4, skip_broken=0.1)
    valid = {int(i) for b in run for i, v in zip(b["ids"], b["valid"], strict=True) if v}
    assert valid == set(range(15)) - {7}
    assert set(run.broken) == {7}


def test_a_report_is_told_of_each_skipped_sample_once(
    split: Manifest, recwarn: pytest.WarningsRecorder
) -> None:
    lines: list[str] = []
    flip(split, 7, 0, 45)
    flip(split, 2, 0, 45)
    for _ in range(2):
        lines.clear()
        read_all(split, skip_broken=0.2, report=lines.append)
        list(Sequential(split, batch=4, skip_broken=0.2, report=lines.append))
        assert len(lines) == 4
        assert all(f"skipped: shard {split.root}" in line for line in lines)
    assert not recwarn.list
    # What another rank told of is counted, and not told again.
    loader = Loader(split, batch=5, skip_broken=0.2, report=lines.append)
    loader.broken[7] = "told"
    lines.clear()
    stream = iter(loader)
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(lines) == 1
    assert "k00002" in lines[0]


def test_padding_when_the_first_sample_is_broken(tmp_path: Path) -> None:
    """Images of their own sizes: a row of padding has that of a sample that can be read."""
    tiny = uneven(tmp_path / "tiny", [2])
    flip(tiny, 0, 0, 45)
    options = {"batch": 3, "rank": 0, "world": 5, "codec": Images(None)}
    (batch,) = Sequential(tiny, skip_broken=0.5, report=lambda _: None, **options)
    assert batch["images"].shape == (3, 3, 4, 4)
    assert not batch["valid"].any()
    with pytest.raises(UserError, match="k00000"):
        list(Sequential(tiny, **options))


def test_hashes_show_what_no_sample_does(split: Manifest) -> None:
    check_hashes(split, [0, 1, 2])
    flip(split, 7, 0, 45)
    check_hashes(split, [0, 2])
    with pytest.raises(UserError, match=r"t-000001.tar, sample 3, k00007.png: the checksum of"):
        check_hashes(split, [0, 1, 2])
    check_hashes(split, [0, 1, 2], hidden_only=True)
    place(split, 0).unlink()
    with pytest.raises(UserError, match=r"t-000000.tar is missing: put it back"):
        check_hashes(split, [0, 1, 2])
    check_hashes(split, [0, 1, 2], hidden_only=True)
    flip(split, 11, 2, 0, 3)  # another class, 2 -> 1
    assert Reader(split).record(11).label == 1
    for hidden_only in (False, True):
        with pytest.raises(UserError, match=r"t-000002.tar: its sha256 is not .*copy it again"):
            check_hashes(split, [2], hidden_only=hidden_only)


def test_all_broken(split: Manifest) -> None:
    for sample in range(15):
        flip(split, sample, 0, 45)
    with pytest.raises(UserError, match="in a row are broken; the last: shard"):
        read_all(split, skip_broken=0.99)


def test_headers_of_all_kinds() -> None:
    import tarfile

    for size in (0, 511, 8**11 - 1, 8**11 + 5):
        info = tarfile.TarInfo("a" * 100)
        info.size = size
        block = info.tobuf(tarfile.GNU_FORMAT)[-512:]
        assert tars.parse_header(block) == ("a" * 100, -1, size)
        with pytest.raises(ValueError, match="broken"):
            tars.parse_header(block[:50] + b"z" + block[51:])
    with pytest.raises(ValueError, match="broken"):
        tars.parse_header(bytes(512))


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        *((0, at, "places it at byte") for at in (-1, 0, 2**40, 2**63 - 1, -(2**63))),
        *((1, size, "places it at byte") for size in (-1, 2**40, 2**63 - 1, -(2**63))),
        (2, -1, "has no label for it"),
        (2, -3, "places its label at byte -3"),
        *((3, size, "places its label at byte") for size in (-1, 2**63 - 1)),
    ],
)
def test_a_row_of_the_table_that_leads_nowhere_is_named(
    split: Manifest, column: int, value: int, said: str
) -> None:
    table = Path(split.root) / "members.npy"
    rows = np.load(table)
    rows[7, column] = value
    np.save(table, rows)
    manifest = json.loads((Path(split.root) / "manifest.json").read_text())
    manifest["members"]["sha256"] = hashlib.sha256(table.read_bytes()).hexdigest()
    edit(split, members=manifest["members"])
    with pytest.raises(UserError, match=rf"t-000001.tar, sample 3: members.npy {said}"):
        list(Sequential(Manifest.load(split.root), batch=15))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"split": "../x"}, "split is '../x', none of"),
        ({"classes": ["a", "a", "c"]}, "the class 'a' stands there twice"),
        ({"class_counts": [-1, 1, 15]}, "class_counts.0"),
        ({"samples": 2**63}, "samples"),
    ],
)
def test_a_manifest_that_cannot_be_meant(
    split: Manifest, changes: dict[str, object], said: str
) -> None:
    edit(split, **changes)
    with pytest.raises(UserError, match=said):
        Manifest.load(split.root)


@pytest.mark.parametrize("name", ["t-000000.tar", "http://[bad", "http://h/\0", "x" * 300])
def test_a_shards_name_that_cannot_be_meant(split: Manifest, name: str) -> None:
    shards = json.loads((Path(split.root) / "manifest.json").read_text())["shards"]
    shards[1]["name"] = name
    edit(split, shards=shards)
    with pytest.raises(UserError, match=r"stands there twice|is neither a plain file name"):
        Manifest.load(split.root)
