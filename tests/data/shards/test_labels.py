"""Labels and class names of an indexed tar."""

import json
from pathlib import Path

import pytest

from selfdistill.data.formats import labels
from selfdistill.data.index import index
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.subset import subset
from selfdistill.data.verify import verify
from tests.data.shards.test_index import encoded, read, sample, tar_of
from tests.kit.command import call


def test_a_label_beyond_the_names_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    tar_of(tmp_path / "train" / "a.tar", [*sample("a"), *sample("b", label=b"2")])
    assert call(index, tmp_path, "--classes", tmp_path / "names.txt") == 2
    assert "shard a.tar, sample 1: label 2 is outside the 2 classes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("label", "number"),
    [
        ("3", 3),
        (" 3\n", 3),
        ("003", 3),
        ("3.0", 3),
        ("3.", 3),
        ('{"label": 3.0}', 3),
        ('{"label": 3, "class": 3}', 3),
        ('{"label": 3, "class": "dog"}', 3),
        ("1048575", 1048575),
    ],
)
def test_numbers_that_are_a_class(label: str, number: int) -> None:
    assert labels.parse(label.encode()) == number


@pytest.mark.parametrize(
    "label",
    [
        *("", "-1", "+1", "1.5", "1e3", "1 2", "0x1", "1_000", "١", "²", "NaN", "inf", "true"),
        *("18446744073709551557", "9223372036854775808", "1048576", "9" * 5000, '"3"', "[3]"),
        *('{"label": 18446744073709551557}', '{"label": -1}', '{"label": 1.5}', '{"label": NaN}'),
        *('{"label": true}', '{"label": null}', '{"label": "3"}', '{"label": [3]}', "{}"),
        *('{"label": 1, "class": 2}', '{"label": ' + "9" * 5000 + "}", "{" * 9, '{"a":' * 99_999),
        '{"label": Infinity}',
    ],
)
def test_numbers_that_are_none_are_one_line(label: str, tmp_path: Path) -> None:
    """06."""
    with pytest.raises(ValueError, match=r"its (JSON )?label") as caught:
        labels.parse(label.encode())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ant\n\ncow\n", "line 2: it is empty"),
        ("ant\nbee\nant\n", "line 3: ant stands in line 1 too"),
    ],
)
def test_a_list_of_classes_counts_its_lines(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "names.txt").write_text(text)
    tar_of(tmp_path / "train" / "a.tar", sample("a"))
    assert call(index, tmp_path, "--classes", tmp_path / "names.txt") == 2
    assert said in capsys.readouterr().err


def named(folder: Path) -> dict[int, str]:
    """Number in the picture -> name of its class."""
    classes = Manifest.load(str(folder)).classes
    return {number: classes[label] for number, label in read(folder)}


BREEDS = {1: "cat", 2: "äffin", 3: "dog", 4: "cat"}


@pytest.mark.parametrize("shown", ["field", "folder"])
def test_classes_by_name(shown: str, tmp_path: Path) -> None:
    """In a field of the JSON, or as folders in the tar; read back, verified, a part of it taken."""
    options = ("--label_field", "breed") if shown == "field" else ("--label", "folder")
    for shard, part in (("a", (1, 2)), ("b", (3, 4))):
        members = []
        for number in part:
            key = f"x/{BREEDS[number]}/{number}" if shown == "folder" else f"{number}"
            meta = {"breed": BREEDS[number], "label": 7 + number, "caption": "x" * 300}
            members += [(f"{key}.json", json.dumps(meta).encode())]
            members += [(f"{key}.png", encoded(number))]
        tar_of(tmp_path / "train" / f"{shard}.tar", members)
    assert call(index, tmp_path, *options) == 0
    assert named(tmp_path / "train") == BREEDS
    file = Manifest.load(str(tmp_path / "train"))
    assert (file.classes, file.class_counts) == (["cat", "dog", "äffin"], [2, 1, 1])
    assert call(verify, tmp_path, "--decode") == 0
    assert call(subset, tmp_path, tmp_path / "small", "--samples", 3) == 0
    assert named(tmp_path / "small" / "train").items() <= BREEDS.items()


