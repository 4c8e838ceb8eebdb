"""Where weights come from: folders, single files and the Hugging Face hub; nothing is unpickled."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from data.errors import UserError

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Names on the hub that have no owner, from its first days: roberta-base, bert-base-uncased.
_BARE_NAME = re.compile(r"[\w-]+(-[\w-]+)+")
_CONFIGS = ["config.json", "preprocessor_config.json"]


def locate(
    source: str,
    *,
    example: str = "facebook/vit-mae-base",
    more: Iterable[str] = (),
    bare: bool = False,
) -> Path:
    """The folder or file that `source` names; a hub name is fetched into the hub's own cache.

    Args:
        source: path or hub name.
        example: a hub name, for messages.
        more: patterns of files to fetch beside weights and configuration.
        bare: a name without an owner may be the hub's.

    Raises:
        UserError: there is no such thing, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.name == "model.safetensors" and (path.parent / "config.json").exists():
        path = path.parent  # its configuration tells more than its tensors
    if path.exists():
        return path
    name = source.removeprefix("hf-hub:")
    known = _HUB_NAME.fullmatch(name) or (bare and _BARE_NAME.fullmatch(name))
    if not known or path.suffix in (".pth", ".pt", ".bin", ".safetensors"):
        raise UserError(
            f"no weights at {source}: give a folder, a .pth or .safetensors file, or a hub name "
            f"such as {example}"
        )
    return _fetch(name, [*_CONFIGS, *more])


def _fetch(name: str, configs: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*configs, "model.safetensors"]))
        if not (folder / "model.safetensors").exists():
            others = ["model-*.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
            folder = Path(snapshot_download(name, allow_patterns=[*configs, *others]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        # The first sentence names the reason, the others what the hub's library advises.
        reason = textwrap.shorten(str(error).split(". ")[0], 160, placeholder=" …")
        raise UserError(
            f"there is no folder {name}, and the hub gives no model of that name ({reason}): check "
            "the name, or fetch the model's folder on a machine with a network and give its path"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; UserError if the file is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object: fetch it again")
    return content


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder: safetensors, whole or in shards, else pytorch_model.bin."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    if index.exists():
        tensors: dict[str, Tensor] = {}
        for name in sorted(set(read_json(index)["weight_map"].values())):
            tensors |= read_safetensors(folder / Path(name).name)
        return tensors
    if (folder / "pytorch_model.bin").exists():
        return read_torch(folder / "pytorch_model.bin")[0]
    raise UserError(
        f"{folder} has a config.json but no weights: put model.safetensors or pytorch_model.bin "
        "beside it"
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error


def read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and training arguments if there are any, of a torch.save file.

    Read with ``weights_only=True``: a file that holds more than tensors, plain values and an
    ``argparse.Namespace`` (FAIR's training checkpoints hold one; it only stores its values) is
    refused, since unpickling it could run its author's code.

    Raises:
        UserError: refused, broken, or without a dict of tensors.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function|global) `?([\w.]+)`?", str(error))
        raise UserError(
            f"{path} holds more than tensors ({found[1] if found else 'a pickled object'}), and "
            "loading it could run code: refused; save its state dict alone, or as safetensors"
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no readable torch file: fetch it again") from error
    args = content.get("args") if isinstance(content, dict) else None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no state dict: save the model's state_dict()")
    strange = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if strange:
        raise UserError(
            f"{path} is no state dict: {strange[0]} is no tensor; save the model's state_dict()"
        )
    tensors = {str(k).removeprefix("module."): v for k, v in content.items()}
    return tensors, vars(args) if isinstance(args, argparse.Namespace) else {}
