"""What a later stage refuses is told before the first one of `--stage all`."""

from pathlib import Path

import pytest

from tests.kit.launches import make_world, run_cases

pytestmark = pytest.mark.multi


def test_later_stages_refuse_before_the_first(tmp_path: Path) -> None:
    root = make_world(tmp_path)
    common = {"stage": "all", "data": str(root / "shards"), "model": str(root / "base")}
    mistakes: dict[str, dict[str, object]] = {
        "--finetune.batch 8 cannot be cut evenly over 1 ranks x 3": {"finetune.accumulation": 3},
        "--distill.batch 8 cannot be cut evenly over 1 ranks x 5": {"distill.accumulation": 5},
        "--finetune.warmup 9: the stage has 3 steps": {
            "finetune.epochs": 1,
            "finetune.steps": None,
            "finetune.warmup": 9,
        },
        "--distill.warmup 9: the stage has 3 steps": {
            "distill.epochs": 1,
            "distill.steps": None,
            "distill.warmup": 9,
        },
        "give --rounds 3, or an earlier start": {"finetune.start": "distill-3"},
        "take zero0, zero1 or zero2": {"finetune.regularizer": "mars", "zero": "zero3"},
        "give at most --recadam.c": {"finetune.regularizer": "recadam", "recadam.c": 1e6},
    }
    run_cases(
        root / "cases",
        [
            {**common, "output": str(root / "runs" / str(n)), **more, "expect_error": line}
            for n, (line, more) in enumerate(mistakes.items())
        ],
        ranks=1,
    )
    assert len(list((root / "runs").iterdir())) == len(mistakes)
    assert not list((root / "runs").glob("*/pretrain/metrics.jsonl"))
