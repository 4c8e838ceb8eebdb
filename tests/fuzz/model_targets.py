"""Readers of models: configurations, processors, tokenizers, weights."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from transformers import BertConfig, BertForMaskedLM

from selfdistill.engine.checkpoints.export import export_mae
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTMAE
from selfdistill.engine.models.images.weights import load_pretrained
from selfdistill.engine.models.source import read_folder, read_torch
from selfdistill.engine.models.texts.sentences import read, transformer
from selfdistill.engine.models.texts.weights import load_language
from tests.fuzz.harness import Target
from tests.fuzz.inputs import changed, documents, edited

_SHAPE = Shape(16, 8, 16, 2, 2, 32, 8, 1, 2, 16)  # the sizes, encoder's and decoder's

_TYPES = {
    "deit": replace(_SHAPE, registers=1),
    "dinov2": replace(_SHAPE, registers=2, layer_scale=True),
    "dinov3": replace(_SHAPE, registers=2, layer_scale=True, rope=100.0, gated=True),
    "clip": replace(_SHAPE, pre_norm=True, activation="quick_gelu"),
    "siglip": replace(_SHAPE, class_token=False, activation="gelu_tanh"),
}
#: As sentence-transformers lays it out.
_MODULES = [
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
]
_POOLING = {"word_embedding_dimension": 8, "pooling_mode_mean_tokens": True}


@functools.cache
def mae() -> Path:
    """A ViT-MAE's folder, as transformers saves it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")) / "mae"
    torch.manual_seed(0)
    model = ViTMAE(_SHAPE)
    parts = model.encoder.state_dict(), model.decoder.state_dict()
    export_mae(folder, _SHAPE, *parts, (0.5,) * 3, (0.5,) * 3)
    return folder


@functools.cache
def bert() -> Path:
    """A BERT's folder, with its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x+", "isolated"), pre_tokenizers.Whitespace()]
    )
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = zip(("pad", "unk", "cls", "sep", "mask"), words[:5], strict=True)
    special = {f"{name}_token": word for name, word in names}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=8, max_position_embeddings=16)
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


@functools.cache
def typed(name: str) -> Path:
    """The folder of another type of encoder, with a decoder beside it."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-")) / name
    torch.manual_seed(0)
    model = ViTMAE(shape := _TYPES[name])
    parts = model.encoder.state_dict(), model.decoder.state_dict()
    export_mae(folder, shape, *parts, (0.5,) * 3, (0.5,) * 3)
    return folder


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _beside(original: Path, name: str, content: bytes, folder: Path) -> Path:
    """A copy of a model's folder in which one file is another."""
    target = folder / original.name
    target.mkdir(exist_ok=True)
    for path in original.iterdir():
        if path.is_file():
            place = target / path.name
            place.unlink(missing_ok=True)
            place.symlink_to(path)
    (target / name).unlink(missing_ok=True)
    (target / name).write_bytes(content)
    return target


def _image(name: str, content: bytes, folder: Path) -> None:
    load_pretrained(str(_beside(mae(), name, content, folder)))


def _typed(kind: str, content: bytes, folder: Path) -> None:
    load_pretrained(str(_beside(typed(kind), "config.json", content, folder)))


def read_modules(content: bytes, folder: Path) -> None:
    """The list of a sentence encoder's modules."""
    target = _beside(bert(), "modules.json", content, folder)
    (target / "1_Pooling").mkdir(exist_ok=True)
    (target / "1_Pooling" / "config.json").write_text(json.dumps(_POOLING))
    read(target)
    transformer(target)


def read_pools(content: bytes, folder: Path) -> None:
    """How a sentence encoder pools."""
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(_MODULES))
    (folder / "1_Pooling" / "config.json").write_bytes(content)
    read(folder)


def _text(name: str, content: bytes, folder: Path) -> None:
    load_language(str(_beside(bert(), name, content, folder)))


def read_timm(content: bytes, folder: Path) -> None:
    """A folder as timm's hub saves it."""
    (folder / "config.json").write_bytes(content)
    (folder / "model.safetensors").write_bytes(_timm_weights())
    load_pretrained(str(folder))


def read_index(content: bytes, folder: Path) -> None:
    """The index of weights in several files."""
    (folder / "model.safetensors.index.json").write_bytes(content)
    (folder / "one.safetensors").write_bytes(save({"a": torch.zeros(2), "b": torch.zeros(2)}))
    read_folder(folder)


def read_file(suffix: str, content: bytes, folder: Path) -> None:
    """A file of weights under timm's names."""
    path = folder / f"x{suffix}"
    path.write_bytes(content)
    load_pretrained(str(path))


def read_pickle(content: bytes, folder: Path) -> None:
    """A file of torch.save."""
    path = folder / "x.pth"
    path.write_bytes(content)
    read_torch(path)


_TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "model_args": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2},
    "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 0},
}


@functools.cache
def _timm_weights() -> bytes:
    import timm

    model: Any = timm.create_model(_TIMM["architecture"], num_classes=0, **_TIMM["model_args"])
    return save(model.state_dict())


@functools.cache
def _tensors() -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in ViTMAE(_SHAPE).encoder.state_dict().items()}


def _saved(content: Any, *, new: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, _use_new_zipfile_serialization=new)
    return out.getvalue()


def _headed(header: Any) -> bytes:
    """A safetensors file with a header of any content."""
    try:
        text = json.dumps(header).encode()
    except ValueError:
        text = b"{}"
    return len(text).to_bytes(8, "little") + text + _SAFE[8 + _LENGTH :]


_SAFE = save(_tensors())
_LENGTH = int.from_bytes(_SAFE[:8], "little")
_HEADER = json.loads(_SAFE[8 : 8 + _LENGTH])
_INDEX = {"weight_map": dict.fromkeys("ab", "one.safetensors")}
_SMALL = {"a": torch.zeros(3, 2), "b": torch.ones(2).expand(5, 2)}

TARGETS = [
    Target(
        "image_config",
        functools.partial(_image, "config.json"),
        documents([_json(mae() / "config.json")]),
    ),
    Target(
        "image_processor",
        functools.partial(_image, "preprocessor_config.json"),
        documents([_json(mae() / "preprocessor_config.json")]),
    ),
    Target("timm_config", read_timm, documents([_TIMM])),
    Target("index", read_index, documents([_INDEX])),
    Target("safetensors", functools.partial(read_file, ".safetensors"), edited([_SAFE])),
    Target(
        "safetensors_header",
        functools.partial(read_file, ".safetensors"),
        changed([_HEADER]).map(_headed),
    ),
    Target(
        "pickle",
        read_pickle,
        edited([_saved(_SMALL), _saved(_SMALL, new=False), _saved({"model": _SMALL})]),
    ),
    Target(
        "text_config",
        functools.partial(_text, "config.json"),
        documents([_json(bert() / "config.json")]),
    ),
    *(
        Target(
            f"config_{kind}",
            functools.partial(_typed, kind),
            documents([_json(typed(kind) / "config.json")]),
        )
        for kind in _TYPES
    ),
    Target("modules", read_modules, documents([_MODULES])),
    Target("pooling", read_pools, documents([_POOLING])),
    Target(
        "tokenizer",
        functools.partial(_text, "tokenizer.json"),
        documents([_json(bert() / "tokenizer.json")]),
    ),
    Target(
        "tokenizer_config",
        functools.partial(_text, "tokenizer_config.json"),
        documents([_json(bert() / "tokenizer_config.json")]),
    ),
    Target(
        "text_weights",
        functools.partial(_text, "model.safetensors"),
        edited([(bert() / "model.safetensors").read_bytes()]),
    ),
]
