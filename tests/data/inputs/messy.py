"""Pictures as people have them: folders in folders, odd names, every mode, and what is none."""

from pathlib import Path

import numpy as np
from PIL import Image

#: Size in pixels of the models that the tests make for them.
SIDE = 16
CLASSES = ("blue", "green", "red")
_CHANNEL = {"red": 0, "green": 1, "blue": 2}


def picture(name: str, generator: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A noisy picture of a colour, light where it is grey: width, height."""
    pixels = generator.integers(0, 120, (size[1], size[0], 3), dtype=np.uint8)
    pixels[..., _CHANNEL[name]] += 100
    pixels[: size[1] // 2, :, _CHANNEL[name]] += 30  # up and down differ
    return Image.fromarray(pixels)


def save(image: Image.Image, folder: Path, number: int) -> Path:
    """A picture in one of eight forms."""
    form = number % 8
    name = ("plain", "with spaces", "größe ü", "日本", "CMYK", "turned", "deep", "alpha")[form]
    path = folder / f"{name} {number}{'.png' if form in (0, 3, 6, 7) else '.JPG'}"
    if form == 4:
        image.convert("CMYK").save(path, "JPEG", quality=95)
    elif form == 5:
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", exif=exif, quality=95)
    elif form == 6:  # 12 bits in a file of 16
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 16
        Image.fromarray(grey).save(path)
    elif form == 7:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(path)
    elif path.suffix == ".JPG":
        image.save(path, "JPEG", quality=95)
    else:
        image.save(path)
    return path


def make(root: Path, *, train: int = 16, other: int = 24) -> dict[str, str]:
    """Class folders with splits below `root`/set, and the test pictures once more in a mess.

    Returns:
        Of each readable picture below `root`/photos its class, by its path.
    """
    generator = np.random.default_rng(0)
    truth: dict[str, str] = {}
    photos = root / "photos"
    for split, count in (("train", train), ("val", 8), ("test", other)):
        for name in CLASSES:
            folder = root / "set" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                size = tuple(generator.integers(SIDE, 6 * SIDE, 2).tolist())
                path = save(picture(name, generator, size), folder, number)
                if split == "test":
                    deep = photos / ("a b/ü/c" if number % 2 else "d") / f"{name[0]}"
                    deep.mkdir(parents=True, exist_ok=True)
                    copy = deep / path.name
                    copy.write_bytes(path.read_bytes())
                    truth[str(copy)] = name
    whole = (root / "set/test/red/with spaces 1.JPG").read_bytes()
    (photos / "broken.jpg").write_bytes(whole[: len(whole) // 3])
    (photos / "empty.png").touch()
    (photos / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    (photos / "text.jpg").write_text("no picture")
    (photos / "notes.txt").write_text("notes")
    (photos / ".hidden.jpg").write_bytes(whole)
    (photos / "__MACOSX").mkdir()
    (photos / "__MACOSX/x.jpg").write_bytes(whole)
    return truth
