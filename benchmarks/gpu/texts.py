"""RoBERTa-base on texts of mixed lengths: padded with a mask, and several in a row."""

from typing import Any

import numpy as np
import torch

from benchmarks import ours
from benchmarks.contestant import LR
from benchmarks.gpu.counted import tell
from benchmarks.gpu.say import failed
from benchmarks.sizes import Batch, config_of
from selfdistill.data import cli
from selfdistill.data.formats.texts import Texts
from selfdistill.engine.runtime.allocator import release
from selfdistill.engine.training.views import MaskTokens


def mixed(size: str, batch: int, longest: int, *, packed: bool) -> list[Batch]:
    """Batches as the loader gives them: lengths from 10% of the longest to it, a bell's shape."""
    config = config_of(size)
    codec = Texts(
        lambda *_: [],
        pad_id=config.pad_token_id,
        special_ids=frozenset({0, 1, 2}),
        max_length=longest,
        bucket=8,
        packed=packed,
    )
    masks = MaskTokens(0, 0.15, "mask", config.vocab_size - 1, config.vocab_size)
    generator = np.random.default_rng(0)
    found = []
    for number in range(4):
        shares = generator.normal(0.45, 0.2, batch).clip(0.1, 1.0)
        lengths = np.maximum((shares * longest).astype(int), 3)
        arrays = [generator.integers(5, config.vocab_size - 1, n) for n in lengths]
        for array in arrays:
            array[0], array[-1] = config.bos_token_id, config.eos_token_id
        out = codec.collate(arrays, [""] * batch)
        keyed = masks(np.arange(number * batch, (number + 1) * batch), out)
        out |= {k: torch.from_numpy(v) for k, v in keyed.items()}
        out |= {"labels": torch.zeros(batch, dtype=torch.int64), "ids": torch.arange(batch)}
        found.append(out)
    return found


def main(tiny: bool = False) -> None:
    """Times our distillation of texts.

    Args:
        tiny: the tiny size.
    """
    size, batch, longest = ("tiny_text", 8, 32) if tiny else ("roberta_base", 64, 128)
    name = f"distill, batch {64 if not tiny else 8}"
    ways: dict[str, tuple[bool, Any]] = {
        "padded, ready mask": (False, ()),
        "several in a row": (True, ()),
        "nothing padded, no mask": (False, ("attention_mask",)),
    }
    for way, (packed, whole) in ways.items():
        data = mixed(size, batch, longest, packed=packed)
        if whole:  # what a batch of one length would cost
            for entries in data:
                entries["attention_mask"] = torch.ones_like(entries["attention_mask"])
                entries["unpadded"] = torch.ones(batch, dtype=torch.bool)
        tokens = float(np.mean([int(b["attention_mask"].sum()) for b in data])) / batch
        try:
            step, engine = ours.make(
                size, "distill", LR, "bf16", data, zero="auto", teacher="cached", compiled=False
            )
            more: dict[str, Any] = {
                "tokens a text": tokens,
                "base": f"texts: {name}, padded, ready mask",
            }
            tell(f"{name}, {way}", step, batch, 0.2 if tiny else 3.0, **more)
            release(engine)
        except Exception as error:  # of any library: the others are timed all the same
            failed(f"{name}, {way}", error)


if __name__ == "__main__":
    cli.run(main)
