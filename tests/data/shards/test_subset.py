"""Smaller training sets: class shares, nesting, and the same bytes in the shards."""

import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.data.errors import UserError
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.subset import choose, subset
from selfdistill.data.verify import verify
from tests.kit.launches import make_images


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from selfdistill.data.pack import pack

    root = tmp_path_factory.mktemp("subset")
    pack(str(make_images(root / "images", train=20)), str(root / "shards"))
    return root / "shards"


@settings(deadline=None)
@given(
    classes=st.lists(st.integers(0, 4), min_size=5, max_size=200),
    share=st.floats(0.1, 1),
    seed=st.integers(0, 9),
)
def test_each_class_keeps_its_share_and_subsets_nest(
    classes: list[int], share: float, seed: int
) -> None:
    labels = np.array(classes)
    n = max(1, int(share * len(labels)))
    taken = choose(labels, n, seed)
    assert len(set(taken.tolist())) == n
    whole, part = Counter(classes), Counter(labels[taken].tolist())
    shares = {one: count * n / len(labels) for one, count in whole.items()}
    # One of each comes first, also of those with less than one by their share.
    rare = sum(share < 1 for share in shares.values())
    assert all(abs(part[one] - share) <= 1.5 + rare for one, share in shares.items())
    assert len(part) == min(n, len(whole))
    fewer = choose(labels, max(1, n // 2), seed)
    assert set(fewer.tolist()) <= set(taken.tolist())


def test_samples_are_the_sources_own(shards: Path, tmp_path: Path) -> None:
    subset(str(shards), str(tmp_path / "few"), 12)
    few, all_ = (Manifest.load_split(str(p), "train") for p in (tmp_path / "few", shards))
    assert few.class_counts == [4, 4, 4]
    assert few.classes == all_.classes
    assert few.image == all_.image
    source = {r.input: r.label for r in Reader(all_).read(np.arange(all_.samples))}
    for record in Reader(few).read(np.arange(few.samples)):
        assert source[record.input] == record.label
    verify(str(tmp_path / "few"))
    (tar,) = (tmp_path / "few" / "train").glob("*.tar")
    with tarfile.open(tar) as file:
        assert len(file.getnames()) == 24
    for split in ("val", "test"):
        same = [Manifest.load_split(str(p), split).hash for p in (tmp_path / "few", shards)]
        assert same[0] == same[1]


@pytest.mark.parametrize("samples", [2, 61])
def test_a_number_that_cannot_be_is_refused(shards: Path, tmp_path: Path, samples: int) -> None:
    with pytest.raises(UserError, match="60 training samples of 3 classes"):
        subset(str(shards), str(tmp_path / "few"), samples)


def test_what_is_there_is_not_replaced(shards: Path, tmp_path: Path) -> None:
    subset(str(shards), str(tmp_path / "few"), 12)
    with pytest.raises(UserError, match="exists"):
        subset(str(shards), str(tmp_path / "few"), 15)
    subset(str(shards), str(tmp_path / "few"), 15, overwrite=True)
    with pytest.raises(UserError, match="the source itself"):
        subset(str(shards), str(shards), 15, overwrite=True)


def test_splits_of_what_was_there_do_not_stay(shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "less")
    shutil.rmtree(tmp_path / "less" / "test")
    shutil.copytree(shards, tmp_path / "few")
    shutil.copytree(shards / "test", tmp_path / "few" / "unlabelled")
    subset(str(tmp_path / "less"), str(tmp_path / "few"), 12, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "few").iterdir()) == ["train", "val"]
    (tmp_path / "few" / "unlabelled").mkdir()
    (tmp_path / "few" / "unlabelled" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something other than shards"):
        subset(str(tmp_path / "less"), str(tmp_path / "few"), 12, overwrite=True)
