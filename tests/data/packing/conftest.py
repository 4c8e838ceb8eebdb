"""Split folders of images, for the tests of packing."""

from pathlib import Path

import pytest

from tests.data.packing.test_pack import COUNTS
from tests.kit.shards import class_folders


@pytest.fixture
def splits(tmp_path: Path) -> Path:
    """images/{train,val,test}/CLASS/*.png, numbered throughout; val lacks a class."""
    root = tmp_path / "images"
    start = class_folders(root / "train", COUNTS)
    start = class_folders(root / "val", {"ant": 2, "cow": 1}, start=start)
    class_folders(root / "test", {"ant": 1, "bee": 2, "cow": 1}, start=start)
    return root
