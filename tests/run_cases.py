"""Runs several configurations in one process group: a start of DeepSpeed costs ten seconds.

    deepspeed --num_gpus 2 tests/run_cases.py cases.json

cases.json holds a list of option tables (dotted names); each is one launch of the stages. A case's
 "expect_error" is a piece of the message that it must end with.
"""

import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.errors import UserError  # noqa: E402
from engine import config as configuration  # noqa: E402
from engine.distributed import initialize  # noqa: E402
from engine.folder import open_run  # noqa: E402
from engine.run import _quiet  # noqa: E402
from engine.stages import run_stages  # noqa: E402


def main() -> None:
    _quiet()
    ranks = initialize()
    path = next(a for a in sys.argv[1:] if a.endswith(".json"))
    for case in json.loads(Path(path).read_text()):
        expected = case.pop("expect_error", None)
        try:
            run = open_run(configuration.load(case), ranks)
            try:
                run_stages(run)
            finally:
                run.close()
        except UserError as error:
            if expected is None or expected not in str(error):
                raise
            if ranks.main:
                print("as expected:", error, flush=True)
        else:
            assert expected is None, f"{case} should have failed with {expected!r}"


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
