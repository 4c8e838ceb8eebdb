"""The command line as people type it: launchers, ranks, ZeRO settings, precision, remote shards."""

import http.server
import json
import math
import sys
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.data import pack
from tests.kit.launches import (
    COMMON,
    launch,
    make_images,
    make_world,
    metrics,
    read_events,
    run_cases,
)

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("launches"), samples_per_shard=10)


def options(root: Path, name: str, **more: object) -> list[str]:
    table = COMMON | {
        "data": root / "shards",
        "model": root / "base",
        "output": root / "runs" / name,
        **more,
    }
    return [word for key, value in table.items() for word in (f"--{key}", str(value))]


def losses(root: Path, name: str, loss: str = "loss") -> list[float]:
    found = [line[f"loss/{loss}"] for line in metrics(root / "runs" / name / "distill-1")]
    assert len(found) == COMMON["distill.steps"]
    assert all(isinstance(x, float) and math.isfinite(x) for x in found), found
    return found


def test_every_launcher_and_number_of_ranks_gives_the_same_losses(root: Path) -> None:
    for launcher, ranks, zero in (
        ("python", 1, "zero0"),
        ("deepspeed", 1, "zero1"),
        ("deepspeed", 2, "zero2"),
        ("torchrun", 2, "zero3"),
        ("deepspeed", 4, "zero1"),
    ):
        name = f"{launcher}-{ranks}"
        words = ["engine/run.py", "--stage", "distill"]
        words += options(root, name, zero=zero, teacher=root / "teacher")
        # Each launcher once from nothing, as a user's launch; all others here start warm.
        cold = None if name in ("deepspeed-1", "deepspeed-4") else Path(sys.executable)
        done = launch(*words, ranks=ranks, launcher=launcher, python=cold)
        assert done.returncode == 0, (name, (done.stdout + done.stderr)[-3000:])
        assert json.loads((root / "runs" / name / "distill-1" / "result.json").read_text())[
            "world"
        ] == (ranks)
    reference = losses(root, "python-1")
    assert reference[-1] < reference[0]
    for name in ("deepspeed-1", "deepspeed-2", "torchrun-2", "deepspeed-4"):
        assert losses(root, name) == pytest.approx(reference, rel=1e-5), name


class _Counting(http.server.SimpleHTTPRequestHandler):
    seen: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.seen[self.path] += 1
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def server(root: Path) -> Iterator[str]:
    _Counting.seen.clear()
    handler = partial(_Counting, directory=str(root / "shards"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_settings_within_one_group(root: Path, server: str) -> None:
    """ZeRO-3 with offload, bf16, the three teachers, remote shards: one start for all."""
    (root / "zero3.json").write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}'
    )
    pack.pack(str(make_images(root / "large", size=20)), str(root / "original"), keep_original=True)
    shared = {
        "stage": "distill",
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "teacher": str(root / "teacher"),
    }
    settings: dict[str, dict[str, object]] = {
        "local": {"teacher.mode": "replicated"},
        "cached": {"teacher.mode": "cached"},
        "sharded": {"teacher.mode": "sharded"},
        "sharded-zero3": {"teacher.mode": "sharded", "zero": str(root / "zero3.json")},
        "tokens": {"distill.feature": "tokens"},
        # Files as they were, of another size than the model's: every reader fits them alike.
        "original": {"teacher.mode": "replicated", "data": str(root / "original")},
        "original-cached": {"teacher.mode": "cached", "data": str(root / "original")},
        "mean": {"distill.feature": "mean"},
        "bf16": {"precision": "bf16", "zero": "zero2", "teacher.mode": "cached"},
        "bf16-zero0": {"precision": "bf16", "teacher.mode": "replicated"},
        "bf16-zero3": {
            "precision": "bf16",
            "zero": str(root / "zero3.json"),
            "teacher.mode": "sharded",
        },
        "bf16-offload": {"precision": "bf16", "zero": "zero3_offload"},
        "offload": {"zero": "zero3_offload"},
        "http": {"data": server, "data.cache_dir": str(root / "cache"), "data.workers": 1},
        "partitions": {"data.partitions": 2},
        "http-partitions": {
            "data": server,
            "data.cache_dir": str(root / "cache-2"),
            "data.partitions": 2,
        },
        "rounds": {
            "stage": "all",
            "rounds": 2,
            "compare": True,
            "finetune.seeds": 2,
            "teacher": None,
            "picture_every": 2,
            "finetune.eval_every": 2,
        },
    }
    run_cases(
        root / "settings",
        [
            {
                key: value
                for key, value in (shared | more | {"output": str(root / "runs" / name)}).items()
                if value is not None
            }
            for name, more in settings.items()
        ],
    )
    local = losses(root, "local")
    for loss in ("loss", "mae", "distill"):
        wanted = losses(root, "local", loss)
        for name in ("cached", "sharded", "sharded-zero3", "http"):
            assert losses(root, name, loss) == pytest.approx(wanted, rel=1e-6), (name, loss)
        wanted = losses(root, "original", loss)
        assert losses(root, "original-cached", loss) == pytest.approx(wanted, rel=1e-6), loss
    assert losses(root, "offload") == pytest.approx(local, rel=1e-5)
    # bf16 keeps 8 bits: 1e-2 on equal weights; after a few updates the weights differ as well.
    for name in ("bf16", "bf16-zero0", "bf16-zero3", "bf16-offload"):
        assert losses(root, name)[0] == pytest.approx(local[0], rel=1e-2), name
        assert losses(root, name) == pytest.approx(local, rel=2e-2), name
        assert losses(root, name) != local
    assert losses(root, "http-partitions") == losses(root, "partitions") != local
    assert losses(root, "tokens")[0] != losses(root, "mean")[0] != local[0]
    shards = {path: n for path, n in _Counting.seen.items() if path.endswith(".tar")}
    # Two runs with caches of their own; two ranks and their workers share one copy in each.
    assert len(shards) == 3
    assert set(shards.values()) == {2}
    _check_rounds(root / "runs" / "rounds")
    _check_monitoring(root / "runs" / "rounds", root / "base")


