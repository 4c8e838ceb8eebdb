"""What only a CUDA device shows: the model on it, its precisions, ZeRO over NCCL, the teachers."""

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.data import pack
from selfdistill.data.loading.loader import Loader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import open_run
from selfdistill.engine.config.options import load
from selfdistill.engine.models.images.networks import ImageAutoencoder, Normalize
from selfdistill.engine.models.images.vit_mae import ViTMAE
from selfdistill.engine.models.images.weights import load_pretrained
from selfdistill.engine.run import run_stages
from selfdistill.engine.runtime import distributed
from selfdistill.engine.training import engine as engines
from selfdistill.engine.training.objectives import EXTRAS, DistillObjective
from tests.kit.launches import COMMON, ROOT, launch, make_images, make_world, metrics, run_cases

pytestmark = pytest.mark.gpu


def test_objective_equals_the_cpu() -> None:
    """Loss and all gradients of the distillation objective, fp32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    shape = load_pretrained(str(ROOT / "recipes" / "vit_small")).shape
    model = ImageAutoencoder(ViTMAE(shape), Normalize((0.5,) * 3, (0.5,) * 3))
    cpu = DistillObjective(model)
    gpu = copy.deepcopy(cpu).cuda()
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)
    noise, target = torch.rand(8, 64), torch.randn(8, 192)
    one = cpu(target, images=images, noise=noise)
    other = gpu(target.cuda(), images=images.cuda(), noise=noise.cuda())
    for name in one.keys() - set(EXTRAS):
        value = one[name]
        assert other[name].item() == pytest.approx(value.item(), rel=1e-5), name
    one["loss"].backward()
    other["loss"].backward()
    for (name, a), (_, b) in zip(cpu.named_parameters(), gpu.named_parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None, name
            continue
        assert b.grad is not None, name
        # Key biases have no gradient but rounding: against the largest gradient, not their own.
        error = (b.grad.cpu() - a.grad).norm() / max(a.grad.norm().item(), 1e-3)
        assert error < 1e-4, name


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_page_locked(workers: int, tmp_path: Path) -> None:
    """Those that lie in the ring, and those that come by the pipe."""
    make_images(tmp_path / "images", size=48)
    pack.pack(str(tmp_path / "images"), str(tmp_path / "shards"), size=48)
    split = Manifest.load_split(str(tmp_path / "shards"), "train")
    loader = Loader(split, batch=9, workers=workers, pin=True)
    locked = list(itertools.islice(iter(loader), 30))
    loader.close()
    for batch, plain in zip(locked, iter(Loader(split, batch=9)), strict=False):
        assert all(entry.is_pinned() for entry in batch.values())
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
        assert distributed.sent(batch["images"], torch.device("cuda")).is_cuda


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("gpu"), samples_per_shard=10)


def distilling(root: Path) -> dict[str, object]:
    """Options of a short distillation."""
    return {
        "stage": "distill",
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "teacher": str(root / "teacher"),
        "distill.steps": 20,
    }


def test_settings_agree(root: Path) -> None:
    """ZeRO 0-3, three teachers, three precisions, in one process group."""
    shared = distilling(root)
    settings: dict[str, dict[str, object]] = {
        "zero0": {"zero": "zero0"},
        "zero1": {"zero": "zero1"},
        "zero2": {"zero": "zero2"},
        "zero3": {"zero": "zero3"},
        "cached": {"teacher.mode": "cached"},
        "replicated": {"teacher.mode": "replicated"},
        "sharded": {"teacher.mode": "sharded"},
        "bf16": {"precision": "bf16", "zero": "zero2"},
        "fp16": {"precision": "fp16", "zero": "zero2"},
        "finetune-fp16": {"stage": "finetune", "finetune.start": "model", "precision": "fp16"},
        "finetune-bf16": {"stage": "finetune", "finetune.start": "model", "precision": "bf16"},
    }
    run_cases(
        root / "settings",
        [shared | more | {"output": str(root / "runs" / name)} for name, more in settings.items()],
        ranks=1,
    )

    def losses(name: str, stage: str = "distill-1") -> list[float]:
        return [line["loss/loss"] for line in metrics(root / "runs" / name / stage)]

    base = losses("zero0")
    assert base[-1] < base[0]
    for name in ("zero1", "zero2", "zero3", "replicated", "sharded", "cached"):
        assert losses(name) == pytest.approx(base, rel=1e-3), name
    for name in ("bf16", "fp16"):
        assert losses(name)[0] == pytest.approx(base[0], rel=2e-2), name
        assert losses(name)[-1] == pytest.approx(base[-1], rel=1e-1), name
    for name in ("finetune-fp16", "finetune-bf16"):
        assert all(x == x for x in losses(name, "finetune-model")), name


def test_the_three_stages_by_the_launcher(root: Path) -> None:
    done = launch(
        *("engine/run.py", "--stage", "all", "--data", root / "shards", "--model", root / "base"),
        *("--output", root / "runs" / "all", "--precision", "bf16", "--pretrain.steps", "5"),
        *("--distill.steps", "5", "--finetune.steps", "20", "--finetune.warmup", "2"),
        *("--log_every", "5"),
        ranks=1,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "test_accuracy" in done.stdout
    line = metrics(root / "runs" / "all" / "distill-1")[-1]
    assert any("memory" in key for key in line)


def test_interrupted_it_ends_in_the_same_bits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 steps against 20 and 20 with --deterministic, in fp32 and in bf16; and twice the same."""
    # What engine/run.py does before CUDA begins.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    shared = {
        "stage": "distill",
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "teacher": str(root / "teacher"),
        "distill.steps": 40,
        "deterministic": True,
        "zero": "auto",
    }
    cases: list[dict[str, object]] = []
    for precision in ("fp32", "bf16"):
        for name in ("whole", "again", "cut"):
            output = {"output": str(root / "bits" / f"{precision}-{name}"), "precision": precision}
            if name == "cut":
                cases.append(shared | output | {"leave_at": "step 21"})
            cases.append(shared | output)
    run_cases(root / "bits-cases", cases, ranks=1)
    for precision in ("fp32", "bf16"):
        whole, again, cut = (
            load_file(root / "bits" / f"{precision}-{name}" / "distill-1/export/model.safetensors")
            for name in ("whole", "again", "cut")
        )
        for key, value in whole.items():
            assert torch.equal(value, again[key]), (precision, key)
            assert torch.equal(value, cut[key]), (precision, key)


