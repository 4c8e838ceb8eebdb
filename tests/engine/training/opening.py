"""What ranks of one node open of a split; run by test_tables.py.

    deepspeed --num_gpus 2 tests/engine/training/opening.py SHARDS BROKEN

Each rank prints one JSON object.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[3])

import numpy as np  # noqa: E402

from selfdistill.data.errors import UserError  # noqa: E402
from selfdistill.data.shards.manifest import Manifest  # noqa: E402
from selfdistill.engine.run import _quiet  # noqa: E402
from selfdistill.engine.runtime.distributed import initialize, main_only  # noqa: E402
from selfdistill.engine.training.tables import share_tables  # noqa: E402

OPENED: list[str] = []


def note(event: str, words: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(words[0], str | os.PathLike):
        OPENED.append(Path(os.fsdecode(words[0])).name)


def main() -> None:
    _quiet()
    ranks = initialize()
    shards, broken = (Path(a) for a in sys.argv[-2:])
    sys.addaudithook(note)
    splits = [
        main_only(ranks, lambda one=one: Manifest.load_split(str(shards), one))
        for one in ("train", "val")
    ]
    share_tables(ranks, splits)
    rows = [one.members.tolist() for one in splits]
    opened = [name for name in OPENED if name in ("manifest.json", "members.npy")]
    wanted = [np.load(shards / one / "members.npy").tolist() for one in ("train", "val")]
    told = {"rank": ranks.rank, "opened": opened, "same": rows == wanted}
    damaged = main_only(ranks, lambda: Manifest.load_split(str(broken), "train"))
    try:
        share_tables(ranks, [damaged])
    except UserError as error:
        told["error"] = str(error)
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
