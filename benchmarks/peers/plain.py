"""Peer (a): the plain loop, structured as the paper's authors' code is.

Transformers' models in fp32, two backward calls a step, the teacher run at every step, torch's
AdamW as it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, ViTConfig, ViTForImageClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.dinov2 import MaskedDINOv2
from benchmarks.sizes import CLASSES, SIZES, Batch, Stage, config_of, head, network


class Pooled(nn.Module):
    """A linear layer on the CLS vector, or the mean, of an encoder of transformers."""

    def __init__(self, encoder: Any, feature: str) -> None:
        super().__init__()
        self.encoder, self.feature = encoder, feature
        self.classifier = nn.Linear(encoder.config.hidden_size, CLASSES)

    def forward(self, labels: Tensor, **inputs: Tensor) -> SequenceClassifierOutput:
        """`loss` and `logits` [B, classes]."""
        logits = self.classifier(pick(self.encoder(**inputs).last_hidden_state, self.feature))
        return SequenceClassifierOutput(nn.functional.cross_entropy(logits, labels), logits)


def pick(hidden: Tensor, feature: str) -> Tensor:
    """Features [B, D] of tokens [B, T, D], none of which is padding."""
    return hidden.mean(1) if feature == "mean" else hidden[:, 0]


def full_view(model: Any, batch: Batch, feature: str = "cls") -> Tensor:
    """Features [B, D] of whole samples, of a masked auto-encoder of transformers."""
    if "input_ids" in batch:
        return pick(model.base_model(input_ids=batch["input_ids"]).last_hidden_state, feature)
    if isinstance(model.vit, MaskedDINOv2):
        return pick(model.vit.dinov2(batch["pixel_values"]).last_hidden_state, feature)
    pixels, ratio = batch["pixel_values"], model.config.mask_ratio
    order = torch.arange(batch["noise"].shape[1], device=pixels.device).float()
    model.config.mask_ratio = 0.0
    hidden = model.vit(pixels, noise=order.expand(len(pixels), -1)).last_hidden_state
    model.config.mask_ratio = ratio
    return pick(hidden, feature)


def masked_loss(model: Any, batch: Batch) -> Tensor:
    """L_MAE of a masked auto-encoder of transformers."""
    if "input_ids" in batch:
        loss: Tensor = model(input_ids=batch["masked_ids"], labels=batch["targets"]).loss
        return loss
    loss = model(batch["pixel_values"], noise=batch["noise"]).loss
    return loss


def classifier(name: str) -> Any:
    """Transformers' classifier on the encoder of seed 0."""
    base = network(name, 0)
    config = config_of(name)
    config.num_labels = CLASSES
    if name in ("dinov2_small", "minilm"):
        encoder = base.vit.dinov2 if name == "dinov2_small" else base.base_model
        model = Pooled(encoder.requires_grad_(True), SIZES[name].feature)
        last = model.classifier
    elif SIZES[name].kind == "image":
        shared = {k: v for k, v in config.to_dict().items() if k in ViTConfig().to_dict()}
        shared.pop("model_type", None)
        model = ViTForImageClassification(ViTConfig(**shared))
        model.vit.load_state_dict(base.vit.state_dict(), strict=True)
        last = model.classifier
    else:
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        model.base_model.load_state_dict(base.base_model.state_dict(), strict=True)
        last = model.classifier.out_proj
    with torch.no_grad():
        last.weight.copy_(head(last.weight.shape[1]))
        last.bias.zero_()
    return model


def classify_loss(model: Any, batch: Batch) -> Tensor:
    """Cross-entropy of a classifier of transformers."""
    if "input_ids" in batch:
        loss: Tensor = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        return loss
    loss = model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
    return loss


def make(
    name: str, stage: Stage, lr: float, device: torch.device, *, autocast: bool = False
) -> Callable[[Batch], Tensor]:
    """One step of the plain loop on a batch; it returns the loss.

    Args:
        name: of a size.
        stage: which.
        lr: learning rate.
        device: where it runs.
        autocast: forward passes under torch's autocast to bf16.
    """
    student = classifier(name) if stage == "finetune" else network(name, 0)
    student.to(device).train()
    teacher = network(name, 1).to(device).eval() if stage == "distill" else None
    feature = SIZES[name].feature
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.01, betas=(0.9, 0.95))

    def passing() -> Any:
        return torch.autocast(device.type, torch.bfloat16, enabled=autocast)

    def step(batch: Batch) -> Tensor:
        batch = {k: v.to(device) for k, v in batch.items()}
        if stage == "finetune":
            with passing():
                loss = classify_loss(student, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
        else:
            with passing():
                loss = masked_loss(student, batch)
            loss.backward()
            if teacher is not None:
                with torch.no_grad(), passing():
                    target = full_view(teacher, batch, feature)
                with passing():
                    distance = (full_view(student, batch, feature) - target).pow(2).sum(-1).mean()
                distance.backward()
                loss = loss + distance
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step
