"""Runs the mistakes of test_mistakes.py one after another in one process; prints a JSON list.

    python tests/kit/run_table.py table.json

Each entry is [program, argv]: "engine" is engine/run.py, others are modules with a main.
"""

import contextlib
import importlib
import io
import json
import os
import sys
import traceback
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from selfdistill.data import cli  # noqa: E402
from selfdistill.engine import run as engine_run  # noqa: E402


def call(program: str, argv: list[str]) -> int:
    if program == "engine":
        return engine_run.main(argv)
    module = importlib.import_module(program)
    name = program.rsplit(".", 1)[-1]
    try:
        cli.run(getattr(module, "main", None) or getattr(module, name), argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def main() -> None:
    results = []
    for program, argv in json.loads(Path(sys.argv[1]).read_text()):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = call(program, argv)
            except BaseException:
                code = 1
                err.write(traceback.format_exc())
        results.append([code, err.getvalue()])
    Path(sys.argv[1]).with_suffix(".out").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    os._exit(0)
