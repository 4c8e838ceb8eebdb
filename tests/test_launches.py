"""The command line as people type it: launchers, ranks, ZeRO settings, precision, remote shards."""

import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from data import pack
from tests.helpers import COMMON, launch, make_images, make_world, metrics, run_cases

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


def losses(root: Path, name: str, stage: str = "distill-1") -> list[float]:
    return [line["loss/loss"] for line in metrics(root / "runs" / name / stage)]


def test_every_launcher_and_number_of_ranks_gives_the_same_losses(root: Path) -> None:
    for launcher, ranks, zero in (
        ("python", 1, "zero0"),
        ("deepspeed", 1, "zero1"),
        ("deepspeed", 2, "zero2"),
        ("torchrun", 2, "zero3"),
        ("deepspeed", 4, "zero1"),
    ):
        name = f"{launcher}-{ranks}"
        words = options(root, name, zero=zero, teacher=root / "teacher")
        done = launch("engine/run.py", "--stage", "distill", *words, ranks=ranks, launcher=launcher)
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
        "bf16": {"precision": "bf16", "zero": "zero2"},
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
    for name in ("cached", "sharded", "sharded-zero3", "http"):
        assert losses(root, name) == pytest.approx(local, rel=1e-6), name
    assert losses(root, "original-cached") == pytest.approx(losses(root, "original"), rel=1e-6)
    assert losses(root, "offload") == pytest.approx(local, rel=1e-5)
    # bf16 keeps 8 bits: 1e-2 on equal weights; after a few updates the weights differ as well.
    assert losses(root, "bf16")[0] == pytest.approx(local[0], rel=1e-2)
    assert losses(root, "bf16") == pytest.approx(local, rel=5e-2)
    assert losses(root, "bf16") != local
    assert losses(root, "http-partitions") == losses(root, "partitions") != local
    assert losses(root, "tokens")[0] != losses(root, "mean")[0] != local[0]
    shards = {path: n for path, n in _Counting.seen.items() if path.endswith(".tar")}
    # Two runs with caches of their own; two ranks and their workers share one copy in each.
    assert len(shards) == 3
    assert set(shards.values()) == {2}
    _check_rounds(root / "runs" / "rounds")


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
    ):
        record = result(stage)
        assert record["start"] == str(start / "export")
        assert record["seeds"] == [0, 1]
        each = record["each"]["test_accuracy"]
        assert record["metrics"]["test_accuracy"] == pytest.approx(sum(each) / 2)
        for seed in (0, 1):
            assert (run / stage / f"seed-{seed}" / "export" / "model.safetensors").exists()
    assert result("finetune-model")["start"].endswith("base")
