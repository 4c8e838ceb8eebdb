"""Models of strangers: sizes that no memory holds, weights that are none, tokenizers that break."""

import json
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from selfdistill.data.errors import UserError
from selfdistill.engine.models.source import read_torch
from selfdistill.engine.models.texts.weights import load_language
from tests.engine.models.test_weights import config_of, refusal
from tests.fuzz.model_targets import bert
from tests.kit import models as kit


@pytest.fixture(autouse=True)
def _quick_and_small() -> Iterator[None]:
    """Each refusal comes before what it refuses is made."""
    began = time.process_time()  # other tests run beside this one, and the first one imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB: a GiB


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("num_hidden_layers", 10**7, "depth is 10000000"),
        ("num_hidden_layers", 1000, "encoder has 2 blocks, its configuration asks for 1000"),
        ("num_hidden_layers", 1.5, "num_hidden_layers is 1.5"),
        ("decoder_num_hidden_layers", 1000, "decoder has 2 blocks, its configuration asks for"),
        ("hidden_size", 2**16, "its configuration asks for"),
        ("hidden_size", 2**40, "width is 1099511627776"),
        ("intermediate_size", 2**18, "its configuration asks for"),
        ("decoder_hidden_size", float("inf"), "decoder_hidden_size is inf"),
        ("decoder_hidden_size", "64", "decoder_hidden_size is '64'"),
        ("patch_size", 0, "patch_size is 0"),
        ("patch_size", -4, "patch_size is -4"),
        ("image_size", [64, {}], "not one or two whole numbers"),
        ("image_size", 2**30, "image_size is 1073741824"),
        ("image_size", [64, 2**30], "image_size is 1073741824"),
        ("patch_size", [4, 8], "patch_size is [4, 8] in config.json, not a whole number"),
        ("mask_ratio", float("nan"), "mask_ratio is nan"),
        ("layer_norm_eps", 1e30, "norm_eps is 1e+30"),
        ("norm_pix_loss", "yes", "norm_pix_loss"),
    ],
)
def test_sizes_are_compared_with_the_weights(
    saved: Path, tmp_path: Path, entry: str, value: Any, says: str
) -> None:
    weights = dict(load_file(saved / "model.safetensors"))
    kit.write_folder(tmp_path / "x", config_of(saved) | {entry: value}, weights)
    assert says in refusal(tmp_path / "x")


@pytest.mark.parametrize(
    ("processor", "says"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, "is not one positive number for each of 3 channels"),
        ({"image_std": 0}, "is not one positive number"),
        ({"image_std": [1e-320] * 3}, "is not one positive number"),
        ({"image_mean": [1e308] * 3}, "is not one number"),
        ({"image_mean": "0.5"}, "image_mean"),
        ({"image_mean": [0.5]}, "is not one number for each of 3 channels"),
        ({"image_mean": [float("nan")] * 3}, "finite"),
        ({"do_normalize": "no"}, "do_normalize"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": 1e308}, "is not one positive number"),
        ([], "is no JSON object"),
    ],
)
def test_processors_are_looked_through(
    saved: Path, tmp_path: Path, processor: Any, says: str
) -> None:
    weights = dict(load_file(saved / "model.safetensors"))
    kit.write_folder(tmp_path / "x", config_of(saved), weights)
    (tmp_path / "x" / "preprocessor_config.json").write_text(json.dumps(processor))
    assert says in refusal(tmp_path / "x")


def test_a_decoder_out_of_all_proportion(saved: Path, tmp_path: Path) -> None:
    """Of weights without a decoder nothing says how large it may be, but the encoder."""
    state = load_file(saved / "model.safetensors")
    encoder = {k: v for k, v in state.items() if not k.startswith("decoder.")}
    huge = {"decoder_hidden_size": 2**16, "decoder_num_hidden_layers": 1024}
    kit.write_folder(tmp_path / "x", config_of(saved) | huge, encoder)
    assert "describes a decoder of" in refusal(tmp_path / "x")


def test_tensors_that_say_more_than_their_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, path)
    with pytest.raises(UserError, match="are said to have 4,000,000,000,000 bytes"):
        read_torch(path)
    torch.save({"a": torch.zeros(3).to_sparse()}, path)
    with pytest.raises(UserError, match="a is no plain table of floating-point numbers"):
        read_torch(path)
    torch.save({"a": torch.zeros(2**20)}, path)
    small = tmp_path / "small.pth"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(UserError, match="is no readable torch file"):
        read_torch(small)


