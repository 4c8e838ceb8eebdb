"""Tiny trees in each official layout, packed through the real command and read back."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from PIL import Image

from selfdistill.data.errors import UserError
from selfdistill.data.formats import images
from selfdistill.data.loading.reader import Reader
from selfdistill.data.pack import pack
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.sources import layouts
from tests.kit.command import call
from tests.kit.shards import number_of, numbered

SIDE = 40  # of the made pictures; twice the banner's rows


def picture(path: Path, number: int) -> None:
    """A picture that carries a number, without loss whatever its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered(number, SIDE).save(path, format="PNG")


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def read(root: Path, split: str) -> dict[int, str]:
    """For each picture's number the name of its class."""
    file = Manifest.load(str(root / split))
    found = {}
    for record in Reader(file).read(np.arange(file.samples)):
        found[number_of(images.decode(record.input, None))] = file.classes[record.label]
    return found


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    text(data / "variants.txt", "707-320", "F/A-18", "A340-300")
    rows = {
        "train": [(1, "707-320"), (2, "F/A-18"), (3, "A340-300")],
        "val": [(4, "707-320"), (5, "F/A-18")],
        "test": [(6, "A340-300")],
    }
    for split, listed in rows.items():
        text(data / f"images_variant_{split}.txt", *(f"{n:07d} {v}" for n, v in listed))
        for number, _ in listed:
            path = data / "images" / f"{number:07d}.jpg"
            picture(path, number)
            image = Image.open(path)
            image.paste((1, 2, 3), (0, SIDE - 20, SIDE, SIDE))  # the banner
            image.save(path, format="PNG")


def cub(root: Path) -> None:
    data = root / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    text(data / "classes.txt", *(f"{i} {n}" for i, n in enumerate(names, 1)))
    rows = [(1, 1, 0), (2, 1, 1), (3, 2, 1), (4, 2, 0), (5, 2, 1)]  # image, class, is train
    text(data / "images.txt", *(f"{i} {names[c - 1]}/{i}.jpg" for i, c, _ in rows))
    text(data / "image_class_labels.txt", *(f"{i} {c}" for i, c, _ in rows))
    text(data / "train_test_split.txt", *(f"{i} {t}" for i, _, t in rows))
    for number, label, _ in rows:
        picture(data / "images" / names[label - 1] / f"{number}.jpg", number)


def xray(root: Path) -> None:
    number = 0
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for name in ("NORMAL", "PNEUMONIA"):
            folder = root / "chest_xray" / split / name
            for _ in range(count):
                number += 1
                picture(folder / f"IM-{number:04d}.jpeg", number)
            text(folder / ".DS_Store", "leftover")
            text(folder / f"._IM-{number:04d}.jpeg", "leftover")
    text(root / "__MACOSX" / "chest_xray" / "train" / "NORMAL" / "._x.jpeg", "leftover")


def dtd(root: Path) -> None:
    data = root / "dtd"
    text(data / "images" / "banded" / ".directory", "leftover")
    for fold in (1, 2):
        shift = fold - 1
        for split, numbers in (("train", (1, 2)), ("val", (3, 4)), ("test", (5, 6))):
            numbers = tuple((n - 1 + 2 * shift) % 6 + 1 for n in numbers)
            names = [("banded", "zigzagged")[n % 2] for n in numbers]
            rows = [f"{c}/{c}_{n:04d}.jpg" for c, n in zip(names, numbers, strict=True)]
            text(data / "labels" / f"{split}{fold}.txt", *rows)
            for name, number in zip(rows, numbers, strict=True):
                picture(data / "images" / name, number)


def dogs(root: Path, lists: str = "lists") -> None:
    breeds = ["n02085620-Chihuahua", "n02085782-Japanese_spaniel"]
    for split, numbers in (("train", (1, 2, 3)), ("test", (4, 5))):
        names, labels = [], []
        for number in numbers:
            breed = breeds[number % 2]
            names.append(f"{breed}/{breed[:9]}_{number}.jpg")
            labels.append(number % 2 + 1)
            picture(root / "Images" / names[-1], number)
        cells = np.empty((len(names), 1), dtype=object)
        cells[:, 0] = names
        (root / lists).mkdir(exist_ok=True)
        labels_column = np.array(labels, dtype=np.uint8)[:, None]
        scipy.io.savemat(
            root / lists / f"{split}_list.mat", {"file_list": cells, "labels": labels_column}
        )


