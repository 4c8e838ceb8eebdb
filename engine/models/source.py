"""Where weights come from: folders, single files and the Hugging Face hub; nothing is unpickled."""

from __future__ import annotations

import argparse
import pickle
import re
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfdistill.data.cli import format_error
from selfdistill.data.errors import UserError
from selfdistill.data.files import read, regular
from selfdistill.data.records import checked, read_object

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# Names on the hub that have no owner, from its first days: roberta-base, bert-base-uncased.
_BARE_NAME = re.compile(r"[\w-]+(-[\w-]+)+")
#: Names of files as torch.save leaves them; a ".pth.tar" is no tar.
TORCH_FILES = (".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pt.tar")
#: Under which of these a training checkpoint has its model's tensors: FAIR's, timm's, Lightning's.
_STATE = ("model", "state_dict", "model_state_dict")
#: What wrappers put before every name: DataParallel, Lightning and others, torch.compile.
_PREFIXES = ("module.", "model.", "_orig_mod.")
#: Tensors may share their numbers, as tied embeddings do: so many times the file's size at most.
_TIED = 4
#: Weights of other libraries, and of downloads that did not end.
_FOREIGN = (".h5", ".msgpack", ".onnx", ".gguf", ".incomplete", ".part", ".crdownload")
#: The card tells the licence.
_CONFIGS = ["config.json", "preprocessor_config.json", "processor_config.json", "README.md"]