def test_a_pickle_of_bytes_of_any_number(tmp_path: Path) -> None:
    """A hundred bytes that ask for gigabytes, before a tensor is met."""
    kind = b"cbuiltins\nbytearray\n"
    number = kind + b"J" + (2**30).to_bytes(4, "little") + b"\x85R"
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2)]
    parts += [pickle.dumps({"little_endian": True}, 2)]
    parts += [b"\x80\x02}X\x01\x00\x00\x00a" + kind + number + b"\x85Rs.", pickle.dumps([], 2)]
    (tmp_path / "x.pth").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match="is no readable torch file"):
        read_torch(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architecture": "resnet18", "model_args": {"layers": [10**6] * 4}}, "not a plain ViT"),
        ({"architecture": "vit_tiny_patch16_224", "model_args": {"depth": 1024}}, "depth is 1024"),
        ({"architecture": 3}, "architecture"),
    ],
)
def test_timms_arguments(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"blocks.0.norm1.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    assert says in refusal(tmp_path)


def test_weights_that_are_no_files(saved: Path, tmp_path: Path) -> None:
    """Nobody writes into the pipe: opening it would wait for ever."""
    for name in ("x.pth", "x.safetensors"):
        os.mkfifo(tmp_path / name)
        assert "no regular file" in refusal(tmp_path / name)
    kit.write_folder(tmp_path / "x", config_of(saved), dict(kit.hf_mae().state_dict()))
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "x" / name).unlink()
        os.mkfifo(tmp_path / "x" / name)
        assert "no regular file" in refusal(tmp_path / "x")


@pytest.mark.parametrize(
    "places", [None, 3, [], {"a": 3}, {"a": "../one.safetensors"}, {"a": "\0"}, {"a": "none"}]
)
def test_an_index_names_files_beside_it(saved: Path, tmp_path: Path, places: Any) -> None:
    kit.write_folder(tmp_path / "x", config_of(saved), {})
    (tmp_path / "x" / "model.safetensors").unlink()
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    index = tmp_path / "x" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert "model.safetensors.index.json" in refusal(tmp_path / "x")


def test_names_of_blocks_that_are_none(tmp_path: Path) -> None:
    state = kit.fair_state(kit.hf_mae())
    for name in ("blocks.x.norm1.weight", "blocks.99999999.norm1.weight"):
        torch.save({"model": state | {name: torch.zeros(3)}}, tmp_path / "x.pth")
        assert name in refusal(tmp_path / "x.pth")
    for name, shape in (("patch_embed.proj.weight", (8, 8)), ("pos_embed", (9,))):
        torch.save({"model": state | {name: torch.zeros(shape)}}, tmp_path / "x.pth")
        assert "dimensions are wanted" in refusal(tmp_path / "x.pth")


def _text(tmp_path: Path, name: str, content: bytes | dict[str, Any]) -> str:
    """What a language model's folder with one other file gives."""
    for path in bert().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if isinstance(content, dict):
        content = json.dumps(json.loads((bert() / name).read_text()) | content).encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_language(str(tmp_path))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
        ("config.json", {"num_hidden_layers": 1000, "hidden_size": 512}, "its files have"),
        ("config.json", {"vocab_size": 2**25}, "its files have"),
        ("config.json", {"num_labels": 2**26}, "num_labels is 67108864"),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "is quantised"),
        ("config.json", {"hidden_size": "8"}, "cannot be loaded"),
        ("config.json", b"[" * 10**5, "not valid JSON (nested too deeply)"),
        ("model.safetensors", b"\xff" * 9999, "cannot be loaded"),
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"[" * 10**5, "nested too deeply"),
    ],
)
def test_language_models(
    tmp_path: Path, name: str, content: bytes | dict[str, Any], says: str
) -> None:
    assert says in _text(tmp_path, name, content)


def test_a_tokenizer_that_makes_much_of_little(tmp_path: Path) -> None:
    """Forty times two for one."""
    settings = json.loads((bert() / "tokenizer.json").read_text())
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    settings["normalizer"] = {"type": "Sequence", "normalizers": [twice] * 40}
    content = json.dumps(settings).encode()
    assert "replaces letters by up to 1e+12" in _text(tmp_path, "tokenizer.json", content)


def test_a_tokenizer_with_a_broken_expression(tmp_path: Path) -> None:
    settings = json.loads((bert() / "tokenizer.json").read_text())
    settings["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "("}
    content = json.dumps(settings).encode()
    assert "tokenizer that can be read" in _text(tmp_path, "tokenizer.json", content)


def test_pickled_language_models_run_nothing(tmp_path: Path) -> None:
    from tests.engine.models.test_broken_weights import Evil

    for path in bert().iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "model.safetensors").unlink()
    trap = tmp_path / "ran"
    torch.save({"evil": Evil(trap)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_language(str(tmp_path))
    assert not trap.exists()
