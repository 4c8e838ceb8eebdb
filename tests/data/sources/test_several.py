"""Several labels a sample, from the table to the batch. The oracle is what was put there."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from selfdistill.data.errors import UserError
from selfdistill.data.formats import images, labels
from selfdistill.data.index import index
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.loading.reader import Reader
from selfdistill.data.pack import pack
from selfdistill.data.shards import manifest
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources.division import divide
from selfdistill.data.sources.samples import Sample
from selfdistill.data.subset import subset
from selfdistill.data.verify import verify
from tests.kit.command import call
from tests.kit.shards import class_folders, number_of

SETS = [("sun",), ("sun", "sea"), (), ("sea",), ("fog", "sun"), ("sea", "sun", "fog")] * 4


def packed(root: Path) -> dict[int, tuple[str, ...]]:
    """Number of every picture, or text, of all splits -> the names of its classes."""
    found = {}
    for split in ("train", "val", "test"):
        if not (root / split).is_dir():
            continue
        file = Manifest.load_split(str(root), split)
        assert file.several
        assert file.labelled == file.samples
        for record in Reader(file).read(np.arange(file.samples)):
            assert record.label == -1
            number = (
                number_of(images.decode(record.input, None))
                if file.kind == "image"
                else int(record.input.split()[-1])
            )
            found[number] = tuple(file.classes[label] for label in record.labels)
    return found


def csv_of_images(tmp: Path) -> Path:
    class_folders(tmp / "x", {"all": len(SETS)})
    rows = [f"x/all/p{i}.png,{' ; '.join(names)}" for i, names in enumerate(SETS)]
    (tmp / "list.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    return tmp / "list.csv"


def csv_of_texts(tmp: Path) -> Path:
    rows = [f"text {i},{';'.join(names)}" for i, names in enumerate(SETS)]
    (tmp / "list.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return tmp / "list.csv"


def json_lines(tmp: Path) -> Path:
    rows = [{"text": f"text {i}", "label": list(names)} for i, names in enumerate(SETS)]
    (tmp / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp / "list.jsonl"


def parquet_of_texts(tmp: Path) -> Path:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    names = ["fog", "sea", "sun"]
    features = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=names))})
    rows = {
        "text": [f"text {i}" for i in range(len(SETS))],
        "label": [[names.index(name) for name in one] for one in SETS],
    }
    Dataset.from_dict(rows, features=features).to_parquet(tmp / "list.parquet")
    return tmp / "list.parquet"


def parquet_of_images(tmp: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    class_folders(tmp / "x", {"all": len(SETS)})
    pictures = [(tmp / f"x/all/p{i}.png").read_bytes() for i in range(len(SETS))]
    table = pyarrow.table({"image": pictures, "label": [list(names) for names in SETS]})
    pyarrow.parquet.write_table(table, tmp / "list.parquet")
    return tmp / "list.parquet"


def saved(tmp: Path) -> Path:
    from datasets import ClassLabel, Dataset, Features, Sequence, Value

    names = ["fog", "sea", "sun"]
    features = Features({"text": Value("string"), "label": Sequence(ClassLabel(names=names))})
    rows = {
        "text": [f"text {i}" for i in range(len(SETS))],
        "label": [[names.index(name) for name in one] for one in SETS],
    }
    Dataset.from_dict(rows, features=features).save_to_disk(tmp / "saved")
    return tmp / "saved"


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (csv_of_images, ["--label_separator", ";"]),
        (csv_of_texts, ["--label_separator", ";"]),
        (json_lines, []),
        (parquet_of_texts, []),
        (parquet_of_images, []),
        (saved, []),
    ],
)
def test_every_label_arrives(
    source: Callable[[Path], Path],
    options: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert call(pack, source(tmp_path), out, *options) == 0
    said = capsys.readouterr()
    assert "several labels a sample: 1.50 on average, 4 of 24 samples with none" in said.err
    wanted = {i: tuple(sorted(names)) for i, names in enumerate(SETS)}
    assert packed(out) == wanted
    train = Manifest.load_split(str(out), "train")
    assert train.classes == ["fog", "sea", "sun"]
    counts = Counter(
        name
        for split in ("train", "val", "test")
        for name, count in counted(out, split)
        for _ in range(count)
    )
    assert counts == Counter(name for names in SETS for name in names)
    assert call(verify, out, "--decode") == 0


def counted(out: Path, split: str) -> list[tuple[str, int]]:
    file = Manifest.load_split(str(out), split)
    return list(zip(file.classes, file.class_counts, strict=True))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("several")
    assert call(pack, csv_of_images(root), root / "out", "--label_separator", ";") == 0
    return root / "out"


def test_batches_hold_a_row_of_truths(out: Path) -> None:
    file = Manifest.load_split(str(out), "train")
    truth = {i: [name in names for name in file.classes] for i, names in enumerate(SETS)}
    seen = 0
    for batch in Sequential(file, batch=7, require_labels=True):
        assert batch["labels"].dtype == torch.bool
        assert batch["labels"].shape == (7, 3)
        for picture, row, valid in zip(
            batch["images"], batch["labels"], batch["valid"], strict=True
        ):
            assert row.tolist() == (truth[number_of(picture.numpy())] if valid else [False] * 3)
            seen += int(valid)
    assert seen == file.samples
    batch = next(iter(Loader(file, batch=4, require_labels=True, workers=1)))
    rows = [truth[number_of(picture.numpy())] for picture in batch["images"]]
    assert batch["labels"].tolist() == rows


def test_other_programs_read_the_labels(out: Path) -> None:
    import webdataset

    shards = [str(path) for path in sorted((out / "train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    file = Manifest.load_split(str(out), "train")
    ours = [list(record.labels) for record in Reader(file).read(np.arange(file.samples))]
    assert [sample["labels.json"] for sample in samples] == ours


def test_an_older_reader_refuses(out: Path, tmp_path: Path) -> None:
    content = json.loads((out / "train" / manifest.FILE).read_text())
    assert content["version"] == 2  # readers of version 1 say so, and read no wrong labels
    for wrong in (
        {"version": 1},
        {"labels": "one"},
        {"labelled": 99},
        {"class_counts": [99, 1, 1]},
    ):
        with pytest.raises(UserError, match=r"manifest\.json"):
            Manifest(json.dumps(content | wrong).encode(), str(out / "train"))


@pytest.mark.parametrize(
    "text",
    ["", "3", "[1", '["a"]', "[1.5]", "[true]", "[-1]", "[2, 1]", "[1, 1]", "[1048576]", "{}"],
)
def test_lists_that_are_none_are_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^its labels") as caught:
        labels.parse_several(text.encode())
    assert "\n" not in str(caught.value)


def test_a_list_that_was_changed_is_found(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(out, tmp_path / "out")
    shard = next((tmp_path / "out" / "train").glob("*.tar"))
    content = shard.read_bytes()
    assert b"[1, 2]" in content
    shard.write_bytes(content.replace(b"[1, 2]", b"[1, 9]", 1))
    assert call(verify, tmp_path / "out") == 2
    assert "its label (1, 9) is outside the 3 classes" in capsys.readouterr().out
    file = Manifest.load_split(str(tmp_path / "out"), "train")
    with pytest.raises(UserError, match="its label 9 is outside the 3 classes"):
        Reader(file).read(np.arange(file.samples))


def test_rare_classes_are_in_every_split() -> None:
    """Nine of ten samples have a common class; a rare one beside it still gets its share."""
    sets = [(0, 1) if i % 10 == 0 else (0,) for i in range(200)]
    samples = [Sample(str(i), b"", one) for i, one in enumerate(sets)]
    for group in (None, 4):
        given = [
            s._replace(group=None if group is None else str(i // group))
            for i, s in enumerate(samples)
        ]
        parts = divide(given, (0.5, 0.25, 0.25), seed=0)
        rare = {split: sum(1 in sets[int(s.key)] for s in part) for split, part in parts.items()}
        assert rare["train"] == pytest.approx(10, abs=0 if group is None else 2)
        assert min(rare.values()) >= 4
        assert sorted(int(s.key) for part in parts.values() for s in part) == list(range(200))


def test_a_subset_keeps_all_labels(out: Path, tmp_path: Path) -> None:
    assert call(subset, out, tmp_path / "few", "--samples", 9) == 0
    few = packed(tmp_path / "few")
    whole = packed(out)
    assert all(whole[number] == names for number, names in few.items())
    assert Manifest.load_split(str(tmp_path / "few"), "train").samples == 9


def test_indexing_anew_is_refused(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(index, out / "train", "--overwrite") == 2
    assert "has several labels, of which this command makes no index" in capsys.readouterr().err
    assert Manifest.load_split(str(out), "train").several


def test_a_split_that_joins_others_takes_their_numbers(tmp_path: Path) -> None:
    for name, rows in (("a", [["a", "b"], ["c"]]), ("b", [["c", "b"], []])):
        lines = [{"text": f"text {2 * (name == 'b') + i}", "label": r} for i, r in enumerate(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert call(pack, tmp_path / "a.jsonl", tmp_path / "out", "--split", "train") == 0
    assert call(pack, tmp_path / "b.jsonl", tmp_path / "out", "--split", "val") == 0
    assert packed(tmp_path / "out") == {0: ("a", "b"), 1: ("c",), 2: ("b", "c"), 3: ()}


def test_pairs_of_texts_are_json_too(tmp_path: Path) -> None:
    """Input and labels of a sample then both end in .json."""
    rows = [{"text": "t", "text_pair": f"u {i}", "label": list(x)} for i, x in enumerate(SETS)]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert call(pack, tmp_path / "l.jsonl", tmp_path / "out", "--splits", "1") == 0
    assert call(verify, tmp_path / "out", "--decode") == 0
    file = Manifest.load_split(str(tmp_path / "out"), "train")
    for record in Reader(file).read(np.arange(file.samples)):
        names = SETS[int(json.loads(record.input)["text_pair"].split()[1])]
        assert [file.classes[label] for label in record.labels] == sorted(names)


def table(text: str, name: str = "list.csv") -> Callable[[Path], Path]:
    def make(tmp: Path) -> Path:
        class_folders(tmp / "x", {"a": 3})
        (tmp / name).write_text(text)
        return tmp / name

    return make


_HEAD = "path,label\nx/a/p0.png,"


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        (table(f"{_HEAD}a\nx/a/p1.png,b\n"), [";"], "no label of .*list.csv has it, such as 'a'"),
        (table(f"{_HEAD}a;b;a\n"), [";"], "line 2: the label 'a' stands there twice"),
        (table(f"{_HEAD}a;;b\n"), [";"], "line 2: among its labels is '', neither a name nor"),
        (table(f"{_HEAD}a;b\n"), [""], "--label_separator is empty"),
        (table(f"{_HEAD}a;b\nx/a/p1.png,a\nx/a/p2.png,b\n"), [], "--label_separator ';'"),
        (lambda tmp: (class_folders(tmp / "x", {"a": 3}), tmp / "x")[1], [";"], "is for tables"),
        (
            table('{"text": "t", "label": ["a"]}\n{"text": "u", "label": "a"}\n', "l.jsonl"),
            [],
            "line 2: its label is 'a', and that of .* line 1 a list",
        ),
        (table('{"text": "t", "label": ["a", null]}\n', "l.jsonl"), [], "among its labels is None"),
        (table('{"text": "t", "label": ["a", -1]}\n', "l.jsonl"), [], "among its labels is -1"),
        (table('{"text": "t", "label": ["a", "a"]}\n', "l.jsonl"), [], "'a' stands there twice"),
        (table('{"text": "t", "label": [["a"]]}\n', "l.jsonl"), [], "neither a name nor a number"),
    ],
)
def test_mistakes(
    source: Callable[[Path], Path],
    options: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    given = [word for option in options for word in ("--label_separator", option)]
    assert call(pack, source(tmp_path), tmp_path / "out", *given) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(said, errors[0]), errors[0]
    assert not (tmp_path / "out").exists()