@pytest.mark.parametrize("zero", ["zero1", "zero3"])
def test_the_last_stage_needs_no_more_memory_than_the_first(
    zero: str, root: Path, ranks: distributed.Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA's allocator holds before each engine, fine-tuning after fine-tuning."""
    before: list[int] = []
    build = engines.build_engine

    def looked_at(*words: Any) -> Any:
        before.append(torch.cuda.memory_allocated())
        return build(*words)

    monkeypatch.setattr(engines, "build_engine", looked_at)
    settings = COMMON | {"zero": zero, "precision": "bf16", "stage": "all", "compare": True}
    settings |= {"data": str(root / "shards"), "model": str(root / "base"), "watchdog": 0}
    settings |= {"output": str(root / "memory" / zero), "finetune.seeds": 2}
    run = open_run(load(settings), ranks)
    run_stages(run)
    run.close()
    assert len(before) == 8
    # Workspaces of cuBLAS stay; an engine kept alive would be more.
    assert max(before) - before[1] < 2**20, before


def test_offload_agrees(root: Path) -> None:
    """By itself, and last: DeepSpeed first compiles its optimiser for the CPU, if it can there."""
    shared = distilling(root)
    names = ("zero0", "zero3_offload")
    cases = [shared | {"zero": name, "output": str(root / "away" / name)} for name in names]
    run_cases(root / "away-cases", cases, ranks=1)
    plain, away = (
        [line["loss/loss"] for line in metrics(root / "away" / name / "distill-1")]
        for name in names
    )
    assert away == pytest.approx(plain, rel=1e-3)
