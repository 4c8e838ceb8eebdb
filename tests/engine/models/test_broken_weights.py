"""Weights that are refused: faulty folders, pickles that would run code."""

import json
import os
import pickle
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertModel

from tests.engine.models.test_weights import config_of, refusal
from tests.kit import models as kit


class Evil:
    """Unpickling it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["zip", "plain", "bin"])
def test_pickle_that_would_run_code_is_refused(saved: Path, tmp_path: Path, where: str) -> None:
    trap = tmp_path / "ran"
    content = {"model": kit.fair_state(kit.hf_mae()), "evil": Evil(trap)}
    path = tmp_path / "mae.pth"
    if where == "zip":
        torch.save(content, path)
    elif where == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/config.json").write_text(json.dumps(config_of(saved)))
        torch.save(content, tmp_path / "folder/pytorch_model.bin")
        path = tmp_path / "folder"
    message = refusal(path)
    assert "refused" in message
    assert not trap.exists()
    # The trap is a real one.
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()


def broken(saved: Path, folder: Path, fault: str) -> Path:
    """A copy of the saved model with one fault."""
    config, state = config_of(saved), dict(load_file(saved / "model.safetensors"))
    query = "vit.encoder.layer.1.attention.attention.query.weight"
    if fault == "missing":
        del state["vit.layernorm.weight"]
    elif fault == "missing query":
        del state[query]
    elif fault == "missing in decoder":
        del state["decoder.decoder_pred.bias"]
    elif fault == "strange":
        state["vit.encoder.layer.0.lambda_1"] = torch.zeros(3)
    elif fault == "more blocks":
        config["num_hidden_layers"] = 1
    elif fault == "other width":
        config["intermediate_size"] = 100
    elif fault == "nan":
        state[query][0, 0] = torch.nan
    elif fault == "relu":
        config["hidden_act"] = "relu"
    elif fault == "words":
        config["hidden_size"] = "wide"
    elif fault == "oblong":
        config["image_size"] = [16, 32]
    kit.write_folder(folder, config, state)
    if fault == "truncated":
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
    elif fault == "no weights":
        (folder / "model.safetensors").unlink()
    elif fault == "broken json":
        (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("missing", "encoder lacks norm.weight"),
        ("missing query", "encoder lacks blocks.1.attn.qkv.weight"),
        ("missing in decoder", "decoder lacks pred.bias"),
        ("strange", "has vit.encoder.layer.0.lambda_1"),
        ("more blocks", "encoder has 2 blocks"),
        ("other width", "its configuration asks for (100"),
        ("nan", "holds NaN"),
        ("relu", "only gelu"),
        ("words", "hidden_size is 'wide'"),
        ("oblong", "its configuration asks for (1, 33"),
        ("truncated", "cannot be read"),
        ("no weights", "no weights"),
        ("broken json", "not valid JSON"),
    ],
)
def test_faulty_folders_are_named(saved: Path, tmp_path: Path, fault: str, says: str) -> None:
    assert says in refusal(broken(saved, tmp_path / "faulty", fault))


def test_foreign_things_are_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    bert.save_pretrained(tmp_path / "bert")
    assert "is a bert, none of the image encoders known here" in refusal(tmp_path / "bert")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    assert "no weights at" in refusal("nowhere/at/all")
    assert "no weights at" in refusal("runs/mae.pth")
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither .pth" in refusal(tmp_path / "notes.txt")
    (tmp_path / "short.pth").write_bytes(b"PK\x03\x04 broken")
    assert "no readable torch file" in refusal(tmp_path / "short.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    assert "epoch is no tensor" in refusal(tmp_path / "numbers.pth")
    torch.save(kit.hf_mae().state_dict(), tmp_path / "hf.pth")
    assert "config.json" in refusal(tmp_path / "hf.pth")
    assert "not a multiple of patch size" in refusal(saved, image_size=18)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "hub gives no model of that name" in refusal("nobody/no-such-model")
    assert "timm/vit_small_patch14_dinov2.lvd142m" in refusal(
        "timm:vit_small_patch14_dinov2.lvd142m"
    )
