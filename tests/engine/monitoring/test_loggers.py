"""Figures go to TensorBoard, and to other programs that are installed here, in their offline mode.

`make test` has TensorBoard alone; with `pip install wandb mlflow trackio` these tests run for each.
"""

import importlib.util
import json
import sqlite3
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration
from selfdistill.engine.config.schema import LOGGERS
from selfdistill.engine.monitoring import loggers
from selfdistill.engine.monitoring.loggers.base import Place
from selfdistill.engine.monitoring.monitor import Monitor
from tests.kit.launches import metrics, read_events

INSTALLED = [name for name in LOGGERS if importlib.util.find_spec(name)]
ABSENT = [name for name in LOGGERS if name not in INSTALLED]


def stage(folder: Path, names: list[str], start: int = 0) -> None:
    """Three steps of a stage, or two more."""
    options: dict[str, Any] = {"steps": 5, "samples_per_step": 4, "log_every": 1, "quiet": True}
    with Monitor(
        folder, enabled=True, stage="finetune/seed-0", start=start, loggers=names, **options
    ) as monitor:
        monitor.text("config", "```toml\nseed = 0\n```")
        for step in range(start + 1, 4 if not start else 6):
            monitor.log(step, {"loss/loss": 1 / step, "speed/odd": float("nan")})
        monitor.image(step, "picture", np.full((3, 4, 6), 7, np.uint8))
        if start:
            monitor.hparams({"seed": 0, "mae": {"ratio": 0.75}}, {"test/accuracy": 0.5})


def in_tensorboard(folder: Path) -> dict[int, float]:
    return dict(read_events(folder).scalars["loss/loss"])


def in_mlflow(folder: Path) -> dict[int, float]:
    from mlflow import MlflowClient

    client, (run,) = MlflowClient(), MlflowClient().search_runs(["1"])
    assert run.info.run_name == "run/finetune/seed-0"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "0", "mae.ratio": "0.75"}
    assert run.data.metrics["test/accuracy"] == 0.5
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"config", "picture"}
    return {m.step: m.value for m in client.get_metric_history(run.info.run_id, "loss/loss")}


def in_wandb(folder: Path) -> dict[int, float]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[int, float] = {}
    config: dict[str, Any] = {}
    logs = sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(logs) == 2
    assert len({path.name for path in logs}) == 1  # one run, in two parts
    for path in logs:
        for data in leveldb_log(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            row = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "loss/loss" in row:
                found[int(row["_step"])] = json.loads(row["loss/loss"])
            config |= {i.key: json.loads(i.value_json) for i in record.config.update}
    assert config["mae.ratio"] == 0.75
    return found


def leveldb_log(data: bytes) -> Iterator[bytes]:
    """Records of LevelDB's log format: checksum, length and kind (1 whole, 4 last) before each."""
    at, whole = 7, b""  # W&B's mark
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # no header is cut by a block's end
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield whole
            whole = b""


def in_trackio(folder: Path) -> dict[int, float]:
    (database,) = folder.parents[2].glob("trackio/*.db")
    with sqlite3.connect(database) as opened:
        rows = opened.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert rows[0][0].startswith("run/finetune/seed-0 ")
    values = [(step, json.loads(text)) for _, step, text in rows]
    assert any(found.get("test/accuracy") == 0.5 for _, found in values)
    return {step: found["loss/loss"] for step, found in values if "loss/loss" in found}


READERS: dict[str, Callable[[Path], dict[int, float]]] = {
    "tensorboard": in_tensorboard,
    "mlflow": in_mlflow,
    "wandb": in_wandb,
    "trackio": in_trackio,
}


@pytest.mark.parametrize("name", INSTALLED)
def test_a_stage_in_two_launches(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps are there, under one name."""
    folder = tmp_path / "run" / "finetune" / "seed-0"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(tmp_path)
    stage(folder, [name])
    # TensorBoard orders files by second, then by a count without leading zeros: 10 before 9.
    time.sleep(1)
    stage(folder, [name], start=3)
    wanted = {step: pytest.approx(1 / step, rel=1e-6) for step in range(1, 6)}
    assert READERS[name](folder) == wanted
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5]
    assert list(folder.glob("events.*")) == [] or name == "tensorboard"


def test_a_logger_that_fails_stops_nothing(tmp_path: Path, capsys: Any) -> None:
    calls = []

    class Failing:
        def scalars(self, step: int, values: Any) -> None:
            calls.append(step)
            raise ConnectionError("no route\nto host")

    guarded = loggers.Guarded("wandb", Failing)  # type: ignore[arg-type]  # it has no more
    guarded.scalars(1, {"a": 1.0})
    guarded.scalars(2, {"a": 1.0})
    guarded.text(2, "a", "b")
    guarded.close()
    assert calls == [1]
    said = capsys.readouterr().out
    assert said.count("warning: --logger wandb: no route to host: nothing more of this stage") == 1

    def refuse() -> Any:
        raise ValueError("no key")

    loggers.Guarded("mlflow", refuse).image(1, "a", np.zeros((3, 2, 2), np.uint8))
    assert "warning: --logger mlflow: no key" in capsys.readouterr().out


def test_names() -> None:
    found = configuration.load({"logger": ("tensorboard",)})
    assert found.loggers == ["tensorboard"]
    with pytest.raises(UserError, match=r"logger.*tensorboard, trackio, wandb, mlflow, each once"):
        configuration.load({"logger": "tensorbored"})
    with pytest.raises(UserError, match="each once"):
        configuration.load({"logger": "tensorboard,tensorboard"})
    for name in ABSENT:
        with pytest.raises(UserError, match=f"{name} is not installed: pip install {name}"):
            configuration.load({"logger": f"tensorboard,{name}"})


def test_ids_are_a_stages_own(tmp_path: Path) -> None:
    place = Place(tmp_path / "run" / "pretrain", "pretrain", 0)
    place.folder.mkdir(parents=True)
    first = place.id_of("wandb")
    assert place.id_of("wandb") == first
    assert place.id_of("trackio") != first
    assert place.known("mlflow") is None
    assert place.run == "run"
    assert Place(tmp_path / "run" / "a" / "seed-1", "a/seed-1", 0).run == "run"
