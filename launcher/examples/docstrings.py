"""A real text set that every installation carries: docstrings, by the package they document.

Read with `ast`: nothing is imported or run.
"""

import ast
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

#: The classes: packages that `make venv` installs.
PACKAGES = (
    "deepspeed",
    "networkx",
    "numpy",
    "pydantic",
    "scipy",
    "sklearn",
    "sympy",
    "torch",
)

#: Texts of each class: labelled in train and in val, in test, and unlabelled ones.
LABELLED, VALIDATION, TEST = 25, 10, 150
UNLABELLED = 400


def docstrings(package: str, enough: int, seed: int = 0) -> list[str]:
    """Different docstrings of a package, each on one line.

    Args:
        package: an installed package.
        enough: files are read, in an order of chance, until there are so many.
        seed: of that order.

    Returns:
        Texts of 60 to 300 characters, in which the package's own name is replaced by "package".
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    assert spec.submodule_search_locations, package
    root = Path(next(iter(spec.submodule_search_locations)))
    own = re.compile(re.escape(package) + r"|scikit.?learn" * (package == "sklearn"), re.IGNORECASE)
    found: dict[str, None] = {}
    paths = sorted(root.rglob("*.py"), key=str)
    for number in np.random.default_rng(seed).permutation(len(paths)):
        path = paths[number]
        if {"test", "tests", "testing"} & set(path.parts):
            continue
        if len(found) >= enough:
            break
        for text in _of_file(path):
            plain = own.sub("package", " ".join(text.split("\n\n")[0].split()))
            if 60 <= len(plain) <= 300:
                found.setdefault(plain)
    return list(found)


def _of_file(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text:
                yield text


def write(folder: Path, extra: Path, seed: int = 0) -> None:
    """Writes labelled and unlabelled texts, each of them once.

    Args:
        folder: gets {train,val,test}.jsonl; made if missing.
        extra: file of unlabelled texts, one a line.
        seed: of the draw.
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "val": [], "test": []}
    unlabelled: list[str] = []
    generator = np.random.default_rng(seed)
    enough = LABELLED + VALIDATION + TEST + UNLABELLED
    found = {package: docstrings(package, enough, seed) for package in PACKAGES}
    # Packages carry copies of each other's helpers: such a text has no class, and could stand in
    # two splits.
    times = Counter(text for texts in found.values() for text in texts)
    for package, texts in found.items():
        own = [text for text in texts if times[text] == 1]
        order = [own[i] for i in generator.permutation(len(own))]
        bounds = np.cumsum([0, LABELLED, VALIDATION, TEST, UNLABELLED])
        for split, first, last in zip(splits, bounds, bounds[1:], strict=False):
            splits[split] += [{"text": t, "label": package} for t in order[first:last]]
        unlabelled += order[bounds[3] : bounds[4]]
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    extra.write_text("\n".join(unlabelled) + "\n", encoding="utf-8")
