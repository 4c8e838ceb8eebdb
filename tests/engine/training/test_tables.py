"""A split's table of members is opened once a node, and its faults are known to all ranks.

The table of the teacher's features is joined of its parts, some at a time.

The test runs this file on two ranks, each of which prints one JSON object.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path[0] = str(Path(__file__).resolve().parents[3]) if __name__ == "__main__" else sys.path[0]

from selfdistill.data import pack  # noqa: E402
from selfdistill.data.errors import UserError  # noqa: E402
from selfdistill.data.shards.manifest import Manifest  # noqa: E402
from selfdistill.engine.config.schema import Config  # noqa: E402
from selfdistill.engine.run import _quiet  # noqa: E402
from selfdistill.engine.runtime.distributed import Ranks, initialize, main_only  # noqa: E402
from selfdistill.engine.training import teacher  # noqa: E402
from selfdistill.engine.training.tables import share_tables  # noqa: E402
from tests.engine.checkpoints.attack import flip  # noqa: E402
from tests.kit.launches import launch, make_images  # noqa: E402


def test_a_table_needs_twice_its_room_until_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, free = Config(), SimpleNamespace(free=150)
    monkeypatch.setattr(teacher.shutil, "disk_usage", lambda _: free)
    with pytest.raises(UserError, match="twice that until it is whole"):
        teacher.choose("cached", 100, config, tmp_path)
    (tmp_path / "rows-0-9.npy").write_bytes(bytes(60))  # of a pass that was interrupted
    assert teacher.choose("cached", 100, config, tmp_path) == "cached"
    assert teacher.choose("auto", 100, config, tmp_path) == "replicated"


@pytest.mark.multi
def test_one_rank_opens_the_tables(tmp_path: Path) -> None:
    make_images(tmp_path / "images")
    shards, broken = tmp_path / "shards", tmp_path / "broken"
    pack.pack(str(tmp_path / "images"), str(shards))
    shutil.copytree(shards, broken)
    flip(broken / "train" / "members.npy")
    done = launch(__file__, shards, broken)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    first, second = sorted(told, key=lambda one: one["rank"])
    assert first["opened"] == ["manifest.json"] * 2 + ["members.npy"] * 2
    assert second["opened"] == []
    assert (first["same"], second["same"]) == (True, True)
    assert first["error"] == second["error"]
    assert "is not the table that" in first["error"]


def test_processes_with_one_descriptor_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor that was handed over shares its position with all others."""
    make_images(tmp_path / "images")
    pack.pack(str(tmp_path / "images"), str(tmp_path / "shards"))
    split = Manifest.load_split(str(tmp_path / "shards"), "train")
    with split.open_members() as file, open(os.dup(file.fileno()), "rb") as other:
        at_once = np.lib.format.read_magic
        monkeypatch.setattr(
            np.lib.format, "read_magic", lambda f: (other.seek(0, os.SEEK_END), at_once(f))[1]
        )
        table = split.read_members(file, check=False)
        assert table.tolist() == np.load(tmp_path / "shards" / "train" / "members.npy").tolist()
        assert other.tell() == os.fstat(other.fileno()).st_size
    assert not table.flags.writeable


def test_the_ranks_wait_for_some_parts_of_the_features_at_a_time(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Collectives wait for half an hour, and a table may take longer than that."""
    rows = np.random.default_rng(0).random((33, 2), np.float32)
    spans = [(first, min(first + 7, 33)) for first in range(0, 33, 7)]
    for first, last in spans:
        teacher._save_part(teacher._part(tmp_path, (first, last)), rows[first:last])
    waits: list[int] = []
    opened = teacher._open

    def act(ranks: Ranks, action: Any) -> Any:
        waits.append(0)
        return main_only(ranks, action)

    def read(*given: Any) -> Any:
        waits[-1] += 1
        return opened(*given)

    monkeypatch.setattr(teacher, "main_only", act)
    monkeypatch.setattr(teacher, "_open", read)
    monkeypatch.setattr(teacher, "_JOINED", 2)
    run: Any = SimpleNamespace(ranks=ranks, watchdog=SimpleNamespace(beat=lambda: None))
    teacher._join(run, tmp_path, {"teacher": "x"}, spans, rows.shape)
    assert max(waits) == 2
    assert np.load(tmp_path / "features.npy").tolist() == rows.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npy", "table.json"]


def main(shards: Path, broken: Path) -> None:
    _quiet()
    ranks = initialize()
    opened: list[str] = []

    def note(event: str, words: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(words[0], str | os.PathLike):
            opened.append(Path(os.fsdecode(words[0])).name)

    sys.addaudithook(note)
    splits = [
        main_only(ranks, lambda one=one: Manifest.load_split(str(shards), one))
        for one in ("train", "val")
    ]
    share_tables(ranks, splits)
    rows = [one.members.tolist() for one in splits]
    ours = [name for name in opened if name in ("manifest.json", "members.npy")]
    wanted = [np.load(shards / one / "members.npy").tolist() for one in ("train", "val")]
    told = {"rank": ranks.rank, "opened": ours, "same": rows == wanted}
    damaged = main_only(ranks, lambda: Manifest.load_split(str(broken), "train"))
    try:
        share_tables(ranks, [damaged])
    except UserError as error:
        told["error"] = str(error)
    sys.stdout.write(json.dumps(told) + "\n")  # in one piece: print writes the end of line apart


if __name__ == "__main__":
    main(Path(sys.argv[-2]), Path(sys.argv[-1]))
    sys.stdout.flush()
    os._exit(0)
