"""Readers of run folders, recipes and command lines."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save

from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.data.index import index
from selfdistill.data.pack import pack
from selfdistill.data.records import read_lines
from selfdistill.data.verify import verify
from selfdistill.engine.checkpoints.checkpoint import Checkpoints, Reader
from selfdistill.engine.checkpoints.folder import read_config
from selfdistill.engine.checkpoints.results import read_result
from selfdistill.engine.checkpoints.state import State
from selfdistill.engine.checkpoints.training_state import load_weights
from selfdistill.engine.config import options
from selfdistill.engine.monitoring.monitor import cut_metrics
from selfdistill.engine.runtime import zero
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.experiments.spec import Method, Profile, Specs, Table
from selfdistill.experiments.state import Sweep
from selfdistill.launcher import compare
from tests.fuzz.harness import Target
from tests.fuzz.inputs import documents, edited

_ONE = Ranks(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
_PART = "part-00000-of-00001.safetensors"
_MODULE = torch.nn.Linear(3, 2)
_WEIGHTS = save({f"fp32/{k}": v.detach() for k, v in _MODULE.named_parameters()})
_STATE = State(
    step=4,
    position=32,
    config={"distill.steps": 8, "seed": 0},
    manifest="0" * 64,
    world=1,
    files={_PART: [len(_WEIGHTS), "0" * 64]},
    optimizer={"step": 4, "scaler": {"cur_scale": 2.0}},
    last={"loss/total": 0.5},
    seconds=1.5,
)
_RESULT = {
    "stage": "finetune",
    "steps": 8,
    "seed": 0,
    "n": 2,
    "metric": "accuracy",
    "metrics": {"val_accuracy": 0.5, "test_accuracy": 0.25},
    "std": {"test_accuracy": 0.1},
    "seconds": 1.5,
    "model": {"path": "base", "sha256": "0" * 64},
    "manifest": "0" * 64,
    "record": {"finetune.steps": 8},
}
_METRICS = [{"step": 1, "loss/total": 0.5}, {"step": 2, "val/accuracy": 0.5}]
_CONFIG = options.load({}).toml().encode()
_SWEEP = {
    "profile": "small",
    "data_root": "shards",
    "specs": None,
    "asked": [{"table": "table1", "datasets": ["flowers"], "only": [], "seeds": 3}],
}
_ZERO = {
    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "bucket": 5e8},
    "zero_allow_untested_optimizer": True,
}
_SPEC = b'title = "x"\nstages = ["finetune"]\n[options]\n"finetune.lr" = 0.1\n'
_WORDS = [
    ["--stage", "distill", "--recipe", "paper_vision", "--data", "x", "--distill.steps", "100"],
    ["--finetune.lr", "1e-3", "--mae.ratio=0.5", "--compile", "--nooverwrite", "--zero", "zero2"],
    ["src", "out", "--size", "64", "--splits", "0.8,0.1,0.1", "--unlabelled", "--seed", "3"],
]


def _words(content: bytes) -> list[str]:
    """A command line, a word a line; none of a process has a NUL."""
    return content.replace(b"\0", b"").decode("utf-8", "surrogateescape").split("\n")


def read_state(signed: bool, content: bytes, folder: Path) -> None:
    """state.json, as it is or with a digest that is right; then the weights it names."""
    place = folder / "step-00000004"
    place.mkdir(exist_ok=True)
    if signed:
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            value = json.loads(content)
            value["digest"] = State(**value).content_digest()
            content = json.dumps(value).encode()
    (place / "state.json").write_bytes(content)
    (place / _PART).write_bytes(_WEIGHTS)
    state, fault = Checkpoints(folder, _ONE)._read_state(place.name)
    assert (state is None) == bool(fault)
    if state is not None:
        load_weights(torch.nn.Linear(3, 2), Reader(place, state))


def read_part(content: bytes, folder: Path) -> None:
    """The tensors of a checkpoint."""
    (folder / _PART).write_bytes(content)
    load_weights(torch.nn.Linear(3, 2), Reader(folder, _STATE))


def read_results(content: bytes, folder: Path) -> None:
    """result.json, and the table made of it."""
    for stage in ("pretrain", "finetune", "finetune-distill-1"):
        (folder / stage).mkdir(exist_ok=True)
        (folder / stage / "result.json").write_bytes(content)
    read_result(folder / "finetune" / "result.json")
    with contextlib.redirect_stdout(io.StringIO()):
        compare.show(folder)


def read_written(content: bytes, folder: Path) -> None:
    """config.toml of an earlier launch."""
    (folder / "config.toml").write_bytes(content)
    read_config(folder / "config.toml")


def read_metrics(content: bytes, folder: Path) -> None:
    """metrics.jsonl of an earlier launch."""
    path = folder / "metrics.jsonl"
    path.write_bytes(content)
    cut_metrics(path, 2)
    assert all(record["step"] < 2 for record in read_lines(path))


def read_recipe(content: bytes, folder: Path) -> None:
    """A recipe."""
    (folder / "x.toml").write_bytes(content)
    options.load({"recipe": str(folder / "x.toml")}).toml()


def read_spec(content: bytes, folder: Path) -> None:
    """Specs of experiments of one's own."""
    for kind, part in ((Method, "methods"), (Table, "tables"), (Profile, "profiles")):
        (folder / part).mkdir(exist_ok=True)
        (folder / part / "x.toml").write_bytes(content)
        with contextlib.suppress(UserError):
            Specs(folder).load(kind, "x")


