"""Models that do not fit, as people give them: one line that says what it is, and the cure."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from timm.models import create_model, save_for_hf

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.export import export_mae
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.options import load
from selfdistill.engine.models.images.vit_mae import MAEDecoder
from selfdistill.engine.models.images.weights import load_pretrained
from selfdistill.engine.models.texts.weights import load_language
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.image import ImageModality
from tests.kit import texts as text_kit

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def dino(folder: Path) -> None:
    config = hf.Dinov2Config(**SMALL, patch_size=4, image_size=16, mlp_ratio=2)
    hf.Dinov2Model(config).save_pretrained(folder)


def told(folder: Path, **config: object) -> None:
    """A folder of which only config.json matters."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))


def decoder(folder: Path, **other: Any) -> None:
    """An export whose decoder was made for another encoder."""
    dino(folder.with_name("in"))
    base = load_pretrained(str(folder.with_name("in")))
    strange = MAEDecoder(replace(base.shape, **other)).state_dict()
    export_mae(folder, base.shape, base.encoder, strange, (0.5,) * 3, (0.5,) * 3)


def cast(folder: Path, dtype: torch.dtype) -> None:
    """Weights of which one is stored in few bits."""
    dino(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.0.mlp.fc1.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def adapter(folder: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def foreign(folder: Path, name: str) -> None:
    told(folder, model_type="vit")
    (folder / name).write_bytes(b"x")


def half(folder: Path) -> None:
    """The first of two shards of a download."""
    dino(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    first = "model-00001-of-00002.safetensors"
    save_file(dict(list(tensors.items())[:5]), folder / first)
    places = {k: first if i < 5 else first.replace("1-", "2-", 1) for i, k in enumerate(tensors)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def timms(folder: Path, name: str) -> None:
    save_for_hf(create_model(name, num_classes=0), folder)


IMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "detection": (lambda f: told(f, model_type="detr"), "is a detr, none of the image encoders"),
    "convolutions": (lambda f: told(f, model_type="resnet"), "is a resnet, none of the image"),
    "timm's": (lambda f: timms(f, "mobilenetv3_small_050"), "which is not a plain ViT"),
    "windows": (lambda f: told(f, model_type="swin"), "is a swin, none of the image encoders"),
    "naflex": (
        lambda f: told(f, model_type="siglip2", vision_config={}),
        "SigLIP 2 for images of any shape (NaFlex), which is not known here: take one of a fixed",
    ),
    "text tower": (lambda f: told(f, model_type="clip_text_model"), "is a clip_text_model, none"),
    "adapter": (adapter, "is an adapter (adapter_config.json), not a whole model: merge it"),
    "tensorflow": (lambda f: foreign(f, "tf_model.h5"), "no weights: tf_model.h5 is not read here"),
    "unfinished": (
        lambda f: foreign(f, "model.safetensors.incomplete"),
        "no weights: model.safetensors.incomplete is not read here: put model.safetensors",
    ),
    "half": (half, "names model-00002-of-00002.safetensors, which is missing: fetch"),
    "fp8": (
        lambda f: cast(f, torch.float8_e4m3fn),
        "fc1.weight is no plain table of floating-point numbers (torch.float8_e4m3fn)",
    ),
    "int8": (
        lambda f: cast(f, torch.int8),
        "fc1.weight is no plain table of floating-point numbers (torch.int8): take weights that",
    ),
    "wider decoder": (
        lambda f: decoder(f, width=64),
        "decoder.embed.weight is (512, 64), its encoder's configuration asks for (512, 32)",
    ),
    "larger decoder": (
        lambda f: decoder(f, image_size=32),
        "decoder.pos_embed is (1, 65, 512), its encoder's configuration asks for (1, 17, 512)",
    ),
    "text": (lambda f: told(f, model_type="bert"), "is a bert, none of the image encoders known"),
    "pipeline": (Path.mkdir, "has no config.json: give a model's folder"),
}


def bert(folder: Path, **change: Any) -> None:
    """A text model of which something is another's."""
    text_kit.make_language(folder, kind="bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))


def other_tokenizer(folder: Path) -> None:
    bert(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"more{i}": 300 + i for i in range(400)}
    path.write_text(json.dumps(content))


def without(folder: Path, name: str) -> None:
    bert(folder)
    (folder / name).unlink()


TEXTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "causal": (lambda f: told(f, model_type="gpt2"), "of type 'gpt2', of which masked language"),
    "translation": (lambda f: told(f, model_type="t5"), "of type 't5', of which masked language"),
    "image": (dino, "of type 'dinov2', of which masked language modelling is not known here"),
    "adapter": (adapter, "is an adapter (adapter_config.json), not a whole model"),
    "tokenizer": (other_tokenizer, "ids up to 699, the model 300 embeddings: take the tokenizer"),
    "no tokenizer": (lambda f: without(f, "tokenizer.json"), "has no tokenizer that can be read"),
    "no weights": (lambda f: without(f, "model.safetensors"), "its files have 0 bytes: fetch"),
    "quantised": (
        lambda f: bert(f, quantization_config={"quant_method": "bitsandbytes"}),
        "is quantised (quantization_config in config.json), and is to be trained",
    ),
    "wider": (lambda f: bert(f, hidden_size=48), "fetch the model again"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(tmp_path: Path, name: str) -> None:
    make, says = IMAGES[name]
    make(tmp_path / "model")
    with pytest.raises(UserError) as caught:
        load_pretrained(str(tmp_path / "model"))
    line = str(caught.value)
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("name", TEXTS)
def test_texts(tmp_path: Path, name: str) -> None:
    make, says = TEXTS[name]
    make(tmp_path / "model")
    with pytest.raises(UserError) as caught:
        load_language(str(tmp_path / "model"))
    line = str(caught.value)
    assert says in line
    assert "\n" not in line


def modality(**options: Any) -> ImageModality:
    return ImageModality(Run(load(options), Ranks(0, 0, 1, torch.device("cpu")), Path()))


def test_other_channels_than_packed_images_have(tmp_path: Path) -> None:
    config = hf.ViTConfig(**SMALL, intermediate_size=32, patch_size=4, image_size=16)
    config.num_channels = 1
    hf.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"takes images of 1 channel\(s\), and packed ones have 3"):
        modality(model=str(tmp_path)).load()


def test_a_model_from_scratch_takes_the_size_that_is_asked_for() -> None:
    sizes = {"model.shape.patch_size": 4, "model.shape.width": 24, "model.shape.depth": 1}
    base = modality(**{"model": "scratch", "model.image_size": 16, **sizes}).load()
    assert base.shape.image_size == 16
