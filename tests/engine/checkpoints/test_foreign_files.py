"""A run's folder that somebody else wrote: every file is looked through before it is used."""

import hashlib
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.checkpoint import Checkpoints, Reader
from selfdistill.engine.checkpoints.files import remove
from selfdistill.engine.checkpoints.folder import open_run, read_config
from selfdistill.engine.checkpoints.results import numbered, read_result
from selfdistill.engine.checkpoints.state import State
from selfdistill.engine.checkpoints.training_state import load_weights
from selfdistill.engine.config.options import load
from selfdistill.engine.monitoring.monitor import cut_metrics
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.launcher import compare
from tests.fuzz.run_targets import _PART, _RESULT, _STATE


def written(folder: Path, change: dict[str, Any], name: str = "step-00000004") -> str:
    """What is wrong with a checkpoint whose digest is right, and some of whose entries are not."""
    content = asdict(_STATE) | change
    state = State(**{k: v for k, v in content.items() if k in asdict(_STATE)})
    (folder / name).mkdir(exist_ok=True)
    digest = {"digest": state.content_digest()}
    (folder / name / "state.json").write_text(json.dumps(content | digest))
    one = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
    return Checkpoints(folder, one)._read_state(name)[1]


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        *(("step", value) for value in (-1, 1.5, "4", None, 2**53, True)),
        *(("position", value) for value in (-8, 1e30, math.nan, [8])),
        *(("world", value) for value in (0, 2**40, "1")),
        *(("files", value) for value in ([], {"x": 1}, {"../x": [1, "0" * 64]}, {_PART: [1]})),
        *(("files", {_PART: [size, "0" * 64]}) for size in (-1, 1.5, "1")),
        ("files", {_PART: [1, "../x"]}),
        *(("config", value) for value in ([], None, "x")),
        *(("optimizer", value) for value in ({}, {"step": -1}, {"step": 1, "scaler": {"x": "y"}})),
        *(("seconds", value) for value in (math.inf, -1, "1")),
        *(("last", value) for value in ([], {"loss": "low"})),
        *(("scored", value) for value in (-1, "x")),
        *(("curve", value) for value in ({"step": 1}, [1], [{"step": "x"}])),
        *(("manifest", value) for value in (None, 3)),
        ("more", 1),
    ],
)
def test_a_record_of_wrong_types_is_passed_over(tmp_path: Path, entry: str, value: Any) -> None:
    assert written(tmp_path, {}) == ""
    assert written(tmp_path, {entry: value}).startswith(f"state.json: {entry}")


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 10**5, '{"step": ' + "9" * 5000 + "}"])
def test_a_record_that_is_none(tmp_path: Path, content: str) -> None:
    written(tmp_path, {})
    place = tmp_path / "step-00000004" / "state.json"
    place.write_text(content)
    one = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
    state, fault = Checkpoints(tmp_path, one)._read_state(place.parent.name)
    assert state is None
    assert fault.startswith("state.json")


def test_another_version_is_told(tmp_path: Path) -> None:
    for version in ("2", 3, None, [2]):
        with pytest.raises(UserError, match="has format version"):
            written(tmp_path, {"version": version})


def test_folders_that_are_no_steps(tmp_path: Path) -> None:
    for name in ("step-²", "step--1", "step-x", "step-1e3", "step-" + "9" * 200):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000003").write_text("a file")
    (tmp_path / "step-00000012").mkdir()
    (tmp_path / "step-00000004").mkdir()
    assert list(numbered(tmp_path, "step-")) == [4, 12]


