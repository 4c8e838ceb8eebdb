"""The plain loop doing the work of a whole run: `python -m benchmarks.peers.whole`.

Further pre-training, distillation from a fresh copy, fine-tuning with several seeds, scores of
validation and test, weights saved after each stage; by transformers' models, torchvision's
ImageFolder and torch's DataLoader and AdamW, in fp32.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTMAEForPreTraining,
    get_linear_schedule_with_warmup,
)

from benchmarks.peers.plain import full_view
from selfdistill.data import cli
from selfdistill.engine.models.images.found import IMAGENET_MEAN, IMAGENET_STD


def endless(batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from batches


def optimizer_of(model: Any, settings: dict[str, Any], steps: int) -> tuple[Any, Any]:
    """AdamW, with linear warm-up and decay to 0."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, settings["lr"], tuple(settings["betas"]), weight_decay=settings["weight_decay"]
    )
    return optimizer, get_linear_schedule_with_warmup(optimizer, settings["warmup"], steps)


def further(model: Any, teacher: Any, batches: Any, settings: dict[str, Any]) -> None:
    """Stage 1, or with a teacher stage 2: two backward calls, the teacher run at every step."""
    steps = settings["steps"]
    optimizer, schedule = optimizer_of(model, settings, steps)
    source, patches = endless(batches), (model.config.image_size // model.config.patch_size) ** 2
    feature = full_view if settings.get("feature") == "cls" else mean_view
    model.train()
    for step in range(steps):
        batch = {"pixel_values": next(source)[0]}
        batch["noise"] = torch.rand(len(batch["pixel_values"]), patches)
        loss = model(batch["pixel_values"], noise=batch["noise"]).loss
        loss.backward()
        if teacher is not None:
            with torch.no_grad():
                target = feature(teacher, batch)
            distance = (feature(model, batch) - target).pow(2).sum(-1).mean()
            distance.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)


def mean_view(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the patches' vectors [B, D] of whole images."""
    ratio, model.config.mask_ratio = model.config.mask_ratio, 0.0
    hidden: Tensor = model.vit(batch["pixel_values"]).last_hidden_state
    model.config.mask_ratio = ratio
    return hidden[:, 1:].mean(1)


@torch.no_grad()
def accuracy(forward: Any, batches: Any) -> float:
    """Share of a split's images whose class is found."""
    right, count = 0, 0
    for images, labels in batches:
        right += int((forward(images).argmax(1) == labels).sum())
        count += len(labels)
    return right / count


def finetune(base: Any, sets: dict[str, Any], settings: dict[str, Any], seed: int) -> Any:
    """Stage 3 with one seed; it returns the model and its scores."""
    torch.manual_seed(seed)
    known = ViTConfig().to_dict()
    shared = {k: v for k, v in base.config.to_dict().items() if k in known and k != "model_type"}
    classes = len(sets["train"].dataset.classes)
    model = ViTForImageClassification(ViTConfig(**shared | {"num_labels": classes}))
    model.vit.load_state_dict(base.vit.state_dict(), strict=True)

    def logits(images: Tensor) -> Tensor:
        if settings["pool"] == "cls":
            found: Tensor = model(images).logits
            return found
        scores: Tensor = model.classifier(model.vit(images).last_hidden_state[:, 1:].mean(1))
        return scores

    optimizer, schedule = optimizer_of(model, settings, settings["steps"])
    source = endless(sets["train"])
    model.train()
    for _ in range(settings["steps"]):
        images, labels = next(source)
        loss = torch.nn.functional.cross_entropy(logits(images), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"] or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return model, {name: accuracy(logits, sets[name]) for name in ("val", "test")}


def main(folder: str, model: str, image_size: int, settings: str, out: str) -> None:
    """Runs all stages and prints seconds and scores as JSON.

    Args:
        folder: holds pool, train, val and test, each of class folders.
        model: transformers' ViTMAE to start from.
        image_size: in pixels.
        settings: JSON file: pretrain, distill and finetune as in a recipe.
        out: folder for weights.
    """
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    began = time.perf_counter()
    told = json.loads(Path(settings).read_text(encoding="utf-8"))
    steps = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]

    def images(split: str, batch: int, train: bool) -> Any:
        return DataLoader(
            ImageFolder(f"{folder}/{split}", transforms.Compose(steps)),
            batch_size=batch,
            shuffle=train,
            drop_last=train,
            num_workers=2,
            persistent_workers=True,
        )

    def start() -> Any:
        return ViTMAEForPreTraining.from_pretrained(
            model, image_size=image_size, ignore_mismatched_sizes=True, dtype=torch.float32
        )

    pool = images("pool", told["pretrain"]["batch"], True)
    seconds: dict[str, float] = {"start": time.perf_counter() - began}
    teacher = start()
    further(teacher, None, pool, told["pretrain"])
    teacher.save_pretrained(f"{out}/pretrain")
    seconds["pretrain"] = time.perf_counter() - began
    student = start()
    further(student, teacher.eval(), pool, told["distill"])
    student.save_pretrained(f"{out}/distill")
    seconds["distill"] = time.perf_counter() - began
    batch = told["finetune"]["batch"]
    sets = {s: images(s, batch, s == "train") for s in ("train", "val", "test")}
    scores = []
    for seed in range(told["finetune"]["seeds"]):
        tuned, found = finetune(student, sets, told["finetune"], seed)
        tuned.save_pretrained(f"{out}/finetune-{seed}")
        scores.append(found)
    seconds["finetune"] = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "scores": scores}), flush=True)


if __name__ == "__main__":
    cli.run(main)
