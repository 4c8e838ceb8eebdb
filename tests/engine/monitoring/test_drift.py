"""How far an encoder has gone from its start."""

from types import SimpleNamespace

import torch
from torch import nn

from selfdistill.engine.monitoring.drift import Drift
from selfdistill.engine.runtime.distributed import Ranks


def test_what_is_frozen_goes_nowhere_though_fp16_rounds_it() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
    nn.init.ones_(module[1].weight)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    module[0].requires_grad_(False)
    module.half()
    engine = SimpleNamespace(
        zero_optimization_stage=lambda: 1,
        fp16_enabled=lambda: True,
        optimizer=torch.optim.SGD(module[1].parameters()),
        module=module,
    )
    drift = Drift(engine, module, start, Ranks(0, 0, 1, torch.device("cpu")))
    assert float(drift()) == 0
    with torch.no_grad():
        module[1].weight[0, 0] += 2
    assert float(drift()) == 2
