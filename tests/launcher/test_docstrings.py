"""The text set of the quickstart: its sizes, no text twice, no class told by its own name."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from selfdistill.launcher.examples import docstrings
from tests.kit.launches import ROOT, environment

WRITE = """
import sys
from pathlib import Path
from selfdistill.launcher.examples.docstrings import write
write(*map(Path, sys.argv[1:]))
"""
NAMES = ("train.jsonl", "val.jsonl", "test.jsonl", "unlabelled.txt")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders made by two processes, so that they share no order of a set."""
    first, second = (tmp_path_factory.mktemp("docstrings") for _ in range(2))
    words = [sys.executable, "-c", WRITE, str(second), str(second / "unlabelled.txt")]
    with subprocess.Popen(words, cwd=ROOT, env=environment(PYTHONHASHSEED="7")) as other:
        docstrings.write(first, first / "unlabelled.txt")
    assert other.returncode == 0
    return first, second


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def unlabelled(folder: Path) -> list[str]:
    lines = (folder / "unlabelled.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return lines


def test_every_class_has_as_many_texts(written: tuple[Path, Path]) -> None:
    for split, each in (("train", 25), ("val", 10), ("test", 150)):
        counts = Counter(row["label"] for row in rows(written[0], split))
        assert counts == dict.fromkeys(docstrings.PACKAGES, each), split
    assert len(docstrings.PACKAGES) == 8
    # Small packages have fewer left than they were asked for.
    assert 8 * 350 < len(unlabelled(written[0])) <= 8 * docstrings.UNLABELLED


def test_no_text_stands_twice(written: tuple[Path, Path]) -> None:
    labelled = [
        row["text"] for split in ("train", "val", "test") for row in rows(written[0], split)
    ]
    times = Counter(labelled + unlabelled(written[0]))
    assert [text for text, n in times.items() if n > 1] == []


def test_no_text_names_its_own_package(written: tuple[Path, Path]) -> None:
    other_names = {"sklearn": r"|scikit\W*learn"}
    for split in ("train", "val", "test"):
        for row in rows(written[0], split):
            name = re.escape(row["label"]) + other_names.get(row["label"], "")
            assert not re.search(name, row["text"], re.IGNORECASE), row
            assert 60 <= len(row["text"]) <= 600


def test_the_draw_repeats(written: tuple[Path, Path]) -> None:
    first, second = ({name: (f / name).read_bytes() for name in NAMES} for f in written)
    assert first == second