def _check_rounds(run: Path) -> None:
    """Each round's teacher is the round before; each student starts from the model anew."""

    def result(stage: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((run / stage / "result.json").read_text())
        return found

    before = run / "pretrain"
    for number in (1, 2):
        record = result(f"distill-{number}")
        assert record["teacher"]["path"] == str(before / "export")
        assert record["model"] == result("pretrain")["model"]
        before = run / f"distill-{number}"
    first, second = (
        load_file(run / f"distill-{n}" / "export" / "model.safetensors") for n in (1, 2)
    )
    assert any(not torch.equal(first[k], second[k]) for k in first)
    assert result("distill-1")["teacher"]["sha256"] != result("distill-2")["teacher"]["sha256"]
    for stage, start in (
        ("finetune", before),
        ("finetune-pretrain", run / "pretrain"),
        ("finetune-distill-1", run / "distill-1"),
    ):
        record = result(stage)
        assert record["start"] == str(start / "export")
        assert record["seeds"] == [0, 1]
        each = record["each"]["test_accuracy"]
        assert record["metrics"]["test_accuracy"] == pytest.approx(sum(each) / 2)
        for seed in (0, 1):
            assert (run / stage / f"seed-{seed}" / "export" / "model.safetensors").exists()
    assert result("finetune-model")["start"].endswith("base")


MEMORY = "memory/cuda_peak_gib" if torch.cuda.is_available() else "memory/rss_gib"
#: Scalars of every log step of every stage; on a GPU of known peak there is speed/mfu_percent, too.
ALWAYS = {
    "loss/loss",
    "optimizer/learning_rate",
    "optimizer/gradient_norm",
    "feature/distance_from_init",
    "speed/step_seconds",
    "speed/images_per_second",
    "speed/data_wait_percent",
    "ranks/own_seconds_min",
    "ranks/own_seconds_median",
    "ranks/own_seconds_max",
    "ranks/slowest",
    "ranks/held_up_percent",
    MEMORY,
}
DISTILL = {"loss/mae", "loss/distill", "feature/cosine", "feature/teacher_spread"}
RANKED = {"auroc", "average_precision", "ece"}
SCORES = {"accuracy", "macro_f1", "micro_f1", "loss", "balanced_accuracy", *RANKED}
ANALYSIS = {"train_loss", "train_accuracy", "val_loss", "test_loss", "gap"}
ANALYSIS |= {"distance_from_init", "feature_drift", "feature_cosine"}


def _check_monitoring(run: Path, base: Path) -> None:
    """What a real run leaves in metrics.jsonl and TensorBoard's events: all of it, nothing else."""
    for stage in ("pretrain", "distill-1", "distill-2"):
        own = ALWAYS | ({"loss/mae"} if stage == "pretrain" else DISTILL)
        _check_stage(run / stage, base, [(step, own) for step in range(1, 6)], {"final/loss"})
        images = read_events(run / stage).images
        assert list(images) == ["reconstruction"]
        assert [step for step, _ in images["reconstruction"]] == [2, 4, 5]
        # Columns of 16 pixels, 8 times as large; a gap of 2; half of the batch is this rank's.
        assert {p.shape for _, p in images["reconstruction"]} == {(3 * 130 + 2, 4 * 130 + 2, 3)}
        pictures = [p.tobytes() for _, p in images["reconstruction"]]
        assert len(set(pictures)) == 3
    for start in ("finetune", "finetune-distill-1", "finetune-pretrain", "finetune-model"):
        for seed in (0, 1):
            lines = []
            for step in range(1, 6):
                lines.append((step, ALWAYS | {"loss/cross_entropy"}))
                if step in (2, 4, 5):
                    lines.append((step, {f"val/{score}" for score in SCORES}))
            lines.append((5, {f"test/{score}" for score in SCORES}))
            lines.append((5, {f"analysis/{name}" for name in ANALYSIS}))
            folder = run / start / f"seed-{seed}"
            _check_stage(folder, base, lines, set())
            images = read_events(folder).images
            assert list(images) == ["confusion"]
            assert [step for step, _ in images["confusion"]] == [2, 4, 5]
            assert all(p.min() < 100 and p.max() == 255 for _, p in images["confusion"])
            result = json.loads((folder / "result.json").read_text())["metrics"]
            last = {k: v for line in metrics(folder)[-3:-1] for k, v in line.items()}
            for split in ("val", "test"):
                for score in SCORES:
                    assert last[f"{split}/{score}"] == result[f"{split}_{score}"]


def _check_stage(
    folder: Path, base: Path, lines: list[tuple[int, set[str]]], summary: set[str]
) -> None:
    records = metrics(folder)
    unknown = {"speed/mfu_percent"} if torch.cuda.is_available() else set()
    found = [(r["step"], set(r) - {"step", "time"} - unknown) for r in records]
    assert found == lines, folder
    events = read_events(folder)

    # TensorBoard has what metrics.jsonl has, and the figures of the run that no step logged.
    logged: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        for tag in set(record) - {"step", "time"}:
            assert math.isfinite(record[tag]), (folder, tag)
            logged.setdefault(tag, []).append((record["step"], record[tag]))
    assert set(events.scalars) == set(logged) | summary, folder
    for tag, points in logged.items():
        seen = events.scalars[tag]
        assert [step for step, _ in seen] == [step for step, _ in points], (folder, tag)
        values = [value for _, value in points]
        assert [value for _, value in seen] == pytest.approx(values, rel=1e-6), (folder, tag)
    for tag in summary:
        assert events.scalars[tag] == [(5, pytest.approx(logged["loss/loss"][-1][1], rel=1e-6))]

    table = {tag: [value for _, value in points] for tag, points in logged.items()}
    for tag in ("optimizer/gradient_norm", "speed/step_seconds", "speed/images_per_second"):
        assert min(table[tag]) > 0, (folder, tag)
    assert all(0 <= value <= 100 for value in table["speed/data_wait_percent"])
    rates = [8 / seconds for seconds in table["speed/step_seconds"]]
    assert table["speed/images_per_second"] == pytest.approx(rates)
    assert all(0 < value < 100 for value in table[MEMORY])
    before, after = (
        {k.split(".", 1)[1]: v.double() for k, v in load_file(f / "model.safetensors").items()}
        for f in (base, folder / "export")
    )
    shared = [k for k in before if k in after and k.startswith(("embeddings", "encoder", "layern"))]
    assert len(shared) > 30
    moved = math.sqrt(sum(float((before[k] - after[k]).pow(2).sum()) for k in shared))
    assert table["feature/distance_from_init"][-1] == pytest.approx(moved, rel=1e-4), folder

    told = folder / "config.toml"
    assert events.texts == {"config": [(0, f"```toml\n{told.read_text()}\n```")]}
    for name, value in _dotted(tomllib.loads(told.read_text())).items():
        wanted = str(value).lower() if isinstance(value, bool) else value
        if isinstance(wanted, list):
            wanted = str(tuple(wanted))
        assert events.hparams[name] == wanted, name
    assert "local_rank" not in events.hparams


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, dict)
        flat |= _dotted(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat
