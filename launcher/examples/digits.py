"""A real image set that every installation carries: scikit-learn's handwritten digits."""

from pathlib import Path

import numpy as np
from PIL import Image

#: Images of the train split for each digit; VALIDATION more for val; the rest is the test split.
LABELLED, VALIDATION = 20, 10

#: Side in pixels to which the 8x8 digits are enlarged.
SIZE = 32


def write(folder: Path, seed: int = 0) -> None:
    """Writes the 1,797 digits (8x8 grey, UCI's handwritten digits) as class folders of PNGs.

    Args:
        folder: gets {train,val,test}/DIGIT/NUMBER.png.
        seed: of the draw of labelled images.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    for digit in range(10):
        numbers = [i for i in order if digits.target[i] == digit]
        parts = {
            "train": numbers[:LABELLED],
            "val": numbers[LABELLED : LABELLED + VALIDATION],
            "test": numbers[LABELLED + VALIDATION :],
        }
        for split, chosen in parts.items():
            target = folder / split / str(digit)
            target.mkdir(parents=True, exist_ok=True)
            for i in chosen:
                pixels = np.uint8(np.rint(digits.images[i] * (255 / 16)))
                Image.fromarray(pixels).save(target / f"{i:04d}.png")
