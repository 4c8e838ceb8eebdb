"""selfdistill: adapts a pre-trained transformer to a domain with few labels.

`selfdistill COMMAND --help` says more of each. In a clone a command is also typed by its long name,
as `python -m data.pack`.
"""

import ast
import importlib.util
import os
import runpy
import sys
from pathlib import Path

#: The commands, by their modules.
COMMANDS = (
    "data.pack",
    "data.index",
    "data.verify",
    "data.subset",
    "data.tokenizer",
    "launcher.train",
    "launcher.predict",
    "launcher.embed",
    "launcher.evaluate",
    "launcher.compare",
    "launcher.export",
    "launcher.plan",
    "launcher.doctor",
    "launcher.slurm",
    "launcher.quickstart",
    "launcher.screenshot",
    "launcher.examples",
    "experiments.run",
    "experiments.report",
    "experiments.theory",
    "engine.run",
)

#: What a launcher starts, not a person: these have no short name.
_LONG = ("engine.run",)


def short(command: str) -> str:
    """The name by which a command is typed: `pack` of data.pack, `experiments` of its run."""
    room, _, name = command.rpartition(".")
    return room if name == "run" else name


#: Short name -> module.
NAMES = {short(command): command for command in COMMANDS if command not in _LONG}


def _about(command: str) -> str:
    """The first sentence of a command's module, without the line that is typed."""
    path = Path(__file__).resolve().parent.joinpath(*command.split("."))
    file = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__main__.py"
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    first = text.split("\n\n")[0].replace("\n", " ")
    before, _, after = first.partition(": ")
    words = (after if before.startswith(("python -m", "`")) else before).partition(". ")[0]
    return (words[:1].upper() + words[1:]).rstrip(".")


def _help() -> str:
    width = max(map(len, NAMES))
    lines = [f"  selfdistill {name:<{width}}  {_about(c)}" for name, c in NAMES.items()]
    return "\n".join([__doc__ or "", *lines])


def main() -> None:
    """Runs a command.

    Raises:
        SystemExit: 2 where there is no such command.
    """
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return
    if importlib.util.find_spec("fire") is None:  # what data/__init__.py looks for under `-m`
        sys.argv = ["-m"]
    from selfdistill.data import cli
    from selfdistill.data.errors import TYPED

    name = words[0]
    module = NAMES.get(name, name)
    if module not in COMMANDS:
        hint = cli.nearest(name, NAMES, prefix="")
        print(f"error: no command {name!r}.{hint} (selfdistill --help lists them)", file=sys.stderr)
        sys.exit(2)
    typed = "selfdistill" if Path(sys.argv[0]).name == "selfdistill" else "python -m selfdistill"
    cli.program = f"{typed} {name}"
    os.environ[TYPED] = typed
    sys.argv[1:] = words[1:]
    runpy.run_module(f"selfdistill.{module}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