def locate(
    source: str,
    *,
    example: str = "facebook/vit-mae-base",
    patterns: Iterable[str] = (),
    bare: bool = False,
) -> Path:
    """The folder or file that `source` names; a hub name is fetched into the hub's own cache.

    Args:
        source: path or hub name.
        example: a hub name, for messages.
        patterns: patterns of files to fetch beside weights and configuration.
        bare: a name without an owner may be the hub's.

    Raises:
        UserError: there is no such thing, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.name == "model.safetensors" and (path.parent / "config.json").exists():
        path = path.parent  # its configuration tells more than its tensors
    if path.exists():
        _refuse_adapter(path, source)
        return path
    name = source.removeprefix("hf-hub:")
    if name.startswith("timm:"):  # and timm's name of its weights
        name = f"timm/{name.removeprefix('timm:')}"
    known = _HUB_NAME.fullmatch(name) or (bare and _BARE_NAME.fullmatch(name))
    if not known or path.name.endswith((*TORCH_FILES, ".safetensors")):
        raise UserError(
            f"no weights at {source}: give a folder, a .pth or .safetensors file, or a hub name "
            f"such as {example}"
        )
    return _fetch(name, [*_CONFIGS, *patterns])


def _refuse_adapter(path: Path, source: str) -> None:
    """Refuses a folder with PEFT's updates of a model and not the model.

    Raises:
        UserError: it is one.
    """
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UserError(
            f"{source} is an adapter (adapter_config.json), not a whole model: merge it into its"
            " base with PEFT's merge_and_unload, and give the folder that you save"
        )


def _fetch(name: str, configs: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = Path(snapshot_download(name, allow_patterns=[*configs, "model.safetensors"]))
        if not (folder / "config.json").exists():  # ours of what transformers has no class of
            folder = Path(snapshot_download(name, allow_patterns=[*configs, "timm/*"]))
            if (folder / "timm" / "config.json").exists():
                return folder
        if not (folder / "model.safetensors").exists():
            others = ["model-*.safetensors", "model.safetensors.index.json"]
            others += ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
            folder = Path(snapshot_download(name, allow_patterns=[*configs, *others]))
    except (OSError, ValueError, HfHubHTTPError) as error:
        # The first sentence names the reason, the others what the hub's library advises.
        reason = textwrap.shorten(str(error).split(". ")[0], 160, placeholder=" …")
        if "Connect" in reason:
            reason = "it cannot be reached"
        raise UserError(
            f"there is no folder {name}, and the hub gives no model of that name ({reason}): check "
            "the name, or fetch the model's folder on a machine with a network and give its path"
        ) from error
    return folder


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model's folder: safetensors, else pytorch_model.bin, whole or in shards.

    Raises:
        UserError: there are none, or a file is broken or missing.
    """
    readers = {"model.safetensors": read_safetensors, "pytorch_model.bin": _tensors}
    for name, reader in readers.items():
        if (folder / name).exists():
            return reader(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _read_shards(index, reader)
    others = [p.name for p in folder.iterdir() if p.suffix in _FOREIGN]
    why = f": {sorted(others)[0]} is not read here" if others else ""
    raise UserError(
        f"{folder} has a config.json but no weights{why}: put model.safetensors or"
        " pytorch_model.bin beside it"
    )


def _read_shards(index: Path, reader: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors that an index names, from the files beside it."""
    places = read_object(index).get("weight_map")
    cure = "fetch the model again, whole"
    if not places:
        raise UserError(f"{index} names no tensors (it has no weight_map): {cure}")
    checked(dict[str, str], places, f"{index}: weight_map", cure)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if name != Path(name).name:
            raise UserError(f"{index} names {name!r}, which is no file beside it: {cure}")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is missing: {cure}")
        tensors |= reader(index.parent / name)
    if absent := sorted(places.keys() - tensors.keys()):
        raise UserError(f"{index} names the tensor {absent[0]}, which no shard has: {cure}")
    return tensors


def _tensors(path: Path) -> dict[str, Tensor]:
    return read_torch(path)[0]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one safetensors file."""
    regular(path, "fetch it again")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError, MemoryError) as error:
        raise UserError(f"{path} cannot be read ({format_error(error)}): fetch it again") from error
    _check_plain(path, tensors)
    return tensors


def _check_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses what is no plain table of floating-point numbers, or says to be more than the file.

    A torch file's tensor may repeat one number a million million times; a copy of it would not fit.

    Raises:
        UserError: Names the first.
    """
    total = 0
    for name, tensor in tensors.items():
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        floats = tensor.is_floating_point() and tensor.element_size() > 1
        if not plain or tensor.is_quantized or not floats:
            if plain and tensor.dtype in (torch.int64, torch.int32, torch.bool) and tensor.ndim < 3:
                continue  # numbers of positions, which no model here trains
            raise UserError(
                f"{path}: {name} is no plain table of floating-point numbers ({tensor.dtype}): take"
                " weights that are neither quantised nor sparse"
            )
        total += tensor.numel() * tensor.element_size()
    if total > _TIED * path.stat().st_size:
        raise UserError(
            f"{path}: its tensors are said to have {total:,} bytes, and the file has fewer: fetch"
            " it again, or save it anew"
        )


def read_torch(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and training arguments if there are any, of a torch.save file.

    Read with ``weights_only=True``: a file that holds more than tensors, plain values and an
    ``argparse.Namespace`` (FAIR's training checkpoints hold one; it only stores its values) is
    refused, since unpickling it could run its author's code.

    Raises:
        UserError: refused, broken, or without a dict of tensors.
    """
    regular(path, "fetch it again")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                stored = sum(info.file_size for info in archive.infolist())
                named = [n for n in archive.namelist() if n.endswith("data.pkl")]
                code = b"".join(archive.read(name) for name in named)
            if stored > path.stat().st_size:
                raise ValueError("compressed")  # torch.save writes none; what would it come to?
        else:
            code = read(path, "fetch it again", path.stat().st_size)
        if b"bytearray" in code:  # which torch lets pass, of any length
            raise ValueError("bytes that are no tensor")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|function|global) `?([\w.]+)`?", str(error))
        raise UserError(
            f"{path} holds more than tensors ({found[1] if found else 'a pickled object'}), and "
            "loading it could run code: refused; save its state dict alone, or as safetensors"
        ) from error
    except Exception as error:  # whatever its unpickler meets in a broken file
        raise UserError(f"{path} is no readable torch file: fetch it again") from error
    args = content.get("args") if isinstance(content, dict) else None
    # As timm does, the weights' average first, which its makers' figures are of.
    states = [key for name in _STATE for key in (f"{name}_ema", name)]
    for name in states if isinstance(content, dict) else ():
        if isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path} holds no state dict: save the model's state_dict()")
    strange = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if strange:
        raise UserError(
            f"{path} is no state dict: {strange[0]} is no tensor; save the model's state_dict()"
        )
    tensors = {str(k): v for k, v in content.items()}
    _check_plain(path, tensors)
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), ""):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors, vars(args) if isinstance(args, argparse.Namespace) else {}
