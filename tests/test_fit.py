"""The classifier of a fine-tuning carries the plan's dropout, in the places that training uses."""

from pathlib import Path

import torch

from engine.config import Config
from engine.distributed import Ranks
from engine.fit import classifier
from engine.folder import Run
from engine.models.vit_mae import Shape, ViTMAE
from engine.models.weights import Pretrained


def test_dropout_of_the_plan_is_live() -> None:
    shape = Shape(16, 4, 24, 2, 2, 48, 16, 1, 2, 32)
    base = Pretrained.fresh(ViTMAE(shape))
    config = Config()
    run = Run(config, Ranks(0, 0, 1, torch.device("cpu")), Path())
    images = torch.randn(2, 3, 16, 16)
    for rate in (0.0, 0.5):
        config.finetune.dropout = rate
        model = classifier(run, base, 3, seed=0).train()
        assert torch.equal(model(images), model(images)) == (rate == 0.0)
        assert torch.equal(model.eval()(images), model(images))
