"""Texts as people have them, packed through the real command and read back."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest

from selfdistill.data.formats import texts
from selfdistill.data.formats.texts import Text
from selfdistill.data.loading.reader import Reader
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.kit.command import call
from tests.kit.shards import numbered, png

Rows = dict[str, list[tuple[Text, str | None]]]


def write(path: Path, *lines: str, encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(f"{line}\n" for line in lines).encode(encoding))
    return path


def objects(path: Path, *rows: object) -> Path:
    return write(path, *(json.dumps(row) for row in rows))


def read(root: Path) -> Rows:
    """Per split the texts with the names of their classes, in order of the texts."""
    found: Rows = {}
    for folder in sorted(root.iterdir()):
        manifest = Manifest.load_split(str(root), folder.name)
        assert manifest.kind == "text"
        records = (Reader(manifest).record(i) for i in range(manifest.samples))
        found[folder.name] = sorted(
            (
                texts.read(r.input, manifest.text["stored"]),
                manifest.classes[r.label] if r.label >= 0 else None,
            )
            for r in records
        )
    return found


def single(**texts_of: str | None) -> list[tuple[Text, str | None]]:
    return sorted((Text(text, None), label) for text, label in texts_of.items())


THREE = {"train": single(one="a", two="b"), "val": single(three="b"), "test": single(four="a")}


def jsonl(root: Path) -> Path:
    objects(root / "train.jsonl", {"text": "one", "label": "a"}, {"text": "two", "label": "b"})
    objects(root / "dev.jsonl", {"text": "three", "label": "b", "metadata": [1]})
    objects(root / "test.jsonl", {"text": "four", "label": "a"})
    return root


def one_jsonl(root: Path) -> Path:
    return objects(
        root / "all.jsonl",
        {"text": "one", "label": "a", "split": "train"},
        {"text": "two", "label": "b", "split": "train"},
        {"text": "three", "label": "b", "split": "validation"},
        {"text": "four", "label": "a", "split": "test"},
    )


def csv(root: Path) -> Path:
    return write(
        root / "all.csv",
        "label,text,split",
        *('a,"one",train', "b,two,train", "b,three,valid", "a,four,test"),
        encoding="utf-8-sig",
    )


def tsv(root: Path) -> Path:
    write(root / "train.tsv", "text\tlabel", "one\ta", "two\tb")
    write(root / "valid.tsv", "text\tlabel", "three\tb")
    write(root / "test.tsv", "text\tlabel", "four\ta")
    return root


def saved(root: Path) -> Path:
    classes = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])}
    )
    rows = {
        "train": {"text": ["one", "two"], "label": [1, 0]},
        "validation": {"text": ["three"], "label": [0]},
        "test": {"text": ["four"], "label": [1]},
    }
    parts = {k: datasets.Dataset.from_dict(v, features=classes) for k, v in rows.items()}
    datasets.DatasetDict(parts).save_to_disk(root / "saved")
    return root / "saved"


@pytest.mark.parametrize("source", [jsonl, one_jsonl, csv, tsv, saved])
def test_forms(source: Callable[[Path], Path], tmp_path: Path) -> None:
    assert call(pack, source(tmp_path / "source"), tmp_path / "out") == 0
    assert read(tmp_path / "out") == THREE
    assert Manifest.load_split(str(tmp_path / "out"), "train").classes == ["a", "b"]
    assert call(verify, tmp_path / "out", "--decode") == 0


@pytest.mark.parametrize("source", [one_jsonl, csv, saved])
def test_the_splits_of_one_file_stand_without_labels(
    source: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert call(pack, source(tmp_path / "source"), tmp_path / "out", "--unlabelled", "true") == 0
    assert read(tmp_path / "out") == {
        split: [(text, None) for text, _ in texts_of] for split, texts_of in THREE.items()
    }


@pytest.mark.parametrize("words", [[], ["--unlabelled", "true"], ["--split", "train"]])
def test_some_rows_without_a_split(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"text": "one", "label": "a", "split": "train"}
    path = objects(tmp_path / "all.jsonl", given, {"text": "two", "label": "a"})
    assert call(pack, path, tmp_path / "out", *words) == 2
    assert "all.jsonl line 2 has no split, as others have" in capsys.readouterr().err


def test_texts_are_stored_as_they_are(tmp_path: Path) -> None:
    odd = ' "quoted"\t\u2028 naïve 😀  two  spaces '
    objects(tmp_path / "train.jsonl", {"text": odd, "label": 0}, {"text": "x", "label": 10})
    objects(tmp_path / "test.jsonl", {"text": "line\nline\r\n", "label": 10})
    assert call(pack, tmp_path, tmp_path / "out", "--metric", "macro_f1") == 0
    assert read(tmp_path / "out") == {
        "train": sorted([(Text(odd, None), "0"), (Text("x", None), "10")]),
        "test": [(Text("line\nline\r\n", None), "10")],
    }
    assert Manifest.load_split(str(tmp_path / "out"), "test").text["metric"] == "macro_f1"


def test_quotation_marks_mean_nothing_in_tsv(tmp_path: Path) -> None:
    path = write(tmp_path / "all.tsv", "label\ttext", 'a\t"open', "b\tx", "a\ty")
    assert call(pack, path, tmp_path / "out", "--split", "train") == 0
    assert (Text('"open', None), "a") in read(tmp_path / "out")["train"]


def test_pairs_and_names_of_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "all.csv", "premise,hypothesis,gold", "it rains,it is wet,yes", "a,b,no"
    )
    words = ("--text_column", "premise", "--pair_column", "hypothesis", "--label_column", "gold")
    assert call(pack, path, tmp_path / "out", "--split", "train", *words) == 0
    expected = [(Text("a", "b"), "no"), (Text("it rains", "it is wet"), "yes")]
    assert read(tmp_path / "out") == {"train": expected}
    assert Manifest.load_split(str(tmp_path / "out"), "train").text["pairs"] is True


def test_plain_text_has_no_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "plain.txt", "one text", "", "another, with a , and a \t")
    assert call(pack, path, tmp_path / "out", "--split", "train") == 0
    assert read(tmp_path / "out") == {
        "train": single(**{"one text": None, "another, with a , and a \t": None})
    }


@pytest.mark.parametrize("form", ["txt", "jsonl", "csv"])
def test_more_texts_for_the_first_stages(form: str, tmp_path: Path) -> None:
    rows = {
        "txt": ("five", "six"),
        "jsonl": ('{"text": "five", "label": "zzz"}', '{"text": "six"}'),
        "csv": ("text", "five", "six"),
    }[form]
    extra = write(tmp_path / f"more.{form}", *rows)
    words = (jsonl(tmp_path / "source"), tmp_path / "out", "--unlabelled", extra)
    assert call(pack, *words) == 0
    both = single(one=None, two=None, five=None, six=None)
    assert read(tmp_path / "out") == {**THREE, "unlabelled": both}
    assert call(verify, tmp_path / "out", "--decode") == 0


def test_pairs_among_the_unlabelled_are_kept(tmp_path: Path) -> None:
    extra = objects(tmp_path / "more.jsonl", {"text": "five", "text_pair": "six"})
    words = (jsonl(tmp_path / "source"), tmp_path / "out", "--unlabelled", extra)
    assert call(pack, *words) == 0
    assert (Text("five", "six"), None) in read(tmp_path / "out")["unlabelled"]


SETS = {
    "scierc": (
        *("COMPARE", "CONJUNCTION", "EVALUATE-FOR", "FEATURE-OF", "HYPONYM-OF", "PART-OF"),
        "USED-FOR",
    ),
    "acl_arc": ("Background", "CompareOrContrast", "Extends", "Future", "Motivation", "Uses"),
    "chemprot": (
        *("ACTIVATOR", "AGONIST", "AGONIST-ACTIVATOR", "AGONIST-INHIBITOR", "ANTAGONIST"),
        *("DOWNREGULATOR", "INDIRECT-DOWNREGULATOR", "INDIRECT-UPREGULATOR", "INHIBITOR"),
        *("PRODUCT-OF", "SUBSTRATE", "SUBSTRATE_PRODUCT-OF", "UPREGULATOR"),
    ),
}


@pytest.mark.parametrize(("name", "column"), [*((s, "label") for s in SETS), ("acl_arc", "intent")])
def test_known_sets(
    name: str, column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = SETS[name]
    rows = [{"text": f"text of {c}", column: c, "metadata": {}} for c in classes]
    objects(tmp_path / "set" / "train.jsonl", *rows)
    objects(tmp_path / "set" / "dev.jsonl", rows[1])
    objects(tmp_path / "set" / "test.jsonl", rows[2])
    assert call(pack, tmp_path / "set", tmp_path / "out") == 0
    assert f"layout {name}" in capsys.readouterr().err
    manifest = Manifest.load_split(str(tmp_path / "out"), "test")
    assert manifest.classes == list(classes)
    assert manifest.text["metric"] == ("micro_f1" if name == "chemprot" else "macro_f1")
    assert read(tmp_path / "out")["test"] == single(**{f"text of {classes[2]}": classes[2]})


def tweets(root: Path) -> Path:
    write(root / "mapping.txt", "0\tanger", "1\tjoy")
    write(root / "train_text.txt", "so\u2028angry", "happy ")
    write(root / "train_labels.txt", "0", "1")
    write(root / "val_text.txt", "glad")
    write(root / "val_labels.txt", "1")
    write(root / "test_text.txt", "mad")
    write(root / "test_labels.txt", "0")
    return root


def test_tweeteval(tmp_path: Path) -> None:
    assert call(pack, tweets(tmp_path / "emotion"), tmp_path / "out") == 0
    assert read(tmp_path / "out") == {
        "train": single(**{"so\u2028angry": "anger", "happy ": "joy"}),
        "val": single(glad="joy"),
        "test": single(mad="anger"),
    }
    manifest = Manifest.load_split(str(tmp_path / "out"), "train")
    assert manifest.text == {"pairs": False, "stored": "txt", "metric": "macro_f1"}


def test_broken_texts_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = objects(
        tmp_path / "all.jsonl",
        *({"text": t, "label": "a"} for t in ("one", " ", "\ud800", "two words", "x y z")),
    )
    words = ("--split", "train", "--skip_broken", "--max_words", 2)
    assert call(pack, path, tmp_path / "out", *words) == 0
    assert read(tmp_path / "out") == {"train": single(**{"one": "a", "two words": "a"})}
    assert "3 unreadable texts left out" in capsys.readouterr().out


def lines(name: str, *rows: str, encoding: str = "utf-8") -> Callable[[Path], Path]:
    return lambda root: write(root / name, *rows, encoding=encoding)


def rows(*found: object) -> Callable[[Path], Path]:
    return lambda root: objects(root / "all.jsonl", *found)


def split(name: str, *found: object) -> Callable[[Path], Path]:
    """The three splits, one of them of other rows."""

    def made(root: Path) -> Path:
        objects(jsonl(root) / name, *found)
        return root

    return made


def broken_tweets(name: str, *found: str) -> Callable[[Path], Path]:
    def made(root: Path) -> Path:
        write(tweets(root) / name, *found)
        return root

    return made


def images_beside(root: Path) -> Path:
    (root / "a").mkdir(parents=True)
    (root / "a" / "1.png").write_bytes(png(numbered(1)))
    return root


GOOD = {"text": "one", "label": "a"}
LONG = " ".join(["word"] * 100_000)


@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        (rows(GOOD, {"text": "", "label": "a"}), [], "all.jsonl line 2: the text .* is empty"),
        (rows({"text": "\t \n", "label": "a"}), [], "it is empty"),
        (lines("a.csv", "text,label", ",a"), [], "a.csv line 2: .* it is empty"),
        (rows(GOOD, {"text": "x", "text_pair": "", "label": "a"}), [], "second of its pair is"),
        (lines("a.txt", "naïve", encoding="latin-1"), [], r"line 1 is not UTF-8 \(byte 3"),
        (lines("a.csv", "text,label", "naïve,a", encoding="latin-1"), [], "not text in UTF-8"),
        (rows({"text": "half \ud83d", "label": "a"}), [], "half of a surrogate pair"),
        (rows(GOOD, {"text": "x"}), [], "line 2 has no column 'label'.*--label_column"),
        (rows(GOOD, {"text": "x", "label": None}), [], "line 2 has no label"),
        (lines("a.tsv", "text\tlabel", "x\t"), [], "line 2 has no label"),
        (rows({"text": "x", "label": -1}), [], "label -1 stands for none"),
        (rows({"text": "x", "label": True}), [], "label is bool"),
        (rows({"text": "x", "label": {"a": 1}}), [], "label is dict"),
        (split("test.jsonl", {"text": "x", "label": "c"}), [], "test.jsonl line 1: class 'c' has"),
        (split("dev.jsonl", {"text": "x", "label": "B"}), [], "dev.jsonl line 1: class 'B' has"),
        (rows({"sentence": "x", "label": "a"}), [], "no column 'text' .*sentence.*--text_column"),
        (lines("a.csv", "sentence,label", "x,a"), [], "--text_column"),
        (lines("a.csv", "review;stars", "x,y;1"), [], "it has review, stars.*--text_column"),
        (
            lines("train.csv", "review;stars", "x;1"),
            ["--text_column", "review"],
            "no column 'label' .*--label_column",
        ),
        (rows(GOOD), ["--text_column", "txet"], "Did you mean text"),
        (rows(GOOD), ["--pair_column", "second"], "no column 'second'.*--pair_column"),
        (rows({"text": 5, "label": "a"}), [], "'text' is int, no text"),
        (rows({"id": 7, **GOOD}, {"id": "7", **GOOD}), [], "the id '7' stands in .* line 1 too"),
        (rows({"text": LONG, "label": "a"}), [], "100,000 words.*--max_words 100000"),
        (lines("a.jsonl", '{"text": "x"'), [], "line 1 is no valid JSON"),
        (lines("a.jsonl", '["text"]'), [], "line 1 is no JSON object"),
        (lines("a.csv", "text,label", "x,a,b"), [], "not as many fields"),
        (lines("a.csv", "text,text,label", "x,y,b"), [], "column 'text' twice"),
        (lines("a.csv", "text,label,split", "x,a,trian"), [], "split 'trian' is none of"),
        (lines("a.jsonl"), [], "no text"),
        (lines("a.txt", " "), [], "no texts"),
        (rows(GOOD), ["--size", "64"], "--size is for images"),
        (rows(GOOD), ["--metric", "macro-f1"], "--metric.*Did you mean"),
        (rows(GOOD), ["--max_words", "0"], "max_words is 0"),
        (images_beside, ["--metric", "accuracy"], "--metric is for texts"),
        (jsonl, ["--unlabelled", "nowhere.txt"], "does not exist"),
        (jsonl, ["--layout", "scierc"], "does not have the files of SciERC"),
        (broken_tweets("val_labels.txt", "1", "0"), [], "1 lines, val_labels.txt 2"),
        (broken_tweets("test_labels.txt", "7"), [], "label '7' is not in mapping.txt"),
        (broken_tweets("mapping.txt", "0 anger"), [], "no number, tab and name"),
    ],
)
def test_mistakes(
    source: Callable[[Path], Path],
    flags: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = source(tmp_path / "source")
    assert call(pack, found, tmp_path / "out", *flags) == 2
    message = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert len(message) == 1
    assert re.search(said, message[0]), message
    assert not (tmp_path / "out").exists()
