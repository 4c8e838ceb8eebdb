"""All readers of foreign files."""

import os
import tempfile
import traceback
import warnings
from pathlib import Path

from tests.fuzz import data_targets, model_targets, run_targets
from tests.fuzz.harness import fuzz

TARGETS = [*data_targets.TARGETS, *model_targets.TARGETS, *run_targets.TARGETS]


def fuzz_by_name(job: tuple[str, float, int]) -> tuple[str, int, str]:
    """One reader for some seconds: its name, how many inputs, and what it did wrong."""
    name, seconds, seed = job
    target = next(one for one in TARGETS if one.name == name)
    warnings.simplefilter("ignore")
    # Libraries in C and Rust write to the terminal by themselves.
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        try:
            return name, fuzz(target, seconds, seed, Path(folder)), ""
        except BaseException as error:
            notes = [n for n in getattr(error, "__notes__", []) if "kept as" in n]
            last = traceback.extract_tb(error.__traceback__)[-1]
            return name, 0, f"{error!r:.200} ({last.filename}:{last.lineno}): {notes[:1]}"
