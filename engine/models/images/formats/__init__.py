"""The published formats of ViT and ViT-MAE checkpoints, each read into the same record."""

from __future__ import annotations

from pathlib import Path

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.data.files import regular
from selfdistill.engine.models.images import types
from selfdistill.engine.models.images.formats import bare, hugging_face, timm_folder
from selfdistill.engine.models.images.found import Found
from selfdistill.engine.models.source import TORCH_FILES, read_safetensors, read_torch


def read(path: Path, origin: str) -> Found:
    """Reads a folder or file of any known format.

    Raises:
        UserError: none of the known formats, or another architecture.
    """
    found = _read(path, origin)
    found.antialias = types.fitting(found.shape, origin).antialias(found.shape)
    return found


def _read(path: Path, origin: str) -> Found:
    if path.is_file():
        if path.suffix == ".safetensors":
            return bare.read(read_safetensors(path), {}, origin)
        if path.name.endswith(TORCH_FILES):
            return bare.read(*read_torch(path), origin)
        raise UserError(
            f"{origin} is neither {', '.join(TORCH_FILES)} nor .safetensors: give one of them"
        )
    regular(path if not path.is_dir() else path / "config.json", "give another")
    # What transformers has no class of is exported for timm alone.
    folder = path if (path / "config.json").exists() else path / "timm"
    if not (folder / "config.json").exists():
        raise UserError(
            f"{origin} has no config.json: give a model's folder as transformers or timm save it"
        )
    config = records.read_object(folder / "config.json")
    if "architecture" in config:
        beside = path / hugging_face.DECODER
        decoder = beside if folder != path and beside.exists() else None
        return timm_folder.read(folder, config, origin, decoder)
    return hugging_face.read(folder, config, origin)
