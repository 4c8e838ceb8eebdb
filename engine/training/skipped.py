"""The broken samples that a stage leaves out under `--data.skip_broken`, over all ranks."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

import pydantic
import torch
import torch.distributed as dist

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.loading.loader import Loader
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.runtime.distributed import Ranks, main_only, total

_Listed = dict[Annotated[str, pydantic.Field(pattern="^[0-9]{1,15}$")], str]


class Skipped:
    """The broken samples that all ranks left out; each counts once.

    In another epoch another rank meets the same sample, so the ranks' counts do not add up. The
    ids are exchanged on those log steps on which the sum of the counts shows that there are more.

    Attributes:
        count: distinct samples, as of the last log step.

    Args:
        loader: of this rank.
        file: where rank 0 lists them, id -> what is wrong.
        ranks: who takes part; every one makes it, and calls `share` at the same steps.
        resumed: whether an earlier launch's list goes on.
    """

    def __init__(self, loader: Loader, file: Path, ranks: Ranks, *, resumed: bool) -> None:
        self.loader, self.file, self.ranks = loader, file, ranks

        def listed() -> dict[str, str]:
            if not resumed:
                file.unlink(missing_ok=True)
            if not file.exists():
                return {}
            with contextlib.suppress(UserError):  # a list that was cut off begins anew
                return dict(records.checked(_Listed, records.read_object(file), file))
            return {}

        loader.broken |= {int(k): v for k, v in main_only(ranks, listed).items()}
        self.count = len(loader.broken)

    @property
    def new(self) -> int:
        """Those that this rank met since the last log step."""
        return len(self.loader.broken) - self.count

    def share_all(self) -> None:
        """`share`, with the sum made here. Every rank calls it."""
        self.share(int(total(torch.tensor(self.new, device=self.ranks.device))))

    def share(self, new: int) -> None:
        """Tells all ranks of all samples.

        Args:
            new: sum of `new` over the ranks.

        Raises:
            UserError: they are more than the loader tolerates.
        """
        if not new:
            return
        # A dict keeps its order: behind those that all ranks know come this rank's own.
        mine = dict(list(self.loader.broken.items())[self.count :])
        parts: list[Any] = [mine]
        if self.ranks.world > 1:
            parts = [None] * self.ranks.world
            dist.all_gather_object(parts, mine)
        for part in parts:
            self.loader.broken |= part
        self.count = len(self.loader.broken)
        self.loader.tolerate(self.count)
        if self.ranks.main:
            table = {str(k): self.loader.broken[k] for k in sorted(self.loader.broken)}
            write_text(self.file, json.dumps(table, indent=1) + "\n")
