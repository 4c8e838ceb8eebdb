"""The classifier of a fine-tuning carries the plan's dropout, in the places that training uses."""

from pathlib import Path

import torch

from engine.config import Config
from engine.distributed import Ranks
from engine.folder import Run
from engine.kinds.image import ImageKind
from engine.models.vit_mae import Shape, ViTMAE
from engine.models.weights import Pretrained


def test_dropout_of_the_plan_is_live() -> None:
    shape = Shape(16, 4, 24, 2, 2, 48, 16, 1, 2, 32)
    base = Pretrained.fresh(ViTMAE(shape))
    config = Config()
    run = Run(config, Ranks(0, 0, 1, torch.device("cpu")), Path())
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for rate in (0.0, 0.5):
        config.finetune.dropout = rate
        model = ImageKind(run).classifier(base, ["a", "b", "c"], seed=0).train()
        assert torch.equal(model.classify(images), model.classify(images)) == (rate == 0.0)
        model.eval()
        assert torch.equal(model.classify(images), model.classify(images))
