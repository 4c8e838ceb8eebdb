"""Models and batches that all contestants of `benchmarks.step` share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    BertConfig,
    RobertaConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from benchmarks import dinov2
from selfdistill.engine.models.images.found import IMAGENET_MEAN, IMAGENET_STD

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

Stage = Literal["pretrain", "distill", "finetune"]
Batch = dict[str, Tensor]

#: Different batches, which repeat: enough that none stays in a cache of the processor.
BATCHES = 4

#: Outputs of the classifier in fine-tuning.
CLASSES = 10


@dataclass(frozen=True)
class Size:
    """A model and its batch.

    Attributes:
        kind: image or text.
        title: for the table.
        batch: samples of a step, in stages 1 and 2; half of it in fine-tuning.
        length: tokens of a text.
        feature: that is distilled and classified, as the recipes say.
    """

    kind: Literal["image", "text"]
    title: str
    batch: int
    length: int = 0
    feature: Literal["cls", "mean"] = "cls"


SIZES = {
    "tiny": Size("image", "ViT 32 x 2, 16 pixels", 8),
    "small": Size("image", "ViT 192 x 6, 64 pixels", 64),
    "vit_base": Size("image", "ViT-B/16, 224 pixels", 64),
    "dinov2_small": Size("image", "DINOv2-S/14, 112 pixels", 16),
    "tiny_text": Size("text", "RoBERTa 32 x 2, 16 tokens", 8, 16),
    "small_text": Size("text", "RoBERTa 192 x 4, 48 tokens", 32, 48),
    "roberta_base": Size("text", "RoBERTa-base, 128 tokens", 16, 128),
    "minilm": Size("text", "MiniLM 384 x 6, 128 tokens", 16, 128, "mean"),
}


def config_of(name: str) -> Any:
    """Transformers' configuration of a size; no dropout, so that all losses are comparable."""
    if name in ("small", "small_text"):
        config = AutoConfig.from_pretrained(
            RECIPES / {"small": "vit_small", "small_text": "roberta_small"}[name]
        )
    elif name == "vit_base":
        config = ViTMAEConfig()
    elif name == "dinov2_small":  # with MAE's decoder, 512 x 8
        config = ViTMAEConfig(
            image_size=112,
            patch_size=14,
            hidden_size=384,
            num_attention_heads=6,
            intermediate_size=1536,
            layer_norm_eps=1e-6,
            norm_pix_loss=True,
        )
    elif name == "minilm":
        config = BertConfig(
            hidden_size=384,
            num_hidden_layers=6,
            intermediate_size=1536,
            bos_token_id=101,
            eos_token_id=102,
        )
    elif name == "tiny":
        config = ViTMAEConfig(
            image_size=16,
            patch_size=4,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        )
    else:
        tiny = name == "tiny_text"
        config = RobertaConfig(
            vocab_size=100 if tiny else 50_265,
            hidden_size=32 if tiny else 768,
            num_hidden_layers=2 if tiny else 12,
            num_attention_heads=2 if tiny else 12,
            intermediate_size=64 if tiny else 3072,
            max_position_embeddings=66 if tiny else 514,
            type_vocab_size=1,
        )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


def network(name: str, seed: int) -> Any:
    """Transformers' masked auto-encoder with the weights of a seed, the same for everybody."""
    torch.manual_seed(seed)
    config = config_of(name)
    if name == "dinov2_small":
        return dinov2.autoencoder(config)
    if SIZES[name].kind == "image":
        return ViTMAEForPreTraining(config)
    return AutoModelForMaskedLM.from_config(config, dtype=torch.float32)


def head(width: int) -> Tensor:
    """Weight of the classifier, [classes, width]; its bias is zero."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(CLASSES, width, generator=generator) * 0.02


def batches(name: str, batch: int) -> list[Batch]:
    """What our loader gives: images uint8 [b, 3, S, S] and noise, or token ids; labels and ids."""
    size, config = SIZES[name], config_of(name)
    generator = torch.Generator().manual_seed(3)

    def integers(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    found = []
    for number in range(BATCHES):
        common = {
            "labels": integers(CLASSES, batch),
            "ids": torch.arange(number * batch, (number + 1) * batch),
        }
        if size.kind == "image":
            side, patches = config.image_size, (config.image_size // config.patch_size) ** 2
            pixels = integers(256, batch, 3, side, side).to(torch.uint8)
            noise = torch.rand(batch, patches, generator=generator)
            found.append(common | {"images": pixels, "noise": noise})
            continue
        ids = integers(config.vocab_size, batch, size.length, low=5)
        ids[:, 0], ids[:, -1] = config.bos_token_id, config.eos_token_id
        chosen = torch.rand(ids.shape, generator=generator) < 0.15
        chosen[:, 0] = chosen[:, -1] = False
        at = chosen.flatten().nonzero()[:, 0]
        found.append(
            common
            | {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "masked_ids": ids.masked_fill(chosen, config.vocab_size - 1),
                "masked_at": at,
                "originals": ids.flatten()[at],
            }
        )
    return found


def for_transformers(name: str, batch: Batch) -> Batch:
    """A batch as the peers take it: pixels normalised beforehand, labels of masked tokens.

    The masks' noise is given as whole numbers, its ranks: the `Trainer` casts numbers with a point
    to bf16, where many are equal.
    """
    if SIZES[name].kind == "image":
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (batch["images"].float() / 255 - mean) / std
        noise = batch["noise"].argsort(dim=1).argsort(dim=1)
        return {"pixel_values": pixels, "noise": noise, "labels": batch["labels"]}
    ids = batch["input_ids"]
    targets = torch.full_like(ids, -100).flatten()
    targets[batch["masked_at"]] = batch["originals"]
    return {
        "input_ids": ids,
        "masked_ids": batch["masked_ids"],
        "targets": targets.view_as(ids),
        "labels": batch["labels"],
    }
