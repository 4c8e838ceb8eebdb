"""Labels and class names of an indexed tar."""

from pathlib import Path

import pytest

from selfdistill.data.formats import labels
from selfdistill.data.index import index
from tests.data.shards.test_index import sample, tar_of
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
