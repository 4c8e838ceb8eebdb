"""Files -> shards -> batches. Knows nothing of models or DeepSpeed."""

import importlib.util
import sys


def _installed() -> None:
    """Ends a command that another Python runs than that of the environment, with one line."""
    needed = ("fire", "numpy", "PIL", "pydantic", "rich", "torch", "webdataset")
    if any(importlib.util.find_spec(name) is None for name in needed):
        print(
            f"error: the packages are not installed in this Python ({sys.executable}): run in the"
            " clone `make venv`, then `source .venv/bin/activate`",
            file=sys.stderr,
        )
        sys.exit(2)


# So it is while `python -m data.COMMAND` imports the package, before the command itself.
# And so it is of `python engine/run.py`, which imports it first of all.
if sys.argv[:1] == ["-m"] or sys.argv[0].endswith("engine/run.py"):
    _installed()
