"""What a source is divided into, and how texts may be scored: words that all of data/ shares."""

from typing import Literal, get_args

#: What a source is divided into, and beside it: the inputs of train and more, all without labels.
DIVIDED = ("train", "val", "test")
UNLABELLED = "unlabelled"
SPLITS = (*DIVIDED, UNLABELLED)
#: What files and folders call the splits.
ALIASES = {s: s for s in DIVIDED} | {
    **dict.fromkeys(("training", "train_set", "trainset"), "train"),
    **dict.fromkeys(("valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("testing", "test_set", "testset"), "test"),
}
#: How texts may be scored; a known data set names the one that it is scored by.
Metric = Literal["accuracy", "macro_f1", "micro_f1"]
METRICS: tuple[Metric, ...] = get_args(Metric)
