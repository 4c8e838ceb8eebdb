"""A page of --help, and a mistyped option, come before torch is imported."""

import subprocess
import sys

import pytest

from tests.kit.launches import ROOT, environment

LOOK = """
import runpy, sys
sys.argv = ["selfdistill", *sys.argv[1:]]
try:
    runpy.run_module(f"selfdistill.{sys.argv.pop(1)}", run_name="__main__")
except SystemExit as end:
    heavy = [name for name in ("torch", "transformers", "timm", "deepspeed") if name in sys.modules]
    print(f"@@ {end.code or 0} {heavy}")
else:
    print("@@ 0", [n for n in ("torch", "transformers", "timm", "deepspeed") if n in sys.modules])
"""


#: Each with an option.
COMMANDS = {
    "launcher.predict": "precision",
    "launcher.embed": "precision",
    "launcher.evaluate": "precision",
    "launcher.plan": "precision",
    "data.pack": "samples_per_shard",
    "data.verify": "max_pixels",
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--tyop", "1"], 2)])
def test_no_torch(command: str, words: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOK, command, *words],
        cwd=ROOT,
        env=environment(),
        text=True,
        capture_output=True,
    )
    assert f"@@ {code} []" in done.stdout, done.stdout + done.stderr
    assert (f"--{COMMANDS[command]}" in done.stdout) == (code == 0)
