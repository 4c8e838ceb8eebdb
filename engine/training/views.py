"""Views of the data: masks, flips, crops; random numbers keyed by position in the stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from selfdistill.data import rng
from selfdistill.data.formats.images import Size, sides
from selfdistill.data.loading.datasets import Keyed

#: Of a crop to fit, as torchvision has it.
_TRIES = 10


@dataclass(frozen=True)
class MaskNoise:
    """Noise whose ranks choose the visible patches; `noise` fp32 [b, patches]."""

    seed: int
    patches: int

    def __call__(self, positions: np.ndarray, _: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Noise of the given stream positions, int64 [b]."""
        return {"noise": rng.uniform(self.seed, "mask", positions, self.patches)}


@dataclass(frozen=True)
class Flips:
    """Horizontal flips with probability 1/2; `flip` bool [b]."""

    seed: int

    def __call__(self, positions: np.ndarray, _: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Flips of the given stream positions, int64 [b]."""
        return {"flip": rng.uniform(self.seed, "flip", positions, 1)[:, 0] < 0.5}


@dataclass(frozen=True)
class Crops:
    """Random crops, resized to the image's size; `images` uint8 [b, C, H, W].

    The distribution is that of torchvision's `RandomResizedCrop` (Szegedy et al. 2015): the area's
    share uniform between two bounds, the logarithm of the ratio of the sides between those of 3/4
    and 4/3, ten tries to fit, else the whole image. The ratio is that to the image's own, so that
    rectangles are stretched no more than squares.

    Attributes:
        seed: of the run.
        smallest: share of the image's area.
        largest: likewise.
    """

    seed: int
    smallest: float
    largest: float

    def __call__(self, positions: np.ndarray, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Crops of the images at the given stream positions, int64 [b]."""
        images = batch["images"]
        size = images.shape[-2:]
        parts = (
            image[None, :, top : top + height, left : left + width]
            for image, (top, left, height, width) in zip(
                images, self.boxes(positions, (size[0], size[1])).tolist(), strict=True
            )
        )
        resized = [F.interpolate(part, size, mode="bicubic", antialias=True) for part in parts]
        return {"images": torch.cat(resized).numpy()}

    def boxes(self, positions: np.ndarray, size: Size) -> np.ndarray:
        """Top, left, height and width of the crops, int64 [b, 4].

        Args:
            positions: int64 [b], in the stream.
            size: of an image, in pixels.
        """
        draws = rng.uniform(self.seed, "crop", positions, 4 * _TRIES).astype(np.float64)
        share, ratio, down, across = np.moveaxis(draws.reshape(-1, _TRIES, 4), 2, 0)
        height, width = sides(size)
        area = height * width * (self.smallest + share * (self.largest - self.smallest))
        aspect = (4 / 3) ** (2 * ratio - 1) * (width / height)
        sizes = np.rint(np.sqrt(np.stack([area / aspect, area * aspect], axis=2)))
        corners = np.floor(np.stack([down, across], axis=2) * ((height, width) - sizes + 1))
        fits: np.ndarray = np.all((sizes > 0) & (sizes <= (height, width)), axis=2)
        boxes = np.concatenate([corners, sizes], axis=2)[np.arange(len(fits)), fits.argmax(1)]
        whole = np.array([0, 0, height, width])
        return np.where(fits.any(axis=1, keepdims=True), boxes, whole).astype(np.int64)


@dataclass(frozen=True)
class Augment:
    """torchvision's transforms of images, one by one; `images` uint8 [b, C, H, W].

    `light`: a random crop of half to all of the area, brightness, contrast and saturation.
    `strong`: one of a quarter to all, TrivialAugment (Müller & Hutter 2021), and of every fourth
    image a rectangle erased. Flips are `Flips`. torchvision draws from torch's own generator: each
    image's draws begin at a seed that its position gives, and the generator is then put back.

    Attributes:
        seed: of the run.
        kind: which.
        crop: shares of the area that crops have, in place of those above.
    """

    seed: int
    kind: Literal["light", "strong"]
    crop: tuple[float, float] | None = None

    def __call__(self, positions: np.ndarray, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Images at the given stream positions, int64 [b]."""
        images = batch["images"]
        transform = _transforms(self.kind, self.crop, tuple(images.shape[-2:]))
        before = torch.default_generator.get_state()
        try:
            found = []
            for image, position in zip(images, positions.tolist(), strict=True):
                bits = rng.bits(self.seed, "augment", position)
                torch.default_generator.manual_seed(int(bits.random_raw()) >> 1)
                found.append(transform(image))
        finally:
            torch.default_generator.set_state(before)
        return {"images": torch.stack(found).numpy()}


@functools.lru_cache(maxsize=8)
def _transforms(
    kind: Literal["light", "strong"], crop: tuple[float, float] | None, size: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    """The transforms of `Augment` for images of one size, in pixels."""
    from torchvision.transforms import v2  # a second to import

    height, width = size
    ratio = (3 / 4 * width / height, 4 / 3 * width / height)  # about the image's own
    scale = crop or ((0.5, 1.0) if kind == "light" else (0.25, 1.0))
    cropped = v2.RandomResizedCrop((height, width), scale, ratio, v2.InterpolationMode.BICUBIC)
    if kind == "light":
        more = [v2.ColorJitter(0.3, 0.3, 0.3)]
    else:
        more = [v2.TrivialAugmentWide(), v2.RandomErasing(p=0.25)]
    whole: Callable[[Tensor], Tensor] = v2.Compose([cropped, *more])
    return whole


@dataclass(frozen=True)
class Mixes:
    """How neighbours of a batch are mixed: mixup (Zhang et al. 2018), CutMix (Yun et al. 2019).

    Of each sample: `share` fp32 [b], of its own label; `blend` fp32 [b], of its own pixels; `box`
    int64 [b, 4], top, left, bottom and right of what is its neighbour's, empty under mixup. Shares
    are drawn from Beta(alpha, alpha). With both, a coin of each sample's decides.

    Attributes:
        seed: of the run.
        mixup: alpha; 0 for none.
        cutmix: alpha; 0 for none.
    """

    seed: int
    mixup: float
    cutmix: float

    def __call__(self, positions: np.ndarray, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Mixtures of the images at the given stream positions, int64 [b]."""
        from scipy.special import betaincinv  # a tenth of a second to import

        height, width = batch["images"].shape[-2:]
        draws = rng.uniform(self.seed, "mix", positions, 4).astype(np.float64)
        cut = draws[:, 0] < (0.5 if self.mixup else 1.0) if self.cutmix else draws[:, 0] < 0
        alpha = np.where(cut, self.cutmix or 1.0, self.mixup or 1.0)
        share = betaincinv(alpha, alpha, draws[:, 1])
        # A box of the share that is the neighbour's, about a point of the image, cut at its edges.
        side = np.sqrt(1 - share)[:, None] * (height, width)
        centre = draws[:, 2:] * (height, width)
        low = np.rint(np.clip(centre - side / 2, 0, (height, width)))
        high = np.rint(np.clip(centre + side / 2, 0, (height, width)))
        box = np.where(cut[:, None], np.concatenate([low, high], axis=1), 0).astype(np.int64)
        left = 1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (height * width)
        return {
            "share": np.where(cut, left, share).astype(np.float32),
            "blend": np.where(cut, 1.0, share).astype(np.float32),
            "box": box,
        }


@dataclass(frozen=True)
class TwoFlips:
    """Independent horizontal flips of two views; `flip` and `other_flip` bool [b]."""

    seed: int

    def __call__(self, positions: np.ndarray, _: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Flips of the given stream positions, int64 [b]."""
        chosen = rng.uniform(self.seed, "two flips", positions, 2) < 0.5
        return {"flip": chosen[:, 0], "other_flip": chosen[:, 1]}


@dataclass(frozen=True)
class NoiseKeys:
    """Seeds of noise that the device draws; `noise_key` int64 [b].

    Of texts also `noise_length` int64 [b], the tokens of each: how far they are padded depends on
    the batch. And where they share rows `noise_at` int64 [b], the place of each one's first token
    in the flattened rows.
    """

    seed: int

    def __call__(self, positions: np.ndarray, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """Seeds of the given stream positions, int64 [b]."""
        raw = [int(rng.bits(self.seed, "noise", int(p)).random_raw()) >> 1 for p in positions]
        found = {"noise_key": np.array(raw, dtype=np.int64)}
        if "attention_mask" in batch:
            found["noise_length"] = batch["attention_mask"].sum(1).numpy()
        if "packed_to" in batch:
            found["noise_at"] = batch["packed_to"][:, 0].numpy()
        return found


@dataclass(frozen=True)
class Together:
    """Several views' numbers, under their own names."""

    parts: tuple[Keyed, ...]

    def __call__(self, positions: np.ndarray, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The numbers of all parts."""
        found: dict[str, np.ndarray] = {}
        for part in self.parts:
            found |= part(positions, dict(batch))
        return found


@dataclass(frozen=True)
class MaskTokens:
    """Masked tokens of a text batch, chosen with one probability (0.15 in BERT and RoBERTa).

    Special tokens and padding, which the batch's `maskable` names, are never chosen. A text may
    have none chosen. Policy `mask` puts the mask token everywhere, as the paper states; `bert` puts
    it in 8 of 10 places, a random token in 1, and leaves 1 as it is (Devlin et al. 2019). Where the
    batch has `words`, words are chosen with the same probability, and all their tokens with them.

    Attributes:
        seed: of the run.
        ratio: the probability.
        policy: mask or bert.
        mask_id: id of the mask token.
        vocabulary: ids from which random tokens are drawn, 0 to this.
    """

    seed: int
    ratio: float
    policy: Literal["mask", "bert"]
    mask_id: int
    vocabulary: int

    def __call__(self, positions: np.ndarray, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The masked view of a batch.

        Args:
            positions: int64 [b], in the stream.
            batch: `input_ids` int64 [b, T], `maskable` bool [b, T], perhaps `words` int64 [b, T].

        Returns:
            masked_ids int64 [b, T]; masked_at int64 [n], places in the flattened batch; originals
            int64 [n], the ids there.
        """
        ids, maskable = batch["input_ids"].numpy(), batch["maskable"].numpy()
        noise = rng.uniform(self.seed, "mask", positions, ids.shape[1])
        first, drawn = np.ones_like(maskable), noise
        if "words" in batch:
            words = batch["words"].numpy()
            first[:, 1:] = words[:, 1:] != words[:, :-1]
            begin = np.maximum.accumulate(np.where(first, np.arange(ids.shape[1]), 0), axis=1)
            drawn = np.take_along_axis(noise, begin, axis=1)  # a word's is its first token's
        chosen = (drawn < self.ratio) & maskable
        masked = np.where(chosen, self.mask_id, ids)
        if self.policy == "bert":
            # What is done is drawn for each token. Below the ratio the noise is uniform too: its
            # place there says it. That of a word's other tokens has not been looked at.
            share = np.where(first, noise / self.ratio, noise)
            draws = rng.uniform(self.seed, "random token", positions, ids.shape[1])
            random = (draws * self.vocabulary).astype(np.int64)
            masked = np.where(chosen & (share >= 0.8), random, masked)
            masked = np.where(chosen & (share >= 0.9), ids, masked)
        places = np.flatnonzero(chosen)
        return {
            "masked_ids": masked.astype(np.int64),
            "masked_at": places,
            "originals": ids.reshape(-1)[places],
        }
