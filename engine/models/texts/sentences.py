"""sentence-transformers' folders: how a sentence encoder pools its tokens, read and written.

Such a folder lists its modules in modules.json: the transformer, the pooling, sometimes a linear
layer. Versions 2 to 6 of the library read what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import save_file
from torch import Tensor

from selfdistill.data import records

Pooling = Literal["cls", "mean"]

#: Files to fetch beside weights and tokenizer.
FILES = ("modules.json", "*_Pooling/config.json", "sentence_bert_config.json")
_MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_mean_tokens": "mean"}
_LIBRARY = "sentence_transformers.models."


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


def read_pooling(folder: Path) -> tuple[Pooling, str]:
    """How a model pools, and what the user should be told of it ("" for nothing).

    A folder that is none of sentence-transformers' pools by its first token.

    Raises:
        UserError: a file is broken.
    """
    place = next((m.path for m in _modules(folder) if m.type.endswith(".Pooling")), None)
    if place is None:
        return "cls", ""
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


def write_modules(
    folder: Path, pooling: Pooling, width: int, head: Mapping[str, Tensor] | None = None
) -> None:
    """Makes a transformer's folder one of sentence-transformers'.

    Args:
        folder: with the transformer's files.
        pooling: of its tokens.
        width: of a token's vector.
        head: ``weight`` [classes, width] and ``bias`` [classes] of a classifier, whose logits are
            then what ``encode`` gives; None: the pooled vector.
    """
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    _write(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": width, **{k: v == pooling for k, v in _MODES.items()}},
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
