"""sentence-transformers' folders: how a sentence encoder pools its tokens, read and written.

Such a folder lists its modules in modules.json: the transformer, the pooling, sometimes a linear
layer. Versions 2 to 6 of the library read what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from safetensors.torch import save_file
from torch import Tensor

from selfdistill.data import records

Pooling = Literal["cls", "mean"]

_LENGTH = "sentence_bert_config.json"
#: Files to fetch beside weights and tokenizer.
FILES = ("modules.json", "*_Pooling/config.json", _LENGTH, "0_Transformer/*")
_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_LIBRARY = "sentence_transformers.models."


class _Length(records.Record):
    """What is used of sentence_bert_config.json."""

    max_seq_length: Annotated[int, pydantic.Field(ge=3, lt=2**20)] | None = None
    do_lower_case: bool | None = None


class _Module(records.Record):
    """An entry of modules.json."""

    path: str
    type: str


def transformer(folder: Path) -> Path:
    """The folder with the transformer's own files: `folder`, or one below it."""
    if (folder / "config.json").exists():
        return folder
    for module in _modules(folder):
        if module.type.endswith(".Transformer") and _inside(folder, module.path):
            return folder / module.path
    return folder


@dataclass(frozen=True)
class Sentences:
    """What sentence-transformers' files say of a model beside its weights.

    Attributes:
        pooling: of a text's tokens.
        normalizes: whether the pooled vector gets length 1.
        longest: tokens that are read of a text, if it is said.
        lowers: whether a text's letters are made small before its tokens are.
        notes: what the user should be told, a line each.
    """

    pooling: Pooling = "mean"
    normalizes: bool = False
    longest: int | None = None
    lowers: bool = False
    notes: tuple[str, ...] = ()


def read(folder: Path) -> Sentences | None:
    """Reads a folder; None where it is none of sentence-transformers'.

    Raises:
        UserError: a file is broken.
    """
    modules = _modules(folder)
    kinds = [module.type.rpartition(".")[2] for module in modules]
    if "Pooling" not in kinds:
        return None
    pooling, note = _pooling(folder, modules[kinds.index("Pooling")].path)
    left = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    more = f"left out {', '.join(left)[:80]}: vectors are those before it" if left else ""
    told, places = _Length(), [one / _LENGTH for one in (transformer(folder), folder)]
    if path := next((one for one in places if one.is_file()), None):
        told = records.checked(_Length, records.read_object(path), path)
    notes = tuple(line for line in (note, more) if line)
    unit = "Normalize" in kinds and not left
    return Sentences(pooling, unit, told.max_seq_length, bool(told.do_lower_case), notes)


def _pooling(folder: Path, place: str) -> tuple[Pooling, str]:
    """How a module pools, and what is to be said of it ("" for nothing)."""
    path = folder / place / "config.json"
    inside = _inside(folder, place)  # without a file of its own a pooling takes the mean
    told = records.read_object(path) if inside else {"pooling_mode": "mean"}
    asked = told.get("pooling_mode") or [
        _MODES.get(name, name.removeprefix("pooling_mode_"))
        for name, value in told.items()
        if name.startswith("pooling_mode_") and value is True
    ]
    modes = asked if isinstance(asked, list) else [asked]
    if modes == ["cls"]:
        return "cls", ""
    if modes == ["mean"]:
        return "mean", ""
    named = ", ".join(str(mode)[:40] for mode in modes[:3])
    return "mean", f"pools by {named}, which is not known here: the mean of its tokens is taken"


def write(
    folder: Path, told: Sentences, width: int, head: Mapping[str, Tensor] | None = None
) -> None:
    """Makes a transformer's folder one of sentence-transformers'.

    Args:
        folder: with the transformer's files.
        told: how it pools.
        width: of a token's vector.
        head: ``weight`` [classes, width] and ``bias`` [classes] of a classifier, whose logits are
            then what ``encode`` gives; None: the pooled vector.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, **{k: v == told.pooling for k, v in _MODES.items()}},
    )
    if head is not None:
        modules.append(("2_Dense", "Dense"))
        classes = len(head["bias"])
        _write(
            folder / "2_Dense" / "config.json",
            {
                "in_features": width,
                "out_features": classes,
                "bias": True,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
        named = {f"linear.{k}": v.detach().float().cpu().contiguous() for k, v in head.items()}
        save_file(named, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    elif told.normalizes:
        modules.append(("2_Normalize", "Normalize"))
    if told.longest is not None or told.lowers:
        _write(folder / _LENGTH, {"max_seq_length": told.longest, "do_lower_case": told.lowers})
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"{_LIBRARY}{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    _write(folder / "modules.json", listed)


def _modules(folder: Path) -> list[_Module]:
    path = folder / "modules.json"
    if not path.is_file():
        return []
    found: list[_Module] = records.checked(list[_Module], records.read_json(path), path)
    return found


def _inside(folder: Path, place: str) -> bool:
    """Whether a module's configuration lies in the model's folder, and not elsewhere."""
    try:
        found = (folder / place / "config.json").resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # none there; too long, or no name at all; a circle
        return False
    return found.is_relative_to(folder.resolve())


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
