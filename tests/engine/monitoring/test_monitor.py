"""What a run leaves behind and shows, read back with TensorBoard's own reader."""

import io
import json
import math
import os
import pty
import re
import select
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from selfdistill.data.errors import UserError
from selfdistill.engine.monitoring.monitor import METRICS, Meter, Monitor, cut_metrics, read_metrics
from selfdistill.launcher import compare, quickstart


def make(folder: Path, **options: Any) -> Monitor:
    settings: dict[str, Any] = {
        "enabled": True,
        "stage": "pretrain",
        "steps": 20,
        "samples_per_step": 8,
        "log_every": 5,
        "quiet": True,
    }
    return Monitor(folder, **(settings | options))


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}).Reload()


def steps_of(folder: Path, tag: str) -> list[int]:
    return [event.step for event in events(folder).Scalars(tag)]


def strict(path: Path) -> list[dict[str, Any]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_scalars_reach_tensorboard_and_metrics(tmp_path: Path) -> None:
    before = time.time()
    with make(tmp_path) as monitor:
        monitor.log(1, {"loss/mae": 0.5, "optimizer/learning_rate": 1e-4})
        monitor.log(2, {"loss/mae": 0.25})
        # Before the files are closed: a run that is killed has lost nothing.
        assert steps_of(tmp_path, "loss/mae") == [1, 2]
        records = strict(tmp_path / METRICS)
    assert [r["step"] for r in records] == [1, 2]
    assert [r["loss/mae"] for r in records] == [0.5, 0.25]
    assert records[0]["optimizer/learning_rate"] == 1e-4
    assert all(before - 1 <= r["time"] <= time.time() for r in records)
    values = [event.value for event in events(tmp_path).Scalars("loss/mae")]
    assert values == [0.5, 0.25]


def test_json_stays_strict_when_a_loss_is_not_finite(tmp_path: Path) -> None:
    with make(tmp_path) as monitor:
        monitor.log(1, {"a": math.nan, "b": math.inf, "c": torch.tensor(2.0)})
    record = strict(tmp_path / METRICS)[0]
    assert record["a"] is None
    assert record["b"] is None
    assert record["c"] == 2.0
    assert math.isnan(events(tmp_path).Scalars("a")[0].value)


@pytest.mark.parametrize("start", [0, 4, 6])
def test_resumed_run_has_each_step_once(tmp_path: Path, start: int) -> None:
    first = make(tmp_path)
    first.text("config", "first")
    for step in range(1, 8):
        first.log(step, {"loss": float(step)})
        first.image(step, "picture", np.zeros((3, 4, 4), np.uint8))
    del first  # killed: never closed
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 8, "ti')  # and in the middle of a line
    # TensorBoard reads a folder's files by name: the second of their start, then, within one
    # process, a counter as text, "10" before "9". Two launches never share a second.
    started = int(time.time())
    while int(time.time()) == started:
        time.sleep(0.01)

    with make(tmp_path, start=start) as second:
        for step in range(start + 1, 11):
            second.log(step, {"loss": 100.0 + step})
            second.image(step, "picture", np.zeros((3, 4, 4), np.uint8))
    expected = [float(s) if s <= start else 100.0 + s for s in range(1, 11)]
    records = strict(tmp_path / METRICS)
    assert [r["step"] for r in records] == list(range(1, 11))
    assert [r["loss"] for r in records] == expected
    seen = events(tmp_path)
    assert [e.step for e in seen.Scalars("loss")] == list(range(1, 11))
    assert [e.value for e in seen.Scalars("loss")] == expected
    assert [e.step for e in seen.Images("picture")] == list(range(1, 11))


def test_cutting_keeps_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    cut_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n{"step": 3}\n{"step": 2}')
    assert [r["step"] for r in read_metrics(path)] == [1, 3]
    cut_metrics(path, 3)
    assert path.read_text() == '{"step": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = make(tmp_path / "run", enabled=False, quiet=False)
    monitor.log(1, {"loss": 1.0})
    monitor.image(1, "picture", np.zeros((3, 4, 4), np.uint8))
    monitor.text("config", "x")
    monitor.confusion(1, np.eye(2, dtype=np.int64), ["a", "b"])
    monitor.hparams({"lr": 1.0}, {"accuracy": 1.0})
    monitor.progress(5, {"loss": 1.0})
    monitor.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_pictures_and_texts_come_back_as_they_were(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (3, 6, 9), dtype=np.uint8)
    with make(tmp_path) as monitor:
        monitor.image(7, "reconstruction", torch.from_numpy(picture))
        monitor.text("config", "lr = 1")
        monitor.confusion(9, np.array([[3, 1], [0, 4]]), ["cat", "dog"])
    seen = events(tmp_path)
    event = seen.Images("reconstruction")[0]
    assert event.step == 7
    found = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    np.testing.assert_array_equal(found, picture.transpose(1, 2, 0))
    assert seen.Images("confusion")[0].step == 9
    text = seen.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert text == b"lr = 1"


def test_hparams_stand_in_the_run_itself(tmp_path: Path) -> None:
    config = {
        "distill": {"lr": 1.5e-4, "steps": 20},
        "flip": True,
        "teacher": None,
        "betas": (0.9, 0.95),
    }
    with make(tmp_path) as monitor:
        monitor.log(20, {"test/accuracy": 0.75})
        monitor.hparams(config, {"test/accuracy": 0.75, "test/loss": 1.25, "final/loss": math.nan})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    seen = events(tmp_path)
    contents = seen.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(contents[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["distill.lr"].number_value == 1.5e-4
    assert start.hparams["distill.steps"].number_value == 20
    assert start.hparams["flip"].string_value == "true"
    assert start.hparams["teacher"].string_value == "none"
    assert start.hparams["betas"].string_value == "(0.9, 0.95)"
    end = plugin_data_pb2.HParamsPluginData.FromString(contents[metadata.SESSION_END_INFO_TAG])
    assert end.HasField("session_end_info")
    # Once, though the run had logged it already; and what it had not logged is there too.
    assert [(e.step, e.value) for e in seen.Scalars("test/accuracy")] == [(20, 0.75)]
    assert [(e.step, e.value) for e in seen.Scalars("test/loss")] == [(20, 1.25)]
    assert "final/loss" not in seen.Tags()["scalars"]


def test_plain_lines_where_stdout_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = make(tmp_path, quiet=False, stage="distill-1")
    for step in range(1, 13):
        time.sleep(0.002)
        monitor.progress(step, {"mae": 0.5, "distill": 12.3456} if step % 5 == 0 else None)
    monitor.progress(20, None)
    monitor.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["distill-1", f"{step}/20"] for step in (1, 5, 10, 20)
    ]
    pattern = r"distill-1 10/20  50.0%  mae 0.5 distill 12.35  [\d.]+ images/s  0:00:0\d left"
    assert re.fullmatch(pattern, lines[2])


def test_one_live_line_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = pty.openpty()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr("sys.stdout", terminal)
        with make(tmp_path, quiet=False) as monitor:
            monitor.progress(1, {"mae": 0.875})
            time.sleep(0.25)
            monitor.progress(10, {"mae": 0.5})
            monitor.progress(20, None)
        # The kernel hands it over in pieces, and when it has time.
        shown, patience = b"", 5.0
        while select.select([outer], [], [], patience)[0]:
            shown, patience = shown + os.read(outer, 1 << 16), 1.0
        assert shown, "nothing on the terminal"
    os.close(outer)
    for part in ("pretrain", "10/20", "50.0%", "mae 0.5", "images/s", "left", "20/20"):
        assert part in shown.decode()
    # Drawn over, never scrolled: one line feed, at the end.
    assert shown.count(b"\n") == 1


def test_quiet_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with make(tmp_path, quiet=True) as monitor:
        monitor.progress(5, {"loss": 1.0})
    assert capsys.readouterr().out == ""


def test_meter_measures_steps_waits_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]  # a clock of its own: sleeps end late, on a machine at work by any time
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr("selfdistill.engine.monitoring.monitor.time", clock)
    meter = Meter(peak_flops=1e9)
    for _ in range(4):
        with meter.waiting():
            now[0] += 0.03
        now[0] += 0.01
        meter.step(10, 1e7)
    with meter.paused():
        now[0] += 0.3
    figures = meter.rates()
    assert figures["speed/step_seconds"] == pytest.approx(0.04)
    rate = figures["speed/images_per_second"]
    assert rate == pytest.approx(10 / figures["speed/step_seconds"])
    assert figures["speed/mfu_percent"] == pytest.approx(100 * rate * 1e6 / 1e9)
    assert figures["speed/data_wait_percent"] == pytest.approx(75)
    # Nothing of that interval is in the next one.
    now[0] += 0.01
    meter.step(10)
    assert meter.rates()["speed/step_seconds"] == pytest.approx(0.01)


def test_meter_leaves_out_what_is_not_known() -> None:
    meter = Meter(unit="tokens")
    assert not [name for name in meter.rates() if name.startswith("speed/")]
    meter.step(10, 1e6)
    figures = meter.rates()
    assert "speed/mfu_percent" not in figures
    assert "speed/tokens_per_second" in figures


def test_memory_grows_with_what_is_held() -> None:
    cuda = torch.cuda.is_available()
    name = "memory/cuda_peak_gib" if cuda else "memory/rss_gib"
    meter = Meter()
    before = meter.rates()[name]
    held = torch.ones(2**28, device="cuda" if cuda else "cpu")  # 1 GiB, touched
    grown = meter.rates()[name] - before
    assert held[0] == 1
    assert 0.7 < grown < 1.1  # the system may take pages of files from a process meanwhile


def result(run: Path, stage: str, seconds: float) -> None:
    (run / stage).mkdir(parents=True)
    found = {"metrics": {"test_accuracy": 0.5}, "seconds": seconds}
    (run / stage / "result.json").write_text(json.dumps(found))


def test_table_of_a_run_names_the_unit_of_its_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result(tmp_path / "short", "finetune-model", 9.4)
    compare.show(tmp_path / "short")
    table = capsys.readouterr().out
    assert "wall time (m:s)" in table
    assert re.search(r" 0:09 ", table)
    result(tmp_path / "long", "finetune-model", 9.4)
    result(tmp_path / "long", "finetune", 3000.0)
    result(tmp_path / "long", "distill-1", 4265.0)
    compare.show(tmp_path / "long")
    table = capsys.readouterr().out
    assert "wall time (h:m:s)" in table
    assert re.search(r" 0:00:09 ", table)
    assert re.search(r" 2:01:05 ", table)


def test_a_folder_above_runs_is_told_of_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run engine/run.py --stage all --compare true first$"):
        compare.rows(tmp_path)
    result(tmp_path / "run", "finetune", 1.0)
    result(tmp_path / "run", "finetune-model", 1.0)
    with pytest.raises(UserError, match=f"did you mean {tmp_path / 'run'}\\?$"):
        compare.rows(tmp_path)
    assert len(compare.rows(tmp_path / "run")) == 2


@pytest.mark.parametrize(("kind", "noun"), [("images", "images"), ("text", "texts")])
def test_quickstart_counts_what_it_trains_on(
    kind: Any, noun: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    titles = []
    monkeypatch.setattr(quickstart.example, "main", lambda *_: None)
    monkeypatch.setattr(quickstart.training, "run", lambda _: tmp_path)
    monkeypatch.setattr(quickstart.Manifest, "load_split", lambda *_: SimpleNamespace(samples=200))
    monkeypatch.setattr(quickstart.compare, "show", lambda _, title: titles.append(title))
    quickstart.main(kind, str(tmp_path), ranks=1)
    assert titles[0].endswith(f", 200 labelled {noun} to train on, 200 to test on")
