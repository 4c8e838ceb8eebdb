"""Runs several configurations in one process group: a start of DeepSpeed costs ten seconds.

    deepspeed --num_gpus 2 tests/kit/run_cases.py cases.json

cases.json holds a list of option tables (dotted names); each is one launch of the stages. A case's
 "expect_error" is a piece of the message that it must end with; "leave_at" a piece of the name of
 the boundary at which the ranks leave, as if they had been asked to.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from selfdistill.data.errors import UserError  # noqa: E402
from selfdistill.engine.checkpoints.folder import Run, open_run  # noqa: E402
from selfdistill.engine.config import options as configuration  # noqa: E402
from selfdistill.engine.run import _quiet, run_stages  # noqa: E402
from selfdistill.engine.runtime.distributed import initialize  # noqa: E402
from selfdistill.engine.runtime.preemption import Preempted  # noqa: E402


@contextmanager
def leaving(place: str | None) -> Iterator[None]:
    """Within it every rank leaves at a boundary whose name holds `place`."""
    boundary = Run.boundary

    def leave(self: Run, where: str, *, wait: bool = False) -> None:
        if place is not None and place in where:
            raise Preempted(where)
        boundary(self, where, wait=wait)

    # A method is put in another's place: that is the point here, and what mypy forbids.
    Run.boundary = leave  # type: ignore[method-assign]
    try:
        yield
        assert place is None, f"there was no boundary {place!r}"
    except Preempted:
        assert place is not None
    finally:
        # As above, back again.
        Run.boundary = boundary  # type: ignore[method-assign]


def main() -> None:
    _quiet()
    ranks = initialize()
    path = next(a for a in sys.argv[1:] if a.endswith(".json"))
    for case in json.loads(Path(path).read_text()):
        expected, leave_at = case.pop("expect_error", None), case.pop("leave_at", None)
        try:
            run = open_run(configuration.load({"precision": "fp32"} | case), ranks)
            try:
                with leaving(leave_at):
                    run_stages(run)
            finally:
                run.close()
        except UserError as error:
            if expected is None or expected not in str(error):
                raise
            if ranks.main:
                # In one piece: print writes the end of line apart, and other ranks write, too.
                sys.stdout.write(f"as expected: {error}\n")
                sys.stdout.flush()
        else:
            assert expected is None, f"{case} should have failed with {expected!r}"


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