def read_sweep(content: bytes, folder: Path) -> None:
    """The record of a sweep."""
    (folder / "sweep.json").write_bytes(content)
    Sweep.open(folder)


def read_zero(content: bytes, folder: Path) -> None:
    """A DeepSpeed configuration."""
    (folder / "x.json").write_bytes(content)
    zero.stage_of(zero.read(str(folder / "x.json")))


def read_options(content: bytes, folder: Path) -> None:
    """The command line of engine/run.py."""
    options.load(options.parse(_words(content))).toml()


def _without_body(function: Callable[..., None]) -> Callable[..., None]:
    def nothing(*args: Any, **kwargs: Any) -> None:
        """Does nothing."""

    # inspect looks for it on functions, whose type does not know it.
    nothing.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return nothing


def read_arguments(content: bytes, folder: Path) -> None:
    """The command lines of the data commands, without what they do."""
    for function in (pack, index, verify):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code: object = 0
            try:
                cli.run(_without_body(function), _words(content))
            except SystemExit as ended:
                code = ended.code
        assert code in (0, 2)
        if code == 2:
            assert err.getvalue().startswith("error: "), err.getvalue()
            assert err.getvalue().count("\n") == 1, err.getvalue()


def _lines(values: list[Any]) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def _ended(content: bytes) -> bytes:
    return content + b"\n"


_LINES = edited([_lines(_METRICS)])
_ANY_WORDS = edited(["\n".join(words).encode() for words in _WORDS])
_TOML = [path.read_bytes() for path in sorted(options.RECIPES.glob("*.toml"))]

TARGETS = [
    Target("state", functools.partial(read_state, False), documents([asdict(_STATE)])),
    Target("signed_state", functools.partial(read_state, True), documents([asdict(_STATE)])),
    Target("part", read_part, edited([_WEIGHTS])),
    Target("result", read_results, documents([_RESULT])),
    Target("config", read_written, edited([_CONFIG])),
    Target(
        "metrics", read_metrics, st.one_of(_LINES, documents(_METRICS).map(lambda b: b + b"\n"))
    ),
    Target("recipe", read_recipe, edited([_CONFIG, *_TOML])),
    Target("spec", read_spec, edited([_SPEC])),
    Target("sweep", read_sweep, documents([_SWEEP])),
    Target("zero", read_zero, documents([_ZERO])),
    Target("options", read_options, _ANY_WORDS),
    Target("arguments", read_arguments, _ANY_WORDS),
]
