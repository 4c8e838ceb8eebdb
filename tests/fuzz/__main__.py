"""python -m tests.fuzz: feeds every reader of foreign files with broken ones, for an hour."""

import contextlib
import multiprocessing
import time

from selfdistill.data.cli import run
from tests.fuzz.targets import TARGETS, fuzz_by_name

_PIECE = 60.0  # seconds of one reader at a time: so that a short run meets them all


def main(seconds: float = 3600.0, workers: int = 2, seed: int = 0, only: str | None = None) -> None:
    """Feeds every reader of foreign files with broken ones.

    Args:
        seconds: How long in all.
        workers: Processes.
        seed: Another seed, other inputs; by default the clock's.
        only: One reader alone.
    """
    names = [target.name for target in TARGETS if only in (None, target.name)]
    share = seconds * workers / len(names)
    rounds = max(1, round(share / _PIECE))
    seed = seed or int(time.time())
    jobs = [(name, share / rounds, seed + 10**6 * k) for k in range(rounds) for name in names]
    counts: dict[str, int] = dict.fromkeys(names, 0)
    faults = 0
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, maxtasksperchild=8) as pool, contextlib.suppress(KeyboardInterrupt):
        done = pool.imap_unordered(fuzz_by_name, jobs)
        for number, (name, count, fault) in enumerate(done, start=1):
            counts[name] += count
            faults += bool(fault)
            if fault or number % len(names) == 0:
                said = f"{sum(counts.values()):,} inputs. {name}: {fault or 'ok'}"
                print(f"{number}/{len(jobs)}: {said}", flush=True)
    for name, count in counts.items():
        print(f"{name:>20} {count:>10,}")
    print(f"{sum(counts.values()):,} inputs, {faults} faults")
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    run(main)
