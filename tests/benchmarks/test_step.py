"""The benchmark of the step: all contestants do the same work; the record says what they did."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import plain
from benchmarks.sizes import SIZES, batches, for_transformers
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.weights import load_pretrained
from selfdistill.engine.monitoring import flops
from tests.kit import warm
from tests.kit.launches import ROOT, environment


def bench(*words: str) -> subprocess.CompletedProcess[str]:
    command = [warm.executable(), "-m", "benchmarks.step", *words]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), text=True, capture_output=True, timeout=600
    )


@pytest.mark.parametrize(
    ("size", "precision", "bound", "batch"),
    # In bf16 a number has 8 bits, 0.4%; the loss is a mean of thousands of them.
    [
        ("tiny", "fp32", 2e-5, 8),
        ("tiny_text", "fp32", 2e-5, 8),
        ("tiny", "bf16", 1e-2, 8),
        ("dinov2_small", "fp32", 1e-4, 2),
        ("minilm", "fp32", 1e-4, 2),
    ],
)
def test_all_contestants_have_the_same_losses(
    size: str, precision: str, bound: float, batch: int, tmp_path: Path
) -> None:
    words = ["--size", size, "--stages", "distill", "--rounds", "1", "--steps", "2"]
    words += ["--precision", precision, "--batch", str(batch)]
    done = bench(
        *words, "--variants", "teacher=replicated", "--threads", "1", "--out", f"{tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / f"step-{size}.json").read_text())
    rows = figures["distill"]["rows"]
    assert [row["name"] for row in rows] == [
        "plain loop",
        f"Trainer + DeepSpeed, {precision}",
        f"ours, {precision}",
        "ours, teacher replicated",
    ]
    for row in rows:
        assert "failed" not in row, row
        # Two backward calls and one, DeepSpeed's engine and none, after five updates.
        assert row["loss_difference"] < bound
        assert row["peak_bytes"] > 2**20
        assert row["samples_per_second"]["n"] == 1
    plain, trainer, ours, online = (row["flops_per_sample"] for row in rows)
    assert plain == trainer
    assert ours < online < plain
    if size == "tiny":
        shape = Shape(16, 4, 32, 2, 2, 64, 16, 1, 2, 32)
        formula = flops.step_flops(shape, "distill", teacher="cached", cls_only=True)
        projected = shape.patches + shape.kept  # whose input, pixels, needs no gradient
        projection = 2 * projected * shape.patch_values * shape.width
        assert ours == pytest.approx(formula - projection, rel=1e-9)
    assert "| plain loop |" in (tmp_path / f"step-{size}.md").read_text()


def test_flops_at_the_small_default() -> None:
    """Of distillation, ours at most 0.8 of the plain loop's, which PyTorch's counter tells."""
    size = SIZES["small"]
    batch = for_transformers("small", batches("small", 2)[0])
    step = plain.make("small", "distill", 1e-4, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(batch)
    assert size.kind == "image"
    shape = load_pretrained(str(ROOT / "recipes" / "vit_small")).shape
    ours = flops.step_flops(shape, "distill", teacher="cached", cls_only=True)
    assert ours < 0.8 * counter.get_total_flops() / 2


def test_a_compiled_step_and_a_profile(tmp_path: Path) -> None:
    words = ("--size", "tiny", "--stages", "pretrain", "--rounds", "1", "--steps", "1")
    done = bench(*words, "--variants", "compiled=true", "--profile", "true", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "step-tiny.json").read_text())["pretrain"]
    row = found["rows"][-1]
    assert row["name"] == "ours, compiled true"
    assert row["loss_difference"] < 2e-5
    operations = {
        title: [name for name, _, _ in listed] for title, listed in found["operations"].items()
    }
    # Compiled it was: what inductor makes has names of its own.
    made = [name for name in operations["ours, compiled true"] if "compile" in name.lower()]
    assert made, operations["ours, compiled true"]
    assert not [name for name in operations["plain loop"] if "compile" in name.lower()]


def test_mistakes_are_one_line() -> None:
    for words, told in (
        (("--size", "huge"), "there are tiny, small"),
        (("--stages", "distil"), "there are pretrain, distill"),
    ):
        done = bench(*words)
        assert done.returncode == 2
        assert told in done.stderr
        assert "Traceback" not in done.stderr
