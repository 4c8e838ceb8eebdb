"""Results in parts: fixed blocks of the inputs, each a file, so that work can stop and go on.

A block is the same inputs on any number of ranks. Each rank does every W-th of those that are left;
a file is whole or not there; when all are, one rank joins them to what the user asked for and
removes them.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.files import write_bytes, write_text

#: Inputs of a block.
BLOCK = 512
_KEY = "made-by.json"

Row = dict[str, Any]


class Parts:
    """The parts of one output.

    Args:
        out: the file that they will become.
        made_by: what they depend on, by name: model, settings, inputs.
        samples: of the inputs.
    """

    def __init__(self, out: Path, made_by: dict[str, Any], samples: int) -> None:
        self.out, self.made_by, self.samples = out, made_by, samples
        self.folder = out.with_name(f"{out.name}.parts")
        self.blocks = -(-samples // BLOCK)

    def prepare(self, overwrite: bool) -> int:
        """Makes their folder, or takes what an interrupted launch left. One rank calls it.

        Returns:
            How many blocks are done.

        Raises:
            UserError: the output is there already, or parts of something else.
        """
        if self.out.is_dir():
            raise UserError(f"{self.out} is a folder: name a file")
        if self.out.exists() and not overwrite:
            raise UserError(f"{self.out} is there: --overwrite replaces it, or name another file")
        told = self.folder / _KEY
        digest = hashlib.sha256(json.dumps(self.made_by, sort_keys=True).encode()).hexdigest()
        try:
            before = records.read_object(told, f"remove {self.folder}")
        except FileNotFoundError:
            before = {}
        if before and before.get("sha256") != digest:
            others = [k for k, v in self.made_by.items() if before.get(k) != v]
            if not overwrite:
                raise UserError(
                    f"{self.folder} holds parts of an interrupted launch with another"
                    f" {' and another '.join(others) or 'version'}: launch that again, or"
                    " --overwrite begins anew"
                )
            self.remove()
        if not before:  # of blocks alone nobody knows what made them
            for path in self.folder.glob(f"{'[0-9]' * 8}.*"):
                path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(told, json.dumps({"sha256": digest, **self.made_by}, indent=1) + "\n")
        return self.done()

    def _path(self, block: int, kind: str) -> Path:
        return self.folder / f"{block:08d}.{kind}"

    def left(self) -> list[int]:
        """Blocks that are not done. One rank looks: other hosts' file systems may be behind."""
        done = {path.name for path in self.folder.glob("*.jsonl")}
        every = range(self.blocks)
        return [block for block in every if self._path(block, "jsonl").name not in done]

    def done(self) -> int:
        """How many blocks are done."""
        return len([path for path in self.folder.glob("*.jsonl") if not path.name.startswith(".")])

    def places(self, block: int, batch: int) -> list[NDArray[np.int64]]:
        """The places of a block's inputs, in batches."""
        last = min(self.samples, (block + 1) * BLOCK)
        every = np.arange(block * BLOCK, last, dtype=np.int64)
        return [every[at : at + batch] for at in range(0, len(every), batch)]

    def write(self, block: int, rows: list[Row], vectors: NDArray[Any] | None = None) -> None:
        """Leaves a block's rows, and beside them vectors, whole or not at all."""
        if vectors is not None:
            content = io.BytesIO()
            np.save(content, vectors, allow_pickle=False)
            write_bytes(self._path(block, "npy"), content.getvalue())
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(self._path(block, "jsonl"), "".join(lines))

    def wait(self, look: Callable[[], None]) -> None:
        """Waits until the other ranks have done their blocks.

        Args:
            look: called again and again; raises where one of them never will.
        """
        while self.done() < self.blocks:
            look()
            time.sleep(0.2)

    def rows(self) -> Iterator[list[Row]]:
        """The rows of each block, in order."""
        for block in range(self.blocks):
            content = self._path(block, "jsonl").read_text(encoding="utf-8")
            yield [json.loads(line) for line in content.split("\n")[:-1]]

    def vectors(self) -> Iterator[NDArray[Any]]:
        """The vectors of each block that has some, in order."""
        for block in range(self.blocks):
            path = self._path(block, "npy")
            if path.is_file():
                yield np.load(path, allow_pickle=False)

    def remove(self) -> None:
        """Removes them, once they are joined: aside first, since a removal may be cut short."""
        aside = self.folder.with_name(f".{self.folder.name}.old")
        shutil.rmtree(aside, ignore_errors=True)
        self.folder.replace(aside)
        shutil.rmtree(aside)