def test_parts_and_drafts_that_are_no_files(tmp_path: Path, ranks: Ranks) -> None:
    """A pipe nobody writes into; a link in a draft's place, which leads to somebody's folder."""
    empty = hashlib.sha256(b"").hexdigest()
    written(tmp_path, {"files": {_PART: [0, empty]}})
    os.mkfifo(tmp_path / "step-00000004" / _PART)
    with pytest.raises(UserError, match="none of 1 checkpoints is whole"):
        Checkpoints(tmp_path, ranks).newest()
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious").touch()
    (tmp_path / ".draft-step-00000001").symlink_to(victim)
    remove(tmp_path / ".draft-step-00000001")
    assert (victim / "precious").exists()
    assert not (tmp_path / ".draft-step-00000001").is_symlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="is no regular file"):
        cut_metrics(tmp_path / "metrics.jsonl", 2)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    """Copying would stretch [1] over a whole matrix without a word."""
    module = torch.nn.Linear(3, 2)
    whole = {f"fp32/{name}": p.detach().clone() for name, p in module.named_parameters()}
    for name, tensor in (
        ("fp32/bias", torch.ones(1)),
        ("fp32/weight", torch.ones(3, 2)),
        ("fp32/bias", torch.ones(2, dtype=torch.float64)),
    ):
        save_file(whole | {name: tensor}, tmp_path / _PART)
        with pytest.raises(UserError, match=rf"the checkpoint's {name.partition('/')[2]} is"):
            load_weights(torch.nn.Linear(3, 2), Reader(tmp_path, _STATE))
    save_file(whole, tmp_path / _PART)
    load_weights(loaded := torch.nn.Linear(3, 2), Reader(tmp_path, _STATE))
    assert torch.equal(loaded.weight, module.weight)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], "is no JSON object"),
        ({}, "seconds: Field required"),
        (_RESULT | {"seconds": "1"}, "seconds"),
        (_RESULT | {"metrics": {"test_accuracy": "high"}}, "metrics.test_accuracy"),
        (_RESULT | {"n": 0}, "n: "),
        (_RESULT | {"seed": -1}, "seed"),
        (_RESULT | {"model": {"path": "x", "sha256": "y"}}, "model.sha256"),
        (_RESULT | {"model": 3}, "model"),
        (_RESULT | {"record": []}, "record"),
    ],
)
def test_results(tmp_path: Path, content: Any, says: str) -> None:
    (tmp_path / "finetune").mkdir()
    path = tmp_path / "finetune" / "result.json"
    path.write_text(json.dumps(_RESULT))
    assert read_result(path) == _RESULT
    assert compare.rows(tmp_path)[0].mean == 0.25
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"result\.json.*{says}.*delete it"):
        read_result(path)
    with pytest.raises(UserError, match=r"result\.json"):
        compare.rows(tmp_path)


def test_configurations_of_earlier_launches(tmp_path: Path, ranks: Ranks) -> None:
    assert read_config(tmp_path / "none.toml") == {}
    for content in ("model = 5", "[model]\npath = 5", "precision = 1", "pretrain = []", "x = ["):
        (tmp_path / "config.toml").write_text(content)
        with pytest.raises(UserError, match=r"config\.toml.*mend it, or delete it"):
            open_run(load({"output": str(tmp_path), "watchdog": 0}), ranks)
    (tmp_path / "config.toml").write_text("a = " + "[" * 300 + "]" * 300)
    with pytest.raises(UserError, match="nested too deeply"):
        read_config(tmp_path / "config.toml")


def test_lines_of_metrics_that_nobody_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "loss": 0.5}\n'
    for line in ("[" * 10**5, '{"step": "x"}', '{"loss": 1}', '{"step": NaN}', "3", '{"step": []}'):
        path.write_text(f"{whole}{line}\n")
        cut_metrics(path, 2)
        assert path.read_text() == whole, line


def test_numbers_and_depth_have_bounds() -> None:
    assert records.from_json('{"a": [1]}', "x") == {"a": [1]}
    for content in ('"\\ud800"', "[" * 65 + "]" * 65, "1" * 5000, b"\xff", "{"):
        with pytest.raises(UserError, match=r"^x: not valid JSON"):
            records.from_json(content, "x")
    assert records.from_json("[" * 64 + "]" * 64, "x")
    with pytest.raises(UserError, match="below 2"):
        load({"pretrain.steps": 2**53})
    with pytest.raises(UserError, match="finite"):
        load({"pretrain.lr": math.inf})
