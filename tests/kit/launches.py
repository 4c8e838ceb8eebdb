"""Small data, small models and real launches, shared by the tests."""

import contextlib
import io
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from selfdistill.data import pack
from tests.kit import warm

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent

#: What every run of the tests shares: tiny, deterministic, quiet.
COMMON = {
    "save_every": 0,
    "picture_every": 0,
    "log_every": 1,
    "zero": "zero0",
    "precision": "fp32",
    "pretrain.steps": 5,
    "distill.steps": 5,
    "finetune.steps": 5,
    "pretrain.batch": 8,
    "distill.batch": 8,
    "finetune.batch": 8,
    "finetune.warmup": 2,
    "finetune.dropout": 0.0,
}


def make_images(root: Path, *, size: int = 16, train: int = 9, other: int = 5) -> Path:
    """Class folders of noisy coloured squares: 3 classes, splits train, val, test."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", other), ("test", other)):
        for number, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (size, size, 3), dtype=np.uint8)
                pixels[..., number] += 100
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root


def make_base(
    folder: Path, *, size: int = 16, width: int = 24, depth: int = 2, seed: int = 0
) -> Path:
    """A random ViT-MAE in Hugging Face's layout, written by transformers itself."""
    from selfdistill.engine.models.images.vit_mae import position_table

    torch.manual_seed(seed)
    model = ViTMAEForPreTraining(
        ViTMAEConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=2,
            intermediate_size=2 * width,
            image_size=size,
            patch_size=4,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            norm_pix_loss=True,
            hidden_dropout_prob=0.0,
        )
    )
    # transformers 5 leaves the position embeddings of a model made from its config at zero.
    grid = size // 4
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.copy_(position_table(width, grid))
        model.decoder.decoder_pos_embed.copy_(position_table(16, grid))
    model.save_pretrained(folder)
    return folder


def make_world(root: Path, *, other: int = 5, **options: Any) -> Path:
    """What a run needs: images, their shards, a base model, and a teacher of its shape."""
    make_images(root / "images", other=other)
    pack.pack(str(root / "images"), str(root / "shards"), **options)
    make_base(root / "base")
    make_base(root / "teacher", seed=1)
    return root


def environment(**more: str) -> dict[str, str]:
    """The environment of a launch: the venv's tools on PATH, one build folder for ops."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    env["PATH"] = f"{BIN}:{env['PATH']}"
    env.setdefault("TORCH_EXTENSIONS_DIR", str(ROOT / ".cache" / "torch_extensions"))
    return env | {"OMP_NUM_THREADS": "1"} | more


def free_port() -> int:
    """A TCP port of loopback that nobody listens on.

    Below those that the system gives to connections (32768 and above): one of them could take it in
    the seconds until a launch's first rank listens.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launch(
    *words: str | Path,
    ranks: int = 2,
    launcher: str = "deepspeed",
    python: Path | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Runs a script of the project under a launcher, on loopback, with a port of its own.

    All processes start warm (tests/kit/warm), unless `python` is another Python.
    """
    port, python = str(free_port()), python or warm.executable()
    head = {
        "deepspeed": ["--num_gpus", str(ranks), "--master_port", port],
        "torchrun": [f"--nproc_per_node={ranks}", f"--master_port={port}"],
        "python": [],
    }[launcher]
    return subprocess.run(
        [python.with_name(launcher), *head, *map(str, words)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_cases(folder: Path, cases: list[dict[str, object]], *, ranks: int = 2) -> str:
    """Runs configurations in one process group; returns what it printed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "cases.json"
    file.write_text(json.dumps([COMMON | case for case in cases]))
    done = launch(ROOT / "tests" / "kit" / "run_cases.py", file, ranks=ranks)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout + done.stderr


def metrics(stage: Path) -> list[dict[str, float]]:
    """The lines of a stage's metrics.jsonl."""
    return [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Events:
    """What TensorBoard's own reader finds in a folder: for each tag (step, value) pairs."""

    scalars: dict[str, list[tuple[int, float]]]
    images: dict[str, list[tuple[int, np.ndarray]]]
    texts: dict[str, list[tuple[int, str]]]
    hparams: dict[str, float | str]


def read_events(folder: Path) -> Events:
    """The event files of a stage; it has one session of hyper-parameters, begun and ended."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata, plugin_data_pb2

    # 0: all of them, not a sample.
    found = EventAccumulator(str(folder), dict.fromkeys(("scalars", "images", "tensors"), 0))
    found.Reload()
    tags = found.Tags()
    marks = found.PluginTagToContent(metadata.PLUGIN_NAME)
    assert set(marks) == {metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG}
    end = plugin_data_pb2.HParamsPluginData.FromString(marks[metadata.SESSION_END_INFO_TAG])
    assert end.HasField("session_end_info")
    begin = metadata.parse_session_start_info_plugin_data(marks[metadata.SESSION_START_INFO_TAG])

    def pixels(content: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(content)))

    return Events(
        {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags["scalars"]},
        {
            tag: [(e.step, pixels(e.encoded_image_string)) for e in found.Images(tag)]
            for tag in tags["images"]
        },
        {
            tag.removesuffix("/text_summary"): [
                (e.step, e.tensor_proto.string_val[0].decode()) for e in found.Tensors(tag)
            ]
            for tag in found.PluginTagToContent("text")
        },
        {
            name: value.string_value if value.HasField("string_value") else value.number_value
            for name, value in begin.hparams.items()
        },
    )


def samples(stage: Path) -> dict[int, list[int]]:
    """Each step's samples over all ranks, from the recorded log."""
    found: dict[int, list[int]] = {}
    for path in sorted((stage / "samples").glob("rank-*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["step"], []).extend(line["ids"])
    return {step: sorted(ids) for step, ids in sorted(found.items())}
