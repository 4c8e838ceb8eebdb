"""A task of TweetEval (Barbieri et al. 2020), such as emotion: 3,257 train, 374 val, 1,421 test.

{train,val,test}_text.txt      one tweet a line
{train,val,test}_labels.txt    its number
mapping.txt                    number, tab, name of the class
"""

from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import Text
from selfdistill.data.sources.layouts import base
from selfdistill.data.sources.samples import Row, grouped
from selfdistill.data.splits import DIVIDED

NAME = "tweeteval"
TITLE = "TweetEval (one task's folder)"


def where(root: Path) -> Path | None:
    """The folder of the tweets."""
    wanted = ("mapping.txt", "train_text.txt", "train_labels.txt")
    return base.find(root, (".", "emotion", "datasets/emotion"), wanted)


def read(folder: Path, options: base.Options) -> base.Layout:
    """The official splits; see `base.Layout`."""
    names: dict[str, str] = {}
    for number, line in base.lines(folder / "mapping.txt"):
        label, _, name = line.partition("\t")
        if not name.strip():
            raise UserError(
                f"{folder / 'mapping.txt'} line {number}: {line!r} is no number, tab and name:"
                " take the official files again"
            )
        names[label.strip()] = name.strip()
    rows = [row for split in DIVIDED for row in _rows(folder, split, names)]
    found = grouped(rows)
    splits = {split: list(samples) for split, (samples, _) in found.items()}
    notes = ["scored by macro F1, which TweetEval takes for emotion, hate and offensive language"]
    return base.Layout(NAME, found["train"][1], splits, notes, kind="text", metric="macro_f1")


def _rows(folder: Path, split: str, names: dict[str, str]) -> list[Row]:
    path = folder / f"{split}_text.txt"
    if not path.is_file():
        return []
    # A tweet may hold other line ends of Unicode's, so only newlines divide.
    try:
        tweets = path.read_bytes().decode().removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8: take the official files again") from None
    labels = [label for _, label in base.lines(folder / f"{split}_labels.txt")]
    if len(tweets) != len(labels):
        raise UserError(
            f"{path} has {len(tweets)} lines, {split}_labels.txt {len(labels)}: take the official"
            " files again"
        )
    rows = []
    for number, (tweet, label) in enumerate(zip(tweets, labels, strict=True), start=1):
        where = f"{path} line {number}"
        if label not in names:
            raise UserError(
                f"{where}: its label {label!r} is not in mapping.txt: take the official files again"
            )
        rows.append(Row(split, where, str(number), Text(tweet, None), names[label]))
    return rows