def flowers(root: Path) -> None:
    labels = np.array([[2, 1, 1, 2, 3, 3, 1]], dtype=np.uint8)
    root.mkdir(exist_ok=True)
    scipy.io.savemat(root / "imagelabels.mat", {"labels": labels})
    ids = {"trnid": [[1, 2, 5]], "valid": [[3, 4]], "tstid": [[6, 7]]}
    scipy.io.savemat(root / "setid.mat", {k: np.array(v, np.uint16) for k, v in ids.items()})
    for number in range(1, 8):
        picture(root / "jpg" / f"image_{number:05d}.jpg", number)


def cifar100(root: Path) -> None:
    data = root / "cifar-100-binary"
    text(data / "fine_label_names.txt", "apple", "bear", "cattle")
    for split, numbers in (("train", (1, 2, 3, 4)), ("test", (5, 6))):
        content = b""
        for number in numbers:
            planes = np.asarray(numbered(number, 32)).transpose(2, 0, 1)
            content += bytes([19, number % 3]) + planes.tobytes()
        (data / f"{split}.bin").write_bytes(content)


def elpv(root: Path) -> None:
    data = root / "elpv_dataset" / "data"
    told = ["0.0", "0.3333333333333333", "0.6666666666666666", "1.0"]
    rows = [(n, told[n % 4], "mono" if n % 3 else "poly") for n in range(1, 41)]
    text(data / "labels.csv", *(f"images/cell{n:04d}.png  {p:20s}{k}" for n, p, k in rows))
    for number, _, _ in rows:
        picture(data / "images" / f"cell{number:04d}.png", number)


MAKE: dict[str, Callable[[Path], None]] = {
    "aircraft": aircraft,
    "cub": cub,
    "xray": xray,
    "dtd": dtd,
    "dogs": dogs,
    "flowers": flowers,
    "cifar100": cifar100,
}
A, B = "001.Black_footed_Albatross", "002.Laysan_Albatross"
N, P = "NORMAL", "PNEUMONIA"
Z = "zigzagged"
CELLS = ["0.00", "0.33", "0.67", "1.00"]
C, J = "Chihuahua", "Japanese_spaniel"
EXPECTED: dict[str, dict[str, dict[int, str]]] = {
    "aircraft": {
        "train": {1: "707-320", 2: "F/A-18", 3: "A340-300"},
        "val": {4: "707-320", 5: "F/A-18"},
        "test": {6: "A340-300"},
    },
    "cub": {"train": {2: A, 3: B, 5: B}, "test": {1: A, 4: B}},
    "xray": {
        "train": {1: N, 2: N, 3: N, 4: P, 5: P, 6: P},
        "val": {7: N, 8: P},
        "test": {9: N, 10: N, 11: P, 12: P},
    },
    "dtd": {
        "train": {1: Z, 2: "banded"},
        "val": {3: Z, 4: "banded"},
        "test": {5: Z, 6: "banded"},
    },
    "dogs": {"train": {1: J, 2: C, 3: J}, "test": {4: C, 5: J}},
    "flowers": {
        "train": {1: "002", 2: "001", 5: "003"},
        "val": {3: "001", 4: "002"},
        "test": {6: "003", 7: "001"},
    },
    "cifar100": {
        "train": {1: "bear", 2: "cattle", 3: "apple", 4: "bear"},
        "test": {5: "cattle", 6: "apple"},
    },
}


def packed(source: Path, out: Path, *options: object) -> dict[str, dict[int, str]]:
    """What the packed set holds, split by split."""
    assert call(pack, source, out, *options) == 0
    return {split.name: read(out, split.name) for split in out.iterdir() if split.is_dir()}


