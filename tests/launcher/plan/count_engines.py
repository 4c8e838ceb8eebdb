"""Counts the storages of an engine's tensors under every ZeRO stage.

deepspeed --num_gpus 2 tests/launcher/plan/count_engines.py counted.json
"""

import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from torch import Tensor, nn

from selfdistill.engine.config.stages import PretrainSection
from selfdistill.engine.runtime import zero
from selfdistill.engine.training import optimizer as optim

BUCKET = 1_000_003


def count_engines(out: Path) -> None:
    """Writes [setting, bytes of a product, configuration, parameters, counts] of each engine."""
    from selfdistill.engine.runtime.distributed import initialize

    ranks = initialize()
    rows = []
    for name in ("zero0", "zero1", "zero2", "zero3"):
        for precision in ("fp32", "bf16"):
            content = zero.read(name)
            section = content["zero_optimization"]
            section |= {"reduce_bucket_size": BUCKET} if section["stage"] else {}
            if section["stage"] == 3:
                section |= {"stage3_prefetch_bucket_size": BUCKET}
            size = zero.DTYPES[precision].itemsize
            rows.append([name, size, zero_only(content), *_count_engine(content, precision)])
    if ranks.main:
        out.write_text(json.dumps(rows))


def zero_only(content: dict[str, Any]) -> dict[str, Any]:
    return {"zero_optimization": dict(content["zero_optimization"])}


def _count_engine(content: dict[str, Any], precision: str) -> tuple[int, dict[str, int]]:
    import deepspeed

    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(16)))
    trained = sum(p.numel() for p in model.parameters())
    # Two groups, as every stage has: ZeRO's flat gradients live until the last one has stepped.
    optimizer = optim.build(model, "pretrain", PretrainSection(), offload=False)
    before = _storages()
    for parameter in model.parameters():
        before.pop(parameter.untyped_storage().data_ptr(), None)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    settings |= zero.numbers(precision)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=content | settings, dist_init_required=False
    )
    counts: dict[str, int] = {}

    def look(moment: str) -> None:
        buckets = (4 * BUCKET, 2 * BUCKET)
        found = {k: v for k, v in _storages().items() if k not in before and v not in buckets}
        # ZeRO steps one group after the other; the first one meets all gradients.
        counts[moment] = max(counts.get(moment, 0), sum(found.values()))

    for step in range(3):  # ZeRO-3 knows the order of its modules from the second one on
        if step == 2:
            optimizer.register_step_pre_hook(lambda *_: look("stepping"))
        inputs = torch.randn(1, 256)
        loss = engine(inputs).float().pow(2).mean()
        if step == 2:
            look("forward")
        engine.backward(loss)
        del loss
        engine.step()
    look("kept")
    engine.destroy()
    return trained, counts


def _storages() -> dict[int, int]:
    """Address -> bytes of what Python's tensors and their gradients lie in."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.layout == torch.strided and t.untyped_storage().data_ptr()
    }


if __name__ == "__main__":
    count_engines(Path(next(word for word in sys.argv[1:] if not word.startswith("--"))))
    sys.stdout.flush()
    os._exit(0)
