"""Every way in which shards go bad is named: shard, sample and cure, with exit code 2."""

import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selfdistill.data.index import index
from selfdistill.data.pack import pack
from selfdistill.data.shards import manifest, tars
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.kit.command import call
from tests.kit.shards import CLASSES, class_folders, uneven


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set: train of 3 shards, test of 1."""
    root = tmp_path_factory.mktemp("packed")
    start = class_folders(root / "images" / "train", {"ant": 5, "bee": 4, "cow": 3})
    class_folders(root / "images" / "test", {"ant": 1, "bee": 1, "cow": 1}, start=start)
    assert call(pack, root / "images", root / "birds", "--samples_per_shard", 4) == 0
    return root / "birds"


@pytest.fixture
def birds(packed: Path, tmp_path: Path) -> Path:
    """A copy to be broken."""
    return Path(shutil.copytree(packed, tmp_path / "birds"))


def problems(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines on standard output of a run that must find problems."""
    capsys.readouterr()
    assert call(verify, *words) == 2
    captured = capsys.readouterr()
    assert captured.err.strip().startswith("error: ")
    assert "problem" in captured.err
    return captured.out.splitlines()


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x01
    path.write_bytes(content)


def shards(root: Path, split: str = "train") -> list[Path]:
    return [root / split / shard.name for shard in Manifest.load(str(root / split)).shards]


@pytest.mark.parametrize("decode", [False, True])
def test_a_clean_set_is_one_line(
    birds: Path, capsys: pytest.CaptureFixture[str], decode: bool
) -> None:
    capsys.readouterr()
    assert call(verify, birds, *(["--decode"] if decode else [])) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert "15 samples in 4 shards" in line
    assert ("images" in line) == decode


def test_one_split_by_itself(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verify, birds / "test") == 0
    assert "test: 3 samples in 1 shards" in capsys.readouterr().out