@pytest.mark.parametrize("name", MAKE)
def test_official_layout_through_pack(name: str, tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    MAKE[name](root)
    assert layouts.detect(root) == name
    assert packed(root, tmp_path / "out") == EXPECTED[name]


@pytest.mark.parametrize("name", MAKE)
def test_the_inner_folder_does_too(name: str, tmp_path: Path) -> None:
    root = tmp_path / "source"
    root.mkdir()
    MAKE[name](root)
    shutil.rmtree(root / "__MACOSX", ignore_errors=True)
    inner = list(root.iterdir())
    inside = inner[0] if len(inner) == 1 else root
    assert layouts.detect(inside) == name
    assert set(layouts.load(name, inside).splits) == set(EXPECTED[name])


@pytest.mark.parametrize("inside", [".", "elpv_dataset", "elpv_dataset/data"])
def test_solar_cells_are_divided_class_by_class(inside: str, tmp_path: Path) -> None:
    elpv(tmp_path / "source")
    root = tmp_path / "source" / inside
    assert layouts.detect(root) == "elpv"
    found = packed(root, tmp_path / "out")
    assert {split: len(part) for split, part in found.items()} == {"train": 32, "val": 4, "test": 4}
    for part in found.values():
        assert all(CELLS[number % 4] == name for number, name in part.items())
        assert set(part.values()) == set(CELLS)
    assert packed(root, tmp_path / "again") == found


def test_not_every_list_beside_images_is_of_solar_cells(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "cell1.png", 1)
    for line in ("path,label", "images/cell1.png,mono", "images/cell1.png 0.5x mono"):
        text(tmp_path / "labels.csv", line)
        assert layouts.detect(tmp_path) is None, line
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe")
    assert layouts.detect(tmp_path) is None
    text(tmp_path / "labels.csv", "images/cell1.png 1.0 mono", "images/cell1.png 0.5 mono")
    with pytest.raises(UserError, match=r"line 2: .* is not a picture, a probability of 0, 1/3"):
        layouts.load("elpv", tmp_path)


def test_xrays_in_another_format(tmp_path: Path) -> None:
    """Sets that were made smaller keep the folders but seldom the format."""
    xray(tmp_path / "source")
    for path in (tmp_path / "source").rglob("IM-*.jpeg"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".webp"), lossless=True)
        path.unlink()
    assert packed(tmp_path / "source", tmp_path / "out") == EXPECTED["xray"]


@pytest.mark.parametrize(
    "more", ["train/COVID19/1.jpeg", "validation/NORMAL/1.jpeg", "train/NORMAL/patient7/1.jpeg"]
)
def test_other_xrays_are_not_taken_for_these(more: str, tmp_path: Path) -> None:
    """Many sets have these two classes: none of their pictures is passed over."""
    xray(tmp_path / "source")
    assert layouts.detect(tmp_path / "source") == "xray"
    picture(tmp_path / "source" / "chest_xray" / more, 50)
    assert layouts.detect(tmp_path / "source") is None


def test_aircraft_banner_is_cut_off_unless_told(tmp_path: Path) -> None:
    aircraft(tmp_path)
    assert call(pack, tmp_path, tmp_path / "cut", "--split", "test") == 0
    assert call(pack, tmp_path, tmp_path / "kept", "--split", "test", "--keep_banner") == 0
    cut, kept = (
        images.decode(Reader(Manifest.load(str(tmp_path / n / "test"))).record(0).input, None)
        for n in ("cut", "kept")
    )
    assert cut[:, -1, 0].tolist() == [6, 0, 77]
    assert kept[:, -1, 0].tolist() == [1, 2, 3]


def test_trainval_and_held_out_validation(tmp_path: Path) -> None:
    flowers(tmp_path / "f")
    expected = EXPECTED["flowers"]
    found = packed(tmp_path / "f", tmp_path / "tv", "--trainval")
    assert found == {"train": expected["train"] | expected["val"], "test": expected["test"]}
    cub(tmp_path / "c")
    held = packed(tmp_path / "c", tmp_path / "held", "--val_fraction", 0.5)
    assert held["test"] == EXPECTED["cub"]["test"]
    assert held["train"] | held["val"] == EXPECTED["cub"]["train"]
    assert set(held["train"].values()) == {A, B}  # train keeps one of each class
    again = packed(tmp_path / "c", tmp_path / "again", "--val_fraction", 0.5)
    assert again == held


