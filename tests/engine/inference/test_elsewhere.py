"""Exports and checkpoints that other programs have touched: nothing old or foreign is taken."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub.utils import filter_repo_objects
from timm.models import save_for_hf
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPVisionModel,
    Dinov2ForImageClassification,
)

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints import snippets
from selfdistill.engine.checkpoints.export import export_classifier, export_mae
from selfdistill.engine.inference.model import load
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTMAE
from selfdistill.engine.models.images.weights import load_pretrained

NORM = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
CLASSES = ["ant", "bee", "cat"]


def network(**more: Any) -> tuple[Shape, ViTMAE]:
    sizes: dict[str, Any] = {"patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_width": 128}
    sizes |= {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp_width": 64}
    torch.manual_seed(0)
    shape = Shape(**(sizes | {"image_size": 32, "norm_eps": 1e-6} | more))
    return shape, ViTMAE(shape)


def classifier(folder: Path, **more: Any) -> Path:
    shape, model = network(**more)
    head = {"weight": torch.randn(3, 32), "bias": torch.zeros(3)}
    export_classifier(folder, shape, model.encoder.state_dict(), head, CLASSES, "cls", *NORM)
    return folder


def test_a_classifier_that_was_saved_anew_is_not_answered_by_the_old_one(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "export", layer_scale=True)
    assert load(folder).classes == CLASSES
    theirs = Dinov2ForImageClassification.from_pretrained(folder)
    theirs.classifier.bias.data = torch.tensor([0.0, 90, 0])
    theirs.save_pretrained(folder)
    with pytest.raises(UserError, match="was saved anew by another program") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder / "timm")
    found = load(folder).forward({"images": torch.zeros(1, 3, 32, 32, dtype=torch.uint8)})
    assert int(found["logits"].argmax()) == 1


def test_a_rectangle_that_was_saved_anew_keeps_its_pixels(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "export", image_size=(32, 48))
    for part in (AutoModelForImageClassification, AutoImageProcessor):
        part.from_pretrained(folder).save_pretrained(tmp_path / "again")
    found = load_pretrained(str(tmp_path / "again"))
    assert (found.mean, found.std) == NORM


@pytest.mark.parametrize("size", [32, (32, 48)])
def test_an_encoder_on_the_hub_has_its_decoder(
    size: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub is a folder here, of which what is asked for is copied."""
    shape, model = network(image_size=size, layer_scale=True)
    tensors = model.encoder.state_dict(), model.decoder.state_dict()
    there, here = tmp_path / "there", tmp_path / "here"
    export_mae(there, shape, *tensors, *NORM)

    def fetch(name: str, allow_patterns: list[str]) -> str:
        names = [str(p.relative_to(there)) for p in there.rglob("*") if p.is_file()]
        for one in filter_repo_objects(names, allow_patterns=allow_patterns):
            (here / one).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(there / one, here / one)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    found = load_pretrained("mine/encoder")
    assert found.decoder is not None
    assert found.sha256 == load_pretrained(str(there)).sha256


@pytest.mark.parametrize("name", ["model", "state_dict"])
def test_the_average_of_a_training_checkpoint_is_taken_as_timm_does(
    name: str, tmp_path: Path
) -> None:
    _, model = network()
    raw = model.encoder.state_dict()
    average = {k: v + 1 for k, v in raw.items()}
    torch.save({name: raw, f"{name}_ema": average}, tmp_path / "last.pth")
    found = load_pretrained(str(tmp_path / "last.pth"))
    assert torch.equal(found.encoder["cls_token"], average["cls_token"])
    assert timm.models.load_state_dict(str(tmp_path / "last.pth"))["cls_token"].equal(
        average["cls_token"]
    )


def test_the_cards_code_of_a_clip_gives_what_is_embedded(tmp_path: Path) -> None:
    shape, model = network(pre_norm=True, activation="quick_gelu")
    tensors = model.encoder.state_dict(), model.decoder.state_dict()
    export_mae(tmp_path, shape, *tensors, *NORM)
    codes = snippets.of(snippets.look(tmp_path))
    assert "found.pooler_output" in next(code for library, _, code in codes if library != "timm")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(one).view(-1, 1, 1) for one in NORM)
    with torch.no_grad():
        theirs = CLIPVisionModel.from_pretrained(tmp_path)((images / 255 - mean) / std)
    ours, _ = load(tmp_path).network.encoded({"images": images}, "cls")
    torch.testing.assert_close(theirs.pooler_output, ours, atol=1e-5, rtol=1e-5)


def test_heads_of_timm(tmp_path: Path) -> None:
    """CLIP's projection is no classifier; names may stand by number."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    for name, number in (("vit_base_patch16_clip_224.openai", 16), ("vit_base_patch16_224", 3)):
        more = sizes | {"num_classes": number}
        model = timm.create_model(name, **more)
        config = {"label_names": dict(enumerate(CLASSES))} if number == 3 else {}
        save_for_hf(model, tmp_path / name, model_config=config, model_args=more)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_eps": 1e-6}))
        assert load(tmp_path / name).classes == (CLASSES if number == 3 else [])


def test_a_models_file_is_its_folder(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "export", layer_scale=True)
    assert load(folder / "model.safetensors").classes == CLASSES
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge it into its base"):
        load(tmp_path / "adapter")