def test_a_flipped_byte_in_a_picture_names_shard_and_sample(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Manifest.load(str(birds / "train"))
    at, size = file.members[5, :2].tolist()  # the second sample of the second shard
    flip(shards(birds)[1], at + size // 2)
    (line,) = problems(capsys, birds)
    name = next(m.name for m in tars.scan(shards(birds)[1]) if m.offset == at)
    assert shards(birds)[1].name in line
    assert name in line
    assert "sample 1" in line
    assert "copy it again" in line


def test_a_flipped_byte_in_a_header_and_in_a_label(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Manifest.load(str(birds / "train"))
    flip(shards(birds)[0], int(file.members[2, 0]) - tars.BLOCK + 3)
    label_at = int(file.members[9, 2])
    content = bytearray(shards(birds)[2].read_bytes())
    content[label_at] = ord("7")
    shards(birds)[2].write_bytes(content)
    header, label = problems(capsys, birds)
    assert f"{shards(birds)[0].name}, sample 2" in header
    assert "its tar header is broken (the shard's sha256 is not the manifest's): copy" in header
    assert f"{shards(birds)[2].name}, sample 1" in label
    assert "label 7 is outside the 3 classes" in label


def test_a_byte_that_no_checksum_of_a_member_covers(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(shards(birds)[0], shards(birds)[0].stat().st_size - 1)
    (line,) = problems(capsys, birds)
    assert "sha256" in line
    assert shards(birds)[0].name in line


def test_a_truncated_tar_names_the_samples_that_are_lost(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shards(birds)[1]
    at = int(Manifest.load(str(birds / "train")).members[6, 0])  # of the third sample of four
    with path.open("r+b") as opened:
        opened.truncate(at + 10)
    (line,) = problems(capsys, birds)
    assert path.name in line
    assert "cut off" in line
    assert "samples 2 to 3" in line


def test_a_missing_shard(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = shards(birds)[2]
    gone.unlink()
    (line,) = problems(capsys, birds)
    assert str(gone) in line
    assert "missing" in line


def test_a_shard_of_another_set(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(tmp_path / "other", {"ant": 4, "bee": 4, "cow": 4}, start=500)
    assert (
        call(pack, tmp_path / "other", tmp_path / "o", "--splits", 1, "--samples_per_shard", 4) == 0
    )
    shutil.copy(shards(tmp_path / "o")[0], shards(birds)[0])
    lines = problems(capsys, birds)
    assert all(shards(birds)[0].name in line for line in lines)


def test_a_manifest_of_another_set(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(tmp_path / "other", {"cat": 3, "dog": 3})
    assert call(pack, tmp_path / "other", tmp_path / "o", "--splits", 1) == 0
    shutil.copy(tmp_path / "o" / "train" / "manifest.json", birds / "train" / "manifest.json")
    text = "\n".join(problems(capsys, birds))
    assert "other classes" in text
    assert "is missing" in text
    assert "members.npy" in text
    assert f"{birds / 'train' / 'birds-train-000000.tar'} is not in" in text


def test_members_of_another_manifest(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = np.load(birds / "train" / "members.npy")
    np.save(birds / "train" / "members.npy", rows[::-1].copy())
    (line,) = problems(capsys, birds)
    assert "members.npy" in line
    assert "sha256" in line


def test_a_manifest_in_the_wrong_split(birds: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(birds / "test")
    shutil.copytree(birds / "train", birds / "test")
    (line,) = problems(capsys, birds)
    assert "split 'train'" in line


def test_broken_json_and_tars_without_a_manifest(
    birds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (birds / "test" / "manifest.json").write_text("{")
    (birds / "val").mkdir()
    shutil.copy(shards(birds)[0], birds / "val")
    lines = problems(capsys, birds)
    assert any("no manifest of this program" in line for line in lines)
    assert any("python -m data.index" in line and "val" in line for line in lines)


def test_a_table_that_points_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrongly made index: all hashes agree, and the places are those of other members."""
    file = uneven(tmp_path / "s" / "train", [3, 2])
    rows = np.array(file.members)
    rows[1, 0] += 1
    rows[4, 2:] = rows[3, 2:]  # the label of its neighbour
    manifest.write(
        tmp_path / "s" / "train",
        split="train",
        classes=CLASSES,
        class_counts=file.class_counts,
        shards=file.shards,
        members=rows,
        image={"size": 4},
    )
    first, second = problems(capsys, tmp_path / "s")
    assert "t-000000.tar, sample 1" in first
    assert "label is that of another sample" in second


def test_wrong_class_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = uneven(tmp_path / "s" / "train", [3, 2])
    manifest.write(
        tmp_path / "s" / "train",
        split="train",
        classes=CLASSES,
        class_counts=[3, 1, 1],
        shards=file.shards,
        members=np.array(file.members),
        image={"size": 4},
    )
    (line,) = problems(capsys, tmp_path / "s")
    assert "counts 3 samples of class 'ant', the shards hold 2" in line


def test_decode_finds_what_was_packed_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tar made elsewhere may be whole and its picture not: only --decode can tell."""
    (tmp_path / "s" / "train").mkdir(parents=True)
    picture = tmp_path / "b.jpg"
    Image.new("RGB", (64, 64), (9, 9, 9)).save(picture)
    picture.write_bytes(picture.read_bytes()[:200])
    with tarfile.open(tmp_path / "s" / "train" / "a.tar", "w") as tar:
        tar.add(picture, "b.jpg")
    assert call(index, tmp_path / "s") == 0
    assert call(verify, tmp_path / "s") == 0
    (line,) = problems(capsys, tmp_path / "s", "--decode")
    assert "b.jpg" in line


def test_shards_behind_an_address(
    birds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ("--cache_dir", tmp_path / "cache")
    assert call(verify, f"pipe:cat {birds}", *cache) == 0
    assert "15 samples in 4 shards" in capsys.readouterr().out
    flip(shards(birds)[0], 700)
    (line,) = problems(capsys, f"pipe:cat {birds}", "--cache_dir", tmp_path / "other")
    assert shards(birds)[0].name in line


def test_no_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verify, tmp_path / "nothing") == 2
    assert "pack it first" in capsys.readouterr().err
    assert call(verify, tmp_path) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert call(verify, tmp_path, "--workers", "-4") == 2
    assert "workers is -4: give 1 or more" in capsys.readouterr().err
