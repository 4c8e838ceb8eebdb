"""What a plan says of baselines: their passes and heads against PyTorch's tracker, their copies."""

from typing import Any

import pytest
import torch
from torch import nn

from selfdistill.engine.config.options import load
from selfdistill.engine.config.stages import FinetuneSection
from selfdistill.engine.regularizers import recadam
from selfdistill.engine.regularizers.diet import DietObjective
from selfdistill.engine.regularizers.r3f import R3FObjective
from selfdistill.engine.regularizers.supcon import SupConObjective
from selfdistill.engine.training.modalities.image import ImageModality
from selfdistill.launcher.plan import Options, memory
from selfdistill.launcher.plan.forecast import Plan, prepare
from selfdistill.launcher.plan.tables import _uncounted, need
from selfdistill.launcher.plan.workload import ImageWork
from tests.launcher.plan.test_plan_memory import BATCH, SHAPE, peak, run_with

WIDTH, DEPTH, PATCH = 96, 12, 8 * 8 * 3


def planned(**options: Any) -> Plan:
    named = {name.replace("__", "."): value for name, value in options.items()}
    shape = {f"model.shape.{name}": value for name, value in SHAPE.items()}
    config = {"model": "scratch", "kind": "image", "precision": "fp32", "zero": "zero1"}
    given = Options(devices=4, samples=6000, tflops=100, memory_gb=80)
    return prepare(given, load(config | shape | named))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("baseline", ["supcon", "diet", "r3f"])
def test_activations(baseline: str, recompute: bool) -> None:
    stage = "finetune" if baseline == "r3f" else "pretrain"
    asked = {"finetune__regularizer" if baseline == "r3f" else "pretrain__objective": baseline}
    shape = {f"model__shape__{name}": value for name, value in SHAPE.items()}
    more = {"finetune__pool": "cls", "distill__feature": "mean", "finetune__dropout": 0}
    run = run_with(recompute, model="scratch", supcon__dropout=0, **shape, **more, **asked)
    work, kind = ImageWork(run), ImageModality(run)
    work.rows = 1000  # the gradient of more would be the peak, and is none of activations
    images = torch.randint(0, 256, (2 * BATCH, 3, *work.shape.sides), dtype=torch.uint8)
    labels = torch.arange(BATCH) % 2
    model: Any = kind.classifier(work.base, ["a", "b"], 0) if stage == "finetune" else None
    model = model or kind.autoencoder(work.base, 0.0)
    if recompute:
        kind.recompute(model)
    if baseline == "supcon":
        network: nn.Module = SupConObjective(model, WIDTH, run.config.supcon)
        batch = {"labels": labels, "images": images}
    elif baseline == "diet":
        network = DietObjective(model, "mean", WIDTH, work.rows, 0.8)
        batch = {"ids": torch.arange(BATCH), "images": images[:BATCH]}
    else:
        network = R3FObjective(model, run.config.r3f)
        batch = {"labels": labels, "images": images[:BATCH], "noise_key": torch.arange(BATCH)}
    network.requires_grad_(True)  # the tracker takes no frozen positions
    # What the second call of a module recomputes is temporary to the tracker, as gradients are.
    kinds = ("ACT", "TEMP") if recompute and baseline == "r3f" else ("ACT",)
    found = peak(network, lambda: network(**batch)["loss"], *kinds)
    assert 0.8 < work.activations(stage, 4) / found < 1.2  # type: ignore[arg-type]


def test_the_head_that_diet_trains_and_throws_away() -> None:
    plain, diet = planned(stage="pretrain"), planned(stage="pretrain", pretrain__objective="diet")
    head, encoder = 6000 * WIDTH, plain.work.teacher()
    trained = diet.work.parameters("pretrain", 10).trained
    assert head < trained <= head + encoder  # and not the decoder
    assert diet.work.exported("pretrain", 10) == plain.work.exported("pretrain", 10)
    once = diet.work.encode_flops()
    assert diet.work.flops("pretrain", "cached", 10) == 3 * once + 6 * head


def test_recadam_keeps_what_it_began_with() -> None:
    module = nn.Linear(30, 20)
    plan, settings = FinetuneSection(), load({}).recadam
    optimizer = recadam.build(module, module.parameters(), plan, settings)
    module(torch.ones(1, 30)).sum().backward()
    optimizer.step()
    held = sum(4 * t.numel() for s in optimizer.state.values() for t in s.values() if t.numel() > 1)
    values = sum(p.numel() for p in module.parameters())
    content, parameters = {"zero_optimization": {"stage": 0}}, memory.Parameters(values, 0, 0)
    found = memory.need(content, parameters, size=4, world=1, anchored=True)
    assert found.optimizer == held == 12 * values
    assert found.step == 4 * values  # how far it is
    job = planned(stage="finetune", finetune__regularizer="recadam").jobs[0]
    assert (job.copies, job.saved) == (0, 1)


def test_mars_keeps_the_encoders_matrices_on_every_rank() -> None:
    plain, mars = planned(stage="finetune"), planned(stage="finetune", finetune__regularizer="mars")
    content = {"zero_optimization": {"stage": 1}}
    more, base = (need(p, p.jobs[0], content).weights for p in (mars, plain))
    matrices = DEPTH * 12 * WIDTH**2 + PATCH * WIDTH
    assert more - base == 4 * matrices
    free = planned(stage="finetune", finetune__regularizer="mars", mars__radius=float("inf"))
    assert need(free, free.jobs[0], content).weights == base


def test_r3f_computes_twice() -> None:
    plain, r3f = planned(stage="finetune"), planned(stage="finetune", finetune__regularizer="r3f")
    one, two = (p.work.flops("finetune", "cached", 10) for p in (plain, r3f))
    assert two == 2 * one
    none = planned(stage="finetune", finetune__regularizer="r3f", r3f__weight=0)
    assert none.work.flops("finetune", "cached", 10) == one
    assert not _uncounted(r3f.config)


def test_texts() -> None:
    """Of RoBERTa-base: a head beside the encoder; two whole views leave twice what one does."""

    def made(objective: str) -> Plan:
        asked = {"recipe": "roberta_base", "pretrain.objective": objective, "precision": "fp32"}
        given = Options(samples=6000, tokens=60)
        return prepare(given, load(asked | {"stage": "pretrain", "zero": "zero1"}))

    mae, diet, supcon = made("mae"), made("diet"), made("supcon")
    encoder = mae.work.teacher()
    assert diet.work.parameters("pretrain", 10).trained == encoder + 6000 * 768
    assert supcon.work.parameters("pretrain", 10).trained == encoder + 768 * 769 + 128 * 769
    one, _ = supcon.work.viewed(4, supcon.config.supcon.dropout, True)
    assert supcon.work.activations("pretrain", 4) == 2 * one
    assert supcon.work.flops("pretrain", "cached", 10) == 6 * supcon.work.encode_flops()
