"""Our step: the stages' own objectives, DeepSpeed engine and loop, on given batches."""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ViTMAEForPreTraining

from benchmarks.sizes import CLASSES, SIZES, Batch, Stage, config_of, head, network
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.config.stages import StageSection
from selfdistill.engine.models.images.weights import load_pretrained
from selfdistill.engine.models.texts.classifier import TextClassifier
from selfdistill.engine.models.texts.language import MaskedLanguageModel, TextEncoder
from selfdistill.engine.runtime import distributed
from selfdistill.engine.runtime.allocator import keep_memory
from selfdistill.engine.runtime.zero import chosen
from selfdistill.engine.training.engine import build_engine
from selfdistill.engine.training.loop import loss_scale, take_step
from selfdistill.engine.training.modalities.image import ImageModality
from selfdistill.engine.training.modalities.text import TextModality
from selfdistill.engine.training.objectives import (
    ClassifyObjective,
    DistillObjective,
    FeatureExtractor,
    MaskedObjective,
)
from selfdistill.engine.training.teacher import Cached, Replicated, Teacher, view


def _images(name: str, run: Run, stage: Stage) -> tuple[Any, Any, type[Any]]:
    """Student or classifier, teacher's encoder, and the kind."""
    kind, base = ImageModality(run), _pretrained(name, 0)
    if stage == "finetune":
        model = kind.classifier(base, [str(c) for c in range(CLASSES)], 0)
        last: nn.Linear = model.network.head
        with torch.no_grad():
            last.weight.copy_(head(last.weight.shape[1]))
        return model, None, ImageModality
    teacher = kind.encoder(_pretrained(name, 1)) if stage == "distill" else None
    return kind.autoencoder(base), teacher, ImageModality


@functools.cache  # of many steps in one process
def _pretrained(name: str, seed: int) -> Any:
    """The weights of a seed, as they come from transformers."""
    model = network(name, seed)
    if name != "dinov2_small":
        return _loaded(model)
    whole = ViTMAEForPreTraining(model.config)  # whose encoder is not read
    whole.decoder.load_state_dict(model.decoder.state_dict())
    return replace(_loaded(model.vit.dinov2), decoder=_loaded(whole).decoder)


def _loaded(model: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_pretrained(folder, None)


def _texts(name: str, stage: Stage) -> tuple[Any, Any, type[Any]]:
    config = config_of(name)
    base = network(name, 0)
    if stage == "finetune":
        config.num_labels = CLASSES
        torch.manual_seed(0)
        classifier = TextClassifier(config, SIZES[name].feature)
        classifier.encoder.load_state_dict(base.base_model.state_dict())
        last = classifier.network.classifier
        last = last if classifier.mean else last.out_proj
        with torch.no_grad():
            last.weight.copy_(head(last.weight.shape[1]))
            last.bias.zero_()
        return classifier, None, TextModality
    student = MaskedLanguageModel(config)
    student.network.load_state_dict(base.state_dict())
    teacher = None
    if stage == "distill":
        teacher = TextEncoder(network(name, 1).base_model, config)
    return student, teacher, TextModality


def make(
    name: str,
    stage: Stage,
    lr: float,
    precision: str,
    batches: list[Batch],
    *,
    zero: str,
    teacher: str,
    compiled: bool,
    compile_mode: str = "default",
) -> tuple[Callable[[], Tensor], Any]:
    """Our step on the batches in turn, which returns the loss; and its engine.

    Args:
        name: of a size.
        stage: which.
        lr: learning rate.
        precision: fp32, bf16 or fp16.
        batches: that repeat.
        zero: see --zero.
        teacher: cached or replicated.
        compiled: through torch.compile.
        compile_mode: of it.
    """
    ranks = distributed.initialize()
    if ranks.device.type == "cpu":
        keep_memory()
    batch = len(batches[0]["labels"])
    section: dict[str, Any] = {"steps": 10**6, "batch": batch, "lr": lr, "warmup": 0}
    section |= {"weight_decay": 0.01, "betas": (0.9, 0.95)}
    section |= {"clip": 1.0, "dropout": 0.0, "flip": False} if stage == "finetune" else {}
    config = Config.model_validate(
        {
            "stage": stage,
            stage: section,
            "precision": precision,
            "zero": chosen(zero, 1, precision),
            "compile": compiled,
            "compile_mode": compile_mode,
        }
    )
    if ranks.device.type == "cuda":  # as the loader gives them
        batches = [{k: v.pin_memory() for k, v in b.items()} for b in batches]
    run = Run(config, ranks, Path(tempfile.gettempdir()))
    plan: StageSection = getattr(config, stage)
    image, feature = SIZES[name].kind == "image", SIZES[name].feature
    model, encoder, kind = _images(name, run, stage) if image else _texts(name, stage)
    if stage == "finetune":
        objective: nn.Module = ClassifyObjective(model)
    elif stage == "distill":
        objective = DistillObjective(model, feature)
    else:
        objective = MaskedObjective(model)
    asked: Teacher | None = None
    if encoder is not None:
        asked = Replicated(FeatureExtractor(encoder, feature), kind.full, ranks, run.dtype)
        if teacher == "cached":
            table = np.concatenate([asked(b).cpu().numpy() for b in batches])
            asked = Cached(table, ranks.device, run.folder)
    engine = build_engine(run, objective, stage, plan)
    names = (*kind.labelled, "labels") if stage == "finetune" else kind.masked

    def inputs(entries: Batch) -> Batch:
        target = {} if asked is None else {"target": asked(entries)}
        return view(entries, names, ranks.device) | target

    def count(entries: Batch) -> int | None:
        return len(entries["masked_at"]) if "masked_at" in entries and stage != "finetune" else None

    engine.train()
    repeated, taken = itertools.cycle(batches), itertools.count()

    def step() -> Tensor:
        given = [next(repeated)]
        scale = loss_scale([count(entries) for entries in given], ranks)
        done = take_step(engine, given, inputs, plan, ranks, seed=0, taken=next(taken), scale=scale)
        return done.losses["loss"]

    return step, engine
