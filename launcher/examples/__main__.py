"""The embedded examples, packed: `python -m launcher.examples images shards/digits`.

Small real sets that every installation carries. Several processes may ask for the same one at
once, as the jobs of an array do: each packs, the first moves its folder into place.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfdistill.data import cli, pack
from selfdistill.data.errors import UserError
from selfdistill.launcher.examples import digits, docstrings


@dataclass(frozen=True)
class Example:
    """A small real set.

    Attributes:
        title: of a table of its results.
        recipe: of its runs.
        pack: (a folder for raw files, the shards' folder) -> None.
    """

    title: str
    recipe: str
    pack: Callable[[Path, Path], None]


def _pack_digits(raw: Path, shards: Path) -> None:
    digits.write(raw)
    pack.pack(str(raw), str(shards), size=digits.SIZE, name="digits")


def _pack_docstrings(raw: Path, shards: Path) -> None:
    docstrings.write(raw / "labelled", raw / "unlabelled.txt")
    extra = str(raw / "unlabelled.txt")
    pack.pack(str(raw / "labelled"), str(shards), unlabelled=extra, name="docstrings")


EXAMPLES = {
    "images": Example("handwritten digits", "quickstart", _pack_digits),
    "text": Example("docstrings by their package", "quickstart_text", _pack_docstrings),
}


def complete(out: Path) -> bool:
    """Whether a folder holds a packed example; the test split is packed last."""
    return (out / "test" / "manifest.json").exists()


def main(kind: Literal["images", "text"], out: str) -> None:
    """Packs an embedded example, unless it is there.

    Args:
        kind: images (handwritten digits) or text (docstrings of installed packages).
        out: the data set's folder.

    Raises:
        UserError: something else is in the way.
    """
    target = Path(out).expanduser()
    if complete(target):
        return
    taken = f"{target} is in the way: remove it, or name another folder"
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(taken)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as made:
        shards, said = Path(made) / "shards", io.StringIO()
        with contextlib.redirect_stdout(said):
            EXAMPLES[kind].pack(Path(made) / "raw", shards)
        try:
            os.rename(shards, target)  # fails where another process was first
        except OSError as error:
            if not complete(target):
                raise UserError(taken) from error
        else:
            print(said.getvalue().replace(str(shards), str(target)), end="")


if __name__ == "__main__":
    cli.run(main)
