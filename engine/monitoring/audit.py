"""Which samples each step took, for who wants to check that none was lost or repeated."""

from __future__ import annotations

import json
import os
from pathlib import Path

from selfdistill.data.files import nofollow
from selfdistill.data.loading.batches import Batch
from selfdistill.data.records import read_lines
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.runtime.distributed import Ranks, main_only


class SampleLog:
    """A file a rank, `samples/rank-00000.jsonl`, one line a step: its number and the samples' ids.

    All ranks' lines of a step together are the step's global batch, however many ranks there were.
    Lines of steps after the checkpoint that a launch goes on from are cut, as in `metrics.jsonl`.

    Args:
        folder: of the stage.
        ranks: who takes part; every one makes it.
        start: steps that stay.
    """

    def __init__(self, folder: Path, ranks: Ranks, start: int) -> None:
        places = folder / "samples"

        def cut() -> None:
            places.mkdir(exist_ok=True)
            for path in places.glob("rank-*.jsonl"):
                kept = [line for line in read_lines(path) if line.get("step", 0) <= start]
                write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

        main_only(ranks, cut)
        own = places / f"rank-{ranks.rank:05d}.jsonl"
        self._file = open(own, "a", encoding="utf-8", opener=nofollow)  # noqa: SIM115

    def write(self, step: int, batches: list[Batch]) -> None:
        """Notes a finished step.

        Args:
            step: its number, from 1.
            batches: this rank's micro-batches.
        """
        ids = [int(i) for batch in batches for i in batch["ids"]]
        self._file.write(json.dumps({"step": step, "ids": ids}) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Forces the file to the disk: a newer checkpoint would lose lines."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
