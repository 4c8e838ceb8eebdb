"""--group_column: pictures of one patient, texts of one author, stay in one split."""

import json
from pathlib import Path

import numpy as np
import pytest

from selfdistill.data.loading.reader import Reader
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.division import divide
from selfdistill.data.sources.samples import Sample
from tests.kit.command import call
from tests.kit.shards import numbered, png


def patients(root: Path, count: int = 40, split: str = "") -> Path:
    """A CSV of pictures: patient p has 1 to 5, all of one class."""
    (root / "in").mkdir(parents=True)
    rows, number = [f"path,label,patient{',split' if split else ''}"], 0
    for patient in range(count):
        for _ in range(1 + patient % 5):
            (root / "in" / f"{number}.png").write_bytes(png(numbered(number, 8)))
            name = "ill" if patient % 3 else "well"
            rows.append(f"in/{number}.png,{name},p{patient}{split}")
            number += 1
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    return root / "list.csv"


def test_groups_stay_whole() -> None:
    """Nothing is lost, shares and classes are nearly met, and a seed decides."""
    generator = np.random.default_rng(0)
    samples = [
        Sample(f"{group}-{i}", b"", group % 3, None, f"g{group}")
        for group in range(200)
        for i in range(int(generator.integers(1, 8)))
    ]
    parts = divide(samples, (0.8, 0.1, 0.1), 3)
    keys = [s.key for part in parts.values() for s in part]
    assert sorted(keys) == sorted(s.key for s in samples)
    homes = {split: {s.group for s in part} for split, part in parts.items()}
    assert not homes["train"] & homes["val"]
    assert not homes["train"] & homes["test"]
    assert not homes["val"] & homes["test"]
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        part = list(parts[split])
        assert len(part) / len(samples) == pytest.approx(share, abs=0.03)
        for label in range(3):
            whole = sum(s.label == label for s in samples)
            assert sum(s.label == label for s in part) / whole == pytest.approx(share, abs=0.06)
    again, other = divide(samples, (0.8, 0.1, 0.1), 3), divide(samples, (0.8, 0.1, 0.1), 4)
    assert [s.key for s in again["val"]] == [s.key for s in parts["val"]]
    assert [s.key for s in other["val"]] != [s.key for s in parts["val"]]


def test_patients_of_a_csv(tmp_path: Path) -> None:
    pack(str(patients(tmp_path)), str(tmp_path / "out"), group_column="patient")
    counts = {
        split: json.loads((tmp_path / "out" / split / "manifest.json").read_text())["samples"]
        for split in ("train", "val", "test")
    }
    assert sum(counts.values()) == 120
    assert all(counts.values())


@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.9, 0.1), (0.98, 0.01, 0.01), (0.5, 0, 0.5)])
@pytest.mark.parametrize("classes", [1, 2, 30])
@pytest.mark.parametrize("count", [3, 4, 5, 7, 30])
def test_no_split_stays_empty(shares: tuple[float, ...], classes: int, count: int) -> None:
    """Where there are as many groups as splits; 30 classes leave most with one sample."""
    for seed in range(5):
        samples = [
            Sample(str(i), b"", i % classes, None, f"g{i % count}") for i in range(count * 2)
        ]
        parts = divide(samples, shares, seed)
        wanted = [s for s, share in zip(("train", "val", "test"), shares, strict=False) if share]
        assert list(parts) == wanted
        assert sorted(s.key for part in parts.values() for s in part) == sorted(
            s.key for s in samples
        )
        homes = {(s.group, split) for split, part in parts.items() for s in part}
        assert len(homes) == count


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(("classes", "each"), [(50, 3), (50, 12), (300, 1), (10, 18)])
def test_small_classes_keep_the_shares(classes: int, each: int, size: int) -> None:
    """No class fills twenty folds; groups are of `size` samples of a class, or less."""
    samples = [
        Sample(f"{label}-{i}", b"", label, None, f"{label}-{i // size}")
        for label in range(classes)
        for i in range(each)
    ]
    for seed in range(3):
        parts = divide(samples, (0.8, 0.1, 0.1), seed)
        for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
            assert len(parts[split]) / len(samples) == pytest.approx(share, abs=0.035)
        assert {s.label for s in parts["train"]} == set(range(classes)) or each == 1
        homes = {(s.group, split) for split, part in parts.items() for s in part}
        assert len(homes) == len({s.group for s in samples})


def test_one_patient_goes_to_train(tmp_path: Path) -> None:
    one = patients(tmp_path, count=1)
    assert call(pack, one, tmp_path / "out", "--group_column", "patient", "--splits", 1) == 0
    assert divide([Sample("a", b"", 0, None, "g")], (1.0,), 0) == {
        "train": [Sample("a", b"", 0, None, "g")]
    }


def test_authors_of_texts(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": f"l{i % 2}", "author": i // 4} for i in range(80)]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(pack, path, tmp_path / "out", "--group_column", "author") == 0


def test_texts_of_held_out_patients_are_not_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labelled = [f"note {p}.{i},{'ab'[p % 2]},p{p}" for p in range(20) for i in range(3)]
    more = [f"more of {p},p{p}" for p in range(25)] + ["of nobody,"]
    for name, rows in (("l", ["text,label,patient", *labelled]), ("u", ["text,patient", *more])):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    source, more_source = (str(tmp_path / f"{name}.csv") for name in "lu")
    pack(source, str(out), group_column="patient", unlabelled=more_source)
    told = capsys.readouterr().err

    def texts(split: str) -> list[str]:
        reader = Reader(Manifest.load(str(out / split)))
        return [one.input.decode() for one in reader.read(np.arange(reader.manifest.samples))]

    held = {one.split()[1].split(".")[0] for split in ("val", "test") for one in texts(split)}
    extra = [one for one in texts("unlabelled") if one.startswith("more")]
    assert {one.split()[-1] for one in extra} == {str(p) for p in range(25)} - held
    assert f"{len(held)} texts of groups in val or test are left out; 1 have no 'patient'" in told


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = patients(tmp_path / "few", count=2)
    given = patients(tmp_path / "given", split=",train")
    text = given.read_text().replace("p7,train", "p7,test", 1)
    given.write_text(text)
    (tmp_path / "folder" / "a").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "folder" / "a" / f"{number}.png").write_bytes(png(numbered(number, 8)))
    for source, column, says in (
        (few, "patient", "2 groups cannot fill 3 splits"),
        (given, "patient", "group 'p7' is in split train, and in test"),
        (few, "doctor", "has no column 'doctor'"),
        (tmp_path / "folder", "patient", "--group_column is for tables"),
    ):
        assert call(pack, source, tmp_path / "out", "--group_column", column) == 2
        assert says in capsys.readouterr().err