def test_folds_of_dtd(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dtd(tmp_path)
    found = packed(tmp_path, tmp_path / "two", "--fold", 2)
    assert set(found["train"]) == {3, 4}
    assert set(found["test"]) == {1, 2}
    assert call(pack, tmp_path, tmp_path / "x", "--fold", 11) == 2
    assert "folds 1 to 10" in capsys.readouterr().err


def test_the_pickled_cifar_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "test", "meta"):
        text(tmp_path / "cifar-100-python" / name, "cos\nsystem\n(S'touch ran'\ntR.")
    assert call(pack, tmp_path, tmp_path / "out") == 2
    assert "cifar-100-binary.tar.gz" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def drop(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_text(content) and None


DATA = "fgvc-aircraft-2013b/data"
MISTAKES: list[tuple[str, Callable[[Path], None], tuple[object, ...], str]] = [
    ("aircraft", drop(f"{DATA}/images/0000003.jpg"), (), "1 of 3 images are missing"),
    ("aircraft", drop(f"{DATA}/images_variant_val.txt"), (), "images_variant_val.txt is missing"),
    ("aircraft", write(f"{DATA}/variants.txt", "707-320\n"), (), "class 'F/A-18' is not in"),
    ("aircraft", write(f"{DATA}/images_variant_val.txt", "7\n"), (), "line 1: '7' has one word"),
    ("cub", write("CUB_200_2011/train_test_split.txt", "1 1\n"), (), "image 2"),
    ("cub", write("CUB_200_2011/images.txt", "1 ../../x.jpg\n"), (), "outside of it"),
    ("cub", lambda root: None, ("--trainval",), "no official val split"),
    ("cub", lambda root: None, ("--fold", 2), "--fold has no meaning for CUB"),
    ("cub", lambda root: None, ("--val_fraction", 2), "between 0 and 1"),
    ("cub", lambda root: None, ("--splits", "0.5,0.5"), "splits of its own"),
    ("flowers", lambda root: None, ("--val_fraction", 0.1), "--trainval"),
    ("flowers", lambda root: None, ("--layout", "flower"), "Did you mean flowers?"),
    ("flowers", lambda root: None, ("--layout", "dogs"), "does not have the files of Stanford"),
    ("flowers", write("setid.mat", "text"), (), "no readable MATLAB file"),
    ("dogs", drop("lists/test_list.mat"), ("--layout", "dogs"), "does not have the files"),
    ("xray", drop("chest_xray/val/NORMAL/IM-0007.jpeg"), (), "has no pictures"),
    ("cifar100", write("cifar-100-binary/test.bin", "12"), (), "2 bytes, not 3074 for each"),
    ("cifar100", write("cifar-100-binary/fine_label_names.txt", "a\n"), (), "has label 2"),
]


@pytest.mark.parametrize(("name", "spoil", "options", "said"), MISTAKES)
def test_what_is_wrong_is_said_in_one_line(
    name: str,
    spoil: Callable[[Path], None],
    options: tuple[object, ...],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "source"
    root.mkdir()
    MAKE[name](root)
    spoil(root)
    capsys.readouterr()
    assert call(pack, root, tmp_path / "out", *options) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line
    assert not (tmp_path / "out").exists()


def test_options_of_layouts_on_plain_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(tmp_path / "images" / "ant" / "1.png", 1)
    assert call(pack, tmp_path / "images", tmp_path / "out", "--trainval") == 2
    assert "none of the known data sets" in capsys.readouterr().err
    assert call(pack, tmp_path / "images", tmp_path / "out", "--val_fraction", 0.1) == 2
    assert "--splits" in capsys.readouterr().err


def test_lists_of_dogs_beside_the_images(tmp_path: Path) -> None:
    dogs(tmp_path, lists=".")
    assert packed(tmp_path, tmp_path / "out") == EXPECTED["dogs"]
