"""A finished stage gives its memory back: the last one needs no more than the first."""

import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selfdistill.engine.checkpoints.folder import open_run
from selfdistill.engine.config.options import load
from selfdistill.engine.run import _quiet, run_stages
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training import engine as engines
from tests.kit.launches import COMMON, make_world


def held() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What torch.compile left of other tests has no memory.
        tensors = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout == torch.strided and t.device.type == "cpu"
    }
    return sum(found.values())


@pytest.mark.parametrize("zero", ["zero0", "zero1", "zero2", "zero3"])
def test_the_last_stage_needs_no_more_than_the_first(
    zero: str, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every fine-tuning of `--compare true --finetune.seeds 2`, and a teacher that is sharded."""
    root = make_world(tmp_path)
    _quiet()
    before: list[tuple[str, int]] = []
    build = engines.build_engine

    def looked_at(run: Any, objective: nn.Module, stage: str, *more: Any) -> Any:
        before.append((stage, held()))
        return build(run, objective, stage, *more)

    monkeypatch.setattr(engines, "build_engine", looked_at)
    settings = COMMON | {"zero": zero, "data": str(root / "shards"), "model": str(root / "base")}
    settings |= {"output": str(root / "run"), "stage": "all", "compare": True, "watchdog": 0}
    settings |= {"finetune.seeds": 2, "teacher.mode": "sharded", "finetune.train_scored": 0}
    run = open_run(load(settings), ranks)
    run_stages(run)
    run.close()
    assert len(before) == 8, before
    size = sum(t.numel() * 4 for t in _weights(root).values())
    tunings = [bytes_held for stage, bytes_held in before if stage == "finetune"]
    # An engine kept alive would add its weights, gradients and moments: 16 bytes a parameter.
    assert max(tunings) - tunings[0] < size, before
    assert tunings[-1] - before[0][1] < size, before


def _weights(root: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(root / "base" / "model.safetensors")
