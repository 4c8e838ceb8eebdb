"""Learning rates and parameter groups against transformers' and timm's."""

from pathlib import Path

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.checkpoint import BEFORE
from selfdistill.engine.checkpoints.folder import _check_complete
from selfdistill.engine.config.stages import FinetuneSection
from selfdistill.engine.training import optimizer as optim


@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_transformers(warmup: int) -> None:
    theirs = {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    for schedule, make in theirs.items():
        plan = FinetuneSection(lr=3e-4, warmup=warmup, schedule=schedule)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=plan.lr)
        scheduler = make(optimizer, warmup, 40)
        for step in range(41):
            ours = optim.learning_rate(step, 40, plan)
            assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-18)
            optimizer.step()
            scheduler.step()


def test_records_of_before_there_was_an_option_are_equal() -> None:
    now = {f"finetune.{k}": v for k, v in FinetuneSection(steps=5).model_dump().items()}
    then = {k: v for k, v in now.items() if k not in BEFORE}
    _check_complete(Path("x"), {"record": then, "manifest": "m"}, now, "m")
    with pytest.raises(UserError, match=r"finetune.schedule = linear, now it is cosine"):
        _check_complete(
            Path("x"),
            {"record": then, "manifest": "m"},
            now | {"finetune.schedule": "cosine"},
            "m",
        )
