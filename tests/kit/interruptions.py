"""Interrupts `--stage all` at random moments by real signals until it is done; run by deepspeed.

    deepspeed --num_gpus 2 tests/kit/interruptions.py cases.json

cases.json: {"options": {...}, "whole": FOLDER, "cut": FOLDER, "seed": N, "most": N, "aims": [...]}.
The run is done once undisturbed, and once with a signal to a random rank in every launch: at a
random boundary, the "most"-th at the latest, and once each at those whose names hold one of the
"aims". Prints where the interruptions were.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from selfdistill.engine.checkpoints.folder import Run, open_run  # noqa: E402
from selfdistill.engine.config import options as configuration  # noqa: E402
from selfdistill.engine.run import _quiet, run_stages  # noqa: E402
from selfdistill.engine.runtime import preemption  # noqa: E402
from selfdistill.engine.runtime.distributed import Ranks, initialize  # noqa: E402
from selfdistill.engine.training import teacher  # noqa: E402


def launch(options: dict[str, object], ranks: Ranks) -> str | None:
    """One launch; where it was interrupted, or None when it is done."""
    run = open_run(configuration.load(options), ranks)
    try:
        run_stages(run)
    except preemption.Preempted as error:
        return str(error)
    finally:
        run.close()
    return None


def interrupt(number: int, aims: list[str], rank: int, by: signal.Signals) -> None:
    """From now on, the boundary of this number, or the first at an aim, signals one rank."""
    preemption._asked.clear()
    boundary, passed = Run.boundary, [0]

    def counting(self: Run, where: str, *, wait: bool = False) -> None:
        passed[0] += 1
        hit = next((aim for aim in aims if aim in where), None)
        if hit:
            aims.remove(hit)
        if (hit or passed[0] == number) and self.ranks.rank == rank:
            os.kill(os.getpid(), by)
        boundary(self, where, wait=wait)

    # A method is put in another's place: that is the point here, and what mypy forbids.
    Run.boundary = counting  # type: ignore[method-assign]


def main() -> None:
    preemption.listen()
    _quiet()
    ranks = initialize()
    path = next(a for a in sys.argv[1:] if a.endswith(".json"))
    case = json.loads(Path(path).read_text())
    teacher._BATCH = 4  # so that the table has several parts
    assert launch(case["options"] | {"output": case["whole"]}, ranks) is None
    original = Run.boundary
    chance = random.Random(case["seed"])
    places: list[str] = []
    aims = list(case["aims"])
    for _ in range(100):
        interrupt(
            chance.randint(1, case["most"]),
            aims,
            chance.randrange(ranks.world),
            chance.choice((signal.SIGUSR2, signal.SIGTERM)),
        )
        place = launch(case["options"] | {"output": case["cut"]}, ranks)
        # As in `interrupt`, back again.
        Run.boundary = original  # type: ignore[method-assign]
        if place is None:
            break
        places.append(place)
    if ranks.main:
        # In one piece: print writes the end of line apart, and other ranks write, too.
        sys.stdout.write(f"interrupted at {json.dumps(places)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
