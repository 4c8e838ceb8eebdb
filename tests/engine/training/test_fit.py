"""What a plan says reaches the model and the loaders."""

import os
from pathlib import Path

import pytest
import torch

from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTMAE
from selfdistill.engine.models.images.weights import Pretrained
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.image import ImageModality


def test_dropout_of_the_plan_is_live() -> None:
    shape = Shape(16, 4, 24, 2, 2, 48, 16, 1, 2, 32)
    base = Pretrained.fresh(ViTMAE(shape))
    config = Config()
    run = Run(config, Ranks(0, 0, 1, torch.device("cpu")), Path())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for rate in (0.0, 0.5):
        config.finetune.dropout = rate
        model = ImageModality(run).classifier(base, ["a", "b", "c"], seed=0).train()
        assert torch.equal(model.classify(images), model.classify(images)) == (rate == 0.0)
        model.eval()
        assert torch.equal(model.classify(images), model.classify(images))


def test_workers_are_what_the_cores_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    cpu, gpu = (
        Run(Config(), Ranks(0, 0, 1, torch.device(name)), Path()) for name in ("cpu", "cuda")
    )
    for threads, expected in ((1, 0), (2, 1), (12, 1)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert cpu.workers == expected
    assert gpu.workers == 4
    for local_world, expected in ((24, 0), (12, 1), (8, 1), (6, 2)):  # 1, 2, 3 and 4 cores each
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
        assert gpu.workers == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert gpu.workers == 16
    # A task of SLURM that is bound to its eight cores has them all, whoever else is on the node.
    for name, value in (("PROCID", "0"), ("STEP_ID", "0"), ("CPUS_PER_TASK", "8")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert gpu.ranks.cores == 8
    assert gpu.workers == 6
    gpu.config.data.workers = 0
    assert gpu.workers == 0
