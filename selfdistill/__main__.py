"""The commands of an installed copy, by their names in a clone: `selfdistill data.pack ...`.

In a clone they are typed `python -m data.pack ...`. A training is started by a launcher:
`deepspeed --module selfdistill.engine.run ...`.
"""

import importlib.util
import runpy
import sys

COMMANDS = (
    "data.pack",
    "data.index",
    "data.verify",
    "data.subset",
    "data.tokenizer",
    "engine.run",
    "launcher.plan",
    "launcher.doctor",
    "launcher.slurm",
    "launcher.compare",
    "launcher.quickstart",
    "launcher.screenshot",
    "launcher.examples",
    "experiments.run",
    "experiments.report",
    "experiments.theory",
)


def main() -> None:
    """Runs a command.

    Raises:
        SystemExit: 2 where there is no such command.
    """
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        listed = "\n".join(f"  selfdistill {name}" for name in COMMANDS)
        print(f"{__doc__}\n{listed}\n\n`selfdistill COMMAND --help` says more of each.")
        return
    if importlib.util.find_spec("fire") is None:  # what data/__init__.py looks for under `-m`
        sys.argv = ["-m"]
    from selfdistill.data import cli

    name = words[0]
    if name not in COMMANDS:
        hint = cli.nearest(name, COMMANDS, prefix="")
        print(f"error: no command {name!r}{hint} (selfdistill --help lists them)", file=sys.stderr)
        sys.exit(2)
    sys.argv = words
    runpy.run_module(f"selfdistill.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
