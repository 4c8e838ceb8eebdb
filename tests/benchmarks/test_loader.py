"""The loader's benchmark at a tiny size: fair contestants, and records that hold its figures."""

import io
import json
import multiprocessing
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.progress import Progress

from benchmarks.loader import __main__ as loader
from benchmarks.loader import peers as loader_peers
from benchmarks.loader import tables as loader_tables
from benchmarks.loader.peers import CONTESTANTS, Batches, Pictures
from selfdistill.data.errors import UserError
from selfdistill.data.loading.reader import Reader


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    return loader_peers.make(
        tmp_path_factory.mktemp("set"), 130, 16, "png", 2, Progress(disable=True)
    )


def test_every_form_holds_the_stored_bytes(pictures: Pictures) -> None:
    packed = Reader(pictures.manifest).read(np.arange(130))
    files = [path.read_bytes() for path in pictures.folder.glob("*/*.png")]
    assert [record.input for record in packed] == pictures.encoded
    assert sorted(files) == sorted(pictures.encoded)
    assert len(set(pictures.encoded)) == 130


def test_the_picture_drawn_is_the_picture_packed(pictures: Pictures) -> None:
    drawn = {loader_peers.picture(n, 16).tobytes(): n % 10 for n in range(130)}
    stored = {
        Image.open(io.BytesIO(content)).tobytes(): label
        for content, label in zip(pictures.encoded, pictures.labels, strict=True)
    }
    assert stored == drawn


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", CONTESTANTS)
def test_each_gives_every_image_once_in_an_epoch(
    pictures: Pictures, name: str, workers: int
) -> None:
    wanted = Counter(loader_peers.picture(n, 16).tobytes() + bytes([n % 10]) for n in range(130))
    got: Counter[bytes] = Counter()
    for images, labels in CONTESTANTS[name](pictures, workers, 2):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert images.shape[1:] == (3, 16, 16)
        assert 0 < len(images) == len(labels) <= loader_peers.BATCH
        upright = images.permute(0, 2, 3, 1).contiguous().numpy()
        got.update(i.tobytes() + bytes([int(n)]) for i, n in zip(upright, labels, strict=True))
    assert got == Counter({content: 2 * times for content, times in wanted.items()})
    assert not multiprocessing.active_children()


def test_the_check_sees_a_missing_a_doubled_and_an_altered_image(pictures: Pictures) -> None:
    whole = list(loader_peers.limit(pictures, 0, 1))

    def of(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> Batches:
        yield from batches

    loader_peers.check(pictures, "whole", of(whole))
    images, labels = whole[0]
    other = images.clone()
    other[5, 1, 2, 3] ^= 1
    for spoilt in (
        whole[1:],
        [*whole, (images[:1], labels[:1])],
        [(other, labels), *whole[1:]],
        [(images, labels.roll(1)), *whole[1:]],
    ):
        with pytest.raises(RuntimeError, match="spoilt"):
            loader_peers.check(pictures, "spoilt", of(spoilt))


@pytest.mark.parametrize("stored", ["jpeg", "webp"])
def test_files_kept_as_they_are_are_read_alike(tmp_path: Path, stored: loader_peers.Stored) -> None:
    kept = loader_peers.make(tmp_path, 64, 24, stored, 1, Progress(disable=True))
    assert Image.open(io.BytesIO(kept.encoded[0])).format == stored.upper()
    for name, contestant in CONTESTANTS.items():
        loader_peers.check(kept, name, contestant(kept, 0, 1))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_records_and_tables(tmp_path: Path, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    loader.main(images=64, size=16, workers=1, rounds=1, seconds=0.05, endurance=2000, out=str(out))
    found = json.loads((out / "loader.json").read_text())
    assert [row["contestant"] for row in found["throughput"]] == list(CONTESTANTS)
    for row in found["throughput"]:
        assert row["images_per_s"]["n"] == 1
        assert row["images_per_s"]["median"] > 0
        assert row["images_per_core_s"]["median"] > 0
    ours = {row["contestant"]: row["images_per_s"]["median"] for row in found["throughput"]}
    for ratio in found["ratios"].values():
        expected = ours[loader_peers.OURS] / ours[ratio["other"]]
        assert ratio["images_per_s"]["median"] == pytest.approx(expected)
    assert found["ratios"]["best_peer"]["other"] == max(loader_tables.PEERS, key=ours.__getitem__)
    assert {(row["workers"], row["step"]) for row in found["start"]} == {
        (workers, step) for workers in (0, 1) for step in (0, 10**6, 10**9)
    }
    assert found["endurance"]["samples"] == 2048
    assert [row["processes"] for row in found["endurance"]["rows"]] == [
        "this process",
        "workers",
        "together",
    ]
    for row in found["endurance"]["rows"]:
        assert row["mb_at_10"] > 1
        assert row["mb_at_100"] > 1
    text = (out / "loader.md").read_text()
    assert text.strip() in capfd.readouterr().out
    for name in (*CONTESTANTS, "(the best peer)", "MB per 10^6 samples"):
        assert name in text
    assert f"{found['ratios']['decode_limit']['images_per_s']['median']:.2f}" in text
    assert not list(here.iterdir())
    assert not multiprocessing.active_children()


def test_the_slope_is_that_of_a_line() -> None:
    watched = [(n * 50_000, 100 + n * 0.25, 50.0) for n in range(1, 21)]
    first, workers, together = loader_tables.endurance_rows(watched)
    assert first["mb_per_million"] == pytest.approx(5)
    assert workers["mb_per_million"] == pytest.approx(0)
    assert together["mb_at_10"] == pytest.approx(150.5)
    assert together["mb_at_50"] == pytest.approx(152.5)
    assert together["mb_at_100"] == pytest.approx(155)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"images": 100, "workers": 2}, "images is 100: give 128 or more"),
        ({"workers": -1}, "workers is -1: give 0 or more"),
        ({"rounds": 0}, "rounds is 0: give 1 or more"),
        ({"size": 4}, "size is 4: give 8 or more"),
        ({"endurance": 10}, "endurance is 10: give 1280 or more"),
        ({"seconds": 0.0}, "seconds is 0: give more than 0"),
    ],
)
def test_mistakes_are_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}$"):
        loader.main(**options)
