"""Text classification sets as Gururangan et al. 2020 (Don't Stop Pretraining) published them.

    {train,dev,test}.jsonl    {"text": ..., "label": ..., "metadata": ...}

They are known by their labels. ACL-ARC is also read as its own authors published it, where the
label's name is "intent".
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from selfdistill.data.sources import texts as text_sources
from selfdistill.data.sources.layouts import base
from selfdistill.data.sources.samples import Columns
from selfdistill.data.splits import Metric


@dataclass(frozen=True)
class JsonLines:
    """One of these sets.

    Attributes:
        NAME: of the layout.
        TITLE: of the set.
        labels: its classes.
        metric: by which the paper scores it (Table 2).
        column: of the label.
    """

    NAME: str
    TITLE: str
    labels: frozenset[str]
    metric: Metric

    def where(self, root: Path) -> Path | None:
        """The folder with the three files, if their labels are this set's."""
        for folder in (root, root / self.NAME, root / "data"):
            if self._column(folder) is not None:
                return folder
        return None

    def read(self, folder: Path, options: base.Options) -> base.Layout:
        """The official splits; see `base.Layout`."""
        column = self._column(folder)
        assert column is not None, "only folders that `where` found are read"
        found = text_sources.find(folder, Columns(label=column))
        classes = found["train"][1]
        splits = {split: list(samples) for split, (samples, _) in found.items()}
        return base.Layout(self.NAME, classes, splits, kind="text", metric=self.metric)

    def _column(self, folder: Path) -> str | None:
        """The column that holds exactly this set's classes."""
        if not (folder / "test.jsonl").is_file():
            return None
        columns = ("label", "intent")
        return next((c for c in columns if self._labels(folder / "train.jsonl", c)), None)

    def _labels(self, train: Path, column: str) -> bool:
        seen = set()
        for row in _objects(train):
            label = row.get(column)
            if not isinstance(label, str) or label not in self.labels:
                return False
            seen.add(label)
        return seen == self.labels


def _objects(path: Path) -> Iterator[dict[str, object]]:
    """The file's objects as far as they can be read: it may be no known set at all."""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                if not isinstance(row, dict):
                    return
                yield row
    except (OSError, ValueError, RecursionError):
        return


SCIERC = JsonLines(
    "scierc",
    "SciERC, relations (Luan et al. 2018)",
    frozenset(
        (
            "COMPARE",
            "CONJUNCTION",
            "EVALUATE-FOR",
            "FEATURE-OF",
            "HYPONYM-OF",
            "PART-OF",
            "USED-FOR",
        )
    ),
    "macro_f1",
)
ACL_ARC = JsonLines(
    "acl_arc",
    "ACL-ARC, citation intent (Jurgens et al. 2018)",
    frozenset(("Background", "CompareOrContrast", "Extends", "Future", "Motivation", "Uses")),
    "macro_f1",
)
CHEMPROT = JsonLines(
    "chemprot",
    "ChemProt (Kringelum et al. 2016)",
    frozenset(
        (
            *("ACTIVATOR", "AGONIST", "AGONIST-ACTIVATOR", "AGONIST-INHIBITOR", "ANTAGONIST"),
            *("DOWNREGULATOR", "INDIRECT-DOWNREGULATOR", "INDIRECT-UPREGULATOR", "INHIBITOR"),
            *("PRODUCT-OF", "SUBSTRATE", "SUBSTRATE_PRODUCT-OF", "UPREGULATOR"),
        )
    ),
    "micro_f1",
)