def test_a_later_split_has_the_classes_of_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own would begin at 0 anew, and a dog would be a cat."""
    for split, part in (("train", BREEDS), ("test", {3: "dog"})):
        members = [(f"{name}/{number}.png", encoded(number)) for number, name in part.items()]
        tar_of(tmp_path / split / "a.tar", members)
        assert call(index, tmp_path / split, "--label", "folder") == 0
    assert named(tmp_path / "test") == {3: "dog"}
    assert call(verify, tmp_path) == 0
    tar_of(tmp_path / "val" / "a.tar", [("dgo/3.png", encoded(3))])
    assert call(index, tmp_path / "val", "--label", "folder") == 2
    assert "'dgo' is not among the 3 classes" in capsys.readouterr().err
    (tmp_path / "names.txt").write_text("dgo\ndog\n")
    words = ("--label", "folder", "--classes", tmp_path / "names.txt")
    assert call(index, tmp_path / "val", *words) == 0
    assert Manifest.load(str(tmp_path / "val")).class_counts == [1, 0]


def test_a_field_may_hold_numbers(tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", data)
        for n in (2, 10, 11)
        for kind, data in (("png", encoded(n)), ("json", b'{"id": %d.0}' % n))
    ]
    tar_of(tmp_path / "train" / "a.tar", members)
    assert call(index, tmp_path, "--label_field", "id") == 0
    assert named(tmp_path / "train") == {2: "2", 10: "10", 11: "11"}
    assert Manifest.load(str(tmp_path / "train")).classes == ["2", "10", "11"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"breed": null}', "its breed None is no class"),
        (b'{"breed": ["a"]}', "is no class"),
        (b'{"breed": true}', "is no class"),
        (b'{"breed": 1.5}', "is no class"),
        (b'{"breed": "  "}', "is no class"),
        (b'{"breed": "' + b"x" * 2000 + b'"}', "too long"),
        (b'{"race": "cat"}', "no field 'breed', only race"),
        (b"[1]", "no field 'breed'"),
        (b"{", "no valid JSON"),
        (b'{"breed": ' + b"[" * 99 + b"]" * 99 + b"}", "no valid JSON"),
        (b'{"breed": "\\ud800"}', "no valid JSON"),
    ],
)
def test_fields_that_are_no_class(
    text: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("a.json", text), ("a.png", encoded(1))])
    assert call(index, tmp_path, "--label_field", "breed") == 2
    error = capsys.readouterr().err
    assert said in error
    assert "sample a" in error
    assert len(error) < 400


def test_names_that_cannot_be_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "train" / "a.tar", [("a.png", encoded(1))])
    assert call(index, tmp_path, "--label", "folder") == 2
    assert "lies in no folder" in capsys.readouterr().err
    assert call(index, tmp_path, "--label_field", "breed") == 2
    assert "no .json with the field 'breed'" in capsys.readouterr().err
    assert call(index, tmp_path, "--label_field", "breed", "--unlabelled") == 2
    members = [(f"{n}/{n}.png", encoded(n)) for n in range(30)]
    tar_of(tmp_path / "train" / "a.tar", members)
    assert call(index, tmp_path, "--label", "folder") == 2
    assert "hardly classes" in capsys.readouterr().err


def test_a_number_in_the_table_is_checked(tmp_path: Path) -> None:
    from selfdistill.data.errors import BrokenData
    from selfdistill.data.loading.reader import Reader

    tar_of(tmp_path / "train" / "a.tar", [("cat/1.png", encoded(1)), ("dog/2.png", encoded(2))])
    assert call(index, tmp_path, "--label", "folder") == 0
    file = Manifest.load(str(tmp_path / "train"))
    table = file.members.copy()
    assert table[:, 2:].tolist() == [[-2, 0], [-2, 1]]
    table[0, 3] = 2
    file.__dict__["members"] = table
    with pytest.raises(BrokenData, match="label 2 is outside the 2 classes"):
        Reader(file).record(0)
