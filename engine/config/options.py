"""From a recipe and a command line to the configuration; what --help says of its options."""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from fire.parser import DefaultParseValue
from pydantic import ValidationError

from selfdistill.data import cli, records
from selfdistill.data.errors import UserError
from selfdistill.engine.config.schema import ROOT, Config
from selfdistill.engine.config.sections import Section

RECIPES = ROOT / "recipes"


def _section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


@functools.cache
def options(section: type[Section] = Config, prefix: str = "") -> dict[str, Any]:
    """Every option's dotted name and pydantic field; a section's name stands for its path."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = _section(field.annotation)
        if inner is None:
            found[prefix + name] = field
        else:
            if "path" in inner.model_fields:
                found[prefix + name] = inner.model_fields["path"]
            found |= options(inner, f"{prefix}{name}.")
    return found


def nearest_option(name: str) -> str:
    """A hint naming the known option nearest to `name`, or nothing."""
    known = list(options())
    leaves = [o for o in known if o.rsplit(".", 1)[-1] == name]
    close = leaves or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {' or '.join('--' + c for c in close)}?" if close else ""


def _insert(tree: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    if dotted not in options():
        raise UserError(f"{where}: unknown option {dotted!r}{nearest_option(dotted)}")
    keys = dotted.split(".")
    node: dict[str, Any] = tree
    section: type[Section] = Config
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        inner = _section(section.model_fields[key].annotation)
        assert inner is not None, "only sections have dotted names below them"
        section = inner
    if _section(section.model_fields[keys[-1]].annotation):
        node.setdefault(keys[-1], {})["path"] = value
    else:
        node[keys[-1]] = value


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def recipe_file(name: str) -> Path:
    """The TOML file of a recipe given by name or by path.

    Raises:
        UserError: there is none.
    """
    known = sorted(p.stem for p in RECIPES.glob("*.toml"))
    for path in (RECIPES / f"{name}.toml", Path(name)):
        if path.is_file():
            return path
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UserError(f"--recipe {name}: no such recipe or file; there are {', '.join(known)}{hint}")


def parse(argv: Sequence[str]) -> dict[str, Any]:
    """Dotted option names and values of a command line.

    Raises:
        UserError: something that is no option, or an option that does not exist.
    """
    known = {name: field.annotation for name, field in options().items()}
    typed, positional = cli.split_words(argv, known, lambda name, _: nearest_option(name))
    if positional:
        raise UserError(f"{positional[0]!r} belongs to no option: --help lists them")
    values: dict[str, Any] = {}
    for name, (words, value) in typed.items():
        negated = words[0].lstrip("-").replace("-", "_") == f"no{name}"
        values[name] = not negated if value is None else _value(value, known[name])
    values.pop("local_rank", None)
    return values


def _value(text: str, annotation: Any) -> Any:
    """What was typed as Python reads it; 0x48 is a wrong size, and no 72.

    A name or a path is what was typed: `run#2`, `1.10` and `2024_11` are folders.
    """
    parts = set(get_args(annotation)) or {annotation}
    if parts <= {str, type(None)}:
        return None if text in ("", "None") and type(None) in parts else text
    return text if text.startswith("0x") else DefaultParseValue(text)


#: Options of a recipe that may name something beside its file.
_PLACES = ("model.path", "model.tokenizer")


def load(overrides: dict[str, Any]) -> Config:
    """Resolves defaults < recipe < `overrides` (dotted names) into one configuration.

    Raises:
        UserError: an unknown option, a wrong type or value, an unreadable recipe.
    """
    tree: dict[str, Any] = {}
    given: dict[str, str] = {}
    if overrides.get("recipe"):
        path = recipe_file(str(overrides["recipe"]))
        content = records.read_toml(path, "correct the recipe")
        for name, value in _flatten(content).items():
            if isinstance(value, str) and value.startswith("pipe:"):
                raise UserError(
                    f"recipe {path.name}: {name} is a command, which the command line alone may"
                    f" give: take it out, and type --{name} 'pipe:…'"
                )
            if name in _PLACES and (path.parent / str(value)).exists():
                value = str(path.parent / str(value))  # what lies beside its recipe
            _insert(tree, name, value, f"recipe {path.name}")
            given[name] = f"recipe {path.name}"
    for name, value in overrides.items():
        _insert(tree, name, value, "command line")
        given[name] = "command line"
        for length, other in (("steps", "epochs"), ("epochs", "steps")):
            # A length on the command line replaces the recipe's, in whichever unit that was.
            stage, _, leaf = name.rpartition(".")
            if leaf == length and f"{stage}.{other}" not in overrides:
                tree[stage][other] = None
    for stage in ("decoder", "pretrain", "distill", "finetune"):
        if tree.get(stage, {}).get("epochs") is not None and "steps" not in tree[stage]:
            tree[stage]["steps"] = None  # the default length gives way, too
    try:
        config = Config(**tree)
        config._given = frozenset(overrides)
        return config
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(p) for p in first["loc"])
        value = first["input"]
        given_value = "" if isinstance(value, dict) else f" {value}"
        source = given.get(name, "command line")
        message = first["msg"].removeprefix("Value error, ")
        option = f"--{name}{given_value}: " if name else ""
        raise UserError(f"{source}: {option}{message}") from error


def kind_of(field: Any) -> str:
    """A short name of what an option takes, for the help page."""
    told = [note for note in field.metadata if isinstance(note, str)]  # of an Annotated
    return told[-1] if told else cli.kind_of(field.annotation)


def help_text(words: Sequence[str] = ()) -> str:
    """The options page of `engine/run.py --help`.

    Args:
        words: of the command line; a `--recipe` among them gives the defaults that are shown.
    """
    rows, recipe = [], None
    for word, after in itertools.pairwise([*words, ""]):
        flag, _, value = word.partition("=")
        if flag == "--recipe":
            recipe = load({"recipe": value or after})
    whose = "no recipe; with --help --recipe NAME, of that"
    if recipe is not None:
        whose = f"the recipe {recipe.recipe}"
    for name, field in options().items():
        if name.endswith(".path") or name == "local_rank":
            continue
        default: Any = field.get_default(call_default_factory=True)
        if recipe is not None:
            default = recipe
            for part in name.split("."):
                default = getattr(default, part)
        text = f"{field.description or ''}{cli.default_of(default)}".strip()
        rows.append((f"--{name}", kind_of(field), text))
    return "\n".join(
        [
            "deepspeed engine/run.py --stage STAGE --recipe NAME --data DIR --output DIR",
            "",
            *cli.columns(rows),
            "",
            f"defaults: those of {whose}",
            "recipes: " + ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml"))),
        ]
    )
