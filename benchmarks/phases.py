"""engine/run.py with a clock: says on standard output when each part of the start was over.

`benchmarks.startup` launches it in engine/run.py's place. A line of JSON after a mark: pairs of a
part and the seconds since the command, whose time STARTUP_BEGAN holds (seconds since 1970).
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGAN = float(os.environ["STARTUP_BEGAN"])
MARK = "@@ "
ends: list[tuple[str, float]] = []


def over(part: str) -> None:
    """Notes that a part of the start is over."""
    ends.append((part, time.time() - BEGAN))


def timed(module: Any, name: str, before: str | None, after: str | None) -> None:
    """Has a function of a module end one part when it begins, and another when it has ended."""
    function: Callable[..., Any] = getattr(module, name)

    def wrapped(*words: Any, **options: Any) -> Any:
        if before:
            over(before)
        result = function(*words, **options)
        if after:
            over(after)
        return result

    setattr(module, name, wrapped)


def main() -> int:
    """Runs the engine until its end."""
    over("launcher and interpreter")
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from selfdistill.engine import run

    over("configuration's classes")
    timed(run, "_quiet", "command line, torch", "deepspeed")
    from selfdistill.engine.runtime import distributed

    first = distributed.initialize

    def initialize() -> Any:
        ranks = first()
        over("process group")
        from selfdistill.engine.stages import distill, finetune  # noqa: F401
        from selfdistill.engine.training import engine
        from selfdistill.engine.training import loop as trainer

        over("timm and other modules")
        read: str | None = "run folder, data, weights"
        if "distill" in sys.argv:
            timed(distill, "build_table", read, "teacher's pass")
            read = None
        timed(engine, "build_engine", read, "DeepSpeed's engine")
        step = trainer.take_step

        def take_step(*words: Any, **options: Any) -> Any:
            trainer.take_step = step
            result = step(*words, **options)
            over("workers, first step")
            # The run has diverted sys.stdout to its log.
            print(MARK + json.dumps(ends), file=sys.__stdout__, flush=True)
            return result

        trainer.take_step = take_step
        return ranks

    distributed.initialize = initialize
    return run.main(sys.argv[1:])


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
