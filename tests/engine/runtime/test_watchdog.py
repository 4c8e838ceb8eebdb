"""A process that makes no progress is ended with its stacks; one that does is left alone."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from selfdistill.data.loading.codec import Images
from selfdistill.data.loading.loader import Loader
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.runtime.preemption import AGAIN
from selfdistill.engine.runtime.watchdog import Watchdog, _waits_for_data
from tests.kit.launches import ROOT, environment, make_images

#: Works for a while, then hangs in a function of its own.
HANGS = """
import sys, time
from pathlib import Path
from selfdistill.engine.runtime.watchdog import Watchdog
dog = Watchdog(Path(sys.argv[1]), 0, 2, 3.0)
dog.start()
for step in range(20):
    dog.beat(f"step {step}")
    time.sleep(0.2)
def stuck_here():
    time.sleep(600)
stuck_here()
"""


def test_a_hang_is_found_in_time_and_told(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=200,  # much less than the hang
    )
    took = time.monotonic() - began
    assert done.returncode == AGAIN, done.stderr
    assert took > 4 + 3, "it was at work for four seconds"
    (line,) = done.stderr.splitlines()
    assert "rank 0 on" in line
    assert re.search(r"no progress for \d+ s \(--watchdog 3\)", line)
    assert "in step 19" in line
    assert "rank 1 left no sign of life: that is where to look" in line
    assert "Traceback" not in done.stderr
    dump = (tmp_path / "hang-00000.txt").read_text()
    assert "in stuck_here" in dump
    assert "no progress" in dump


def test_progress_keeps_it_quiet(tmp_path: Path) -> None:
    left: list[int] = []
    dog = Watchdog(tmp_path, 0, 1, 2.0, leave=left.append)
    dog.start()
    for step in range(30):  # longer than the limit, each step much shorter
        dog.beat(f"step {step}")
        time.sleep(0.1)
    pulse = json.loads((tmp_path / ".pulse" / "rank-00000.json").read_text())
    assert pulse["where"].startswith("step ")
    dog.stop()
    assert not left
    assert not list((tmp_path / ".pulse").iterdir())
    time.sleep(2.5)
    assert not left, "it was stopped"


def test_zero_seconds_is_no_watch(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, 1, 0)
    dog.start()
    dog.stop()
    assert not list(tmp_path.iterdir())


def pulse(
    folder: Path, rank: int, begun: int, silent: float, *, waits: bool = False, data: bool = False
) -> None:
    """What another rank left, of a host whose clock is an hour behind."""
    content = {"time": time.time() - 3600, "host": "node2", "pid": 7, "silent": silent}
    content["begun"] = begun
    content |= {"where": f"step {begun}", "at": "engine/training/loop.py:1 (train)", "waits": waits}
    content["data"] = data
    (folder / ".pulse").mkdir(exist_ok=True)
    (folder / ".pulse" / f"rank-{rank:05d}.json").write_text(json.dumps(content))


def test_who_is_ahead_waits_and_who_is_behind_is_suspect(tmp_path: Path) -> None:
    """Under NCCL a rank that waits stands in `.item()` or `synchronize`, in no collective."""
    dog = Watchdog(tmp_path, 0, 3, 100.0)
    for step in range(12):
        dog.beat(f"step {step}")
        dog.beat()  # within a step: not one more
    assert dog.begun == 12
    pulse(tmp_path, 0, 12, 150.0)
    pulse(tmp_path, 2, 12, 150.0)
    # Rank 1 works on the step before: 0 waits for it, and goes on waiting.
    pulse(tmp_path, 1, 11, 1.0)
    assert dog._waits(None, dog._pulses())
    assert dog._someone_works(dog._pulses())
    # It works no longer: it alone is where to look.
    pulse(tmp_path, 1, 11, 150.0)
    assert not dog._someone_works(dog._pulses())
    (suspect,) = dog.suspects()
    assert "rank 1 on node2" in suspect
    assert "in step 11, 1 behind" in suspect
    # All at one step: who is in a collective waits, as ever.
    pulse(tmp_path, 0, 12, 150.0, waits=True)
    pulse(tmp_path, 1, 12, 150.0)
    pulse(tmp_path, 2, 12, 150.0, waits=True)
    assert not dog._waits(None, dog._pulses())
    (suspect,) = dog.suspects()
    assert "rank 1" in suspect


class _Watched(Images):
    """Notes what the watchdog sees while a sample is read."""

    seen: ClassVar[list[bool]] = []

    def decode(self, *words: Any) -> Any:
        self.seen.append(_waits_for_data(sys._getframe()))
        return super().decode(*words)


def test_it_knows_a_rank_that_waits_for_its_batch(tmp_path: Path) -> None:
    assert not _waits_for_data(sys._getframe())
    pack(str(make_images(tmp_path / "images", train=4)), str(tmp_path / "shards"))
    split = Manifest.load_split(str(tmp_path / "shards"), "train")
    loader = Loader(split, batch=4, codec=_Watched(split.size, split.span))
    next(iter(loader))
    assert _Watched.seen
    assert all(_Watched.seen)


def test_a_rank_that_waits_for_data_holds_the_others_no_longer_than_its_own_limit(
    tmp_path: Path,
) -> None:
    dog = Watchdog(tmp_path, 0, 2, 100.0)
    for silent, works in ((40, True), (250, True), (301, False)):
        pulse(tmp_path, 1, 0, silent, data=True)
        assert dog._someone_works(dog._pulses()) is works
    pulse(tmp_path, 1, 0, 60.0)
    assert not dog._someone_works(dog._pulses())


def test_a_sign_of_life_that_does_not_change_is_none(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, 0, 2, 0.5)
    pulse(tmp_path, 1, 0, 0.1)
    assert dog._someone_works(dog._pulses())
    time.sleep(4.5 * dog.interval)
    assert not dog._someone_works(dog._pulses())
    *_, suspect = dog.suspects()
    assert "rank 1 on node2 (pid 7) has given no sign of life for at least" in suspect
    pulse(tmp_path, 1, 0, 0.1)
    assert dog._someone_works(dog._pulses()), "it goes on"
