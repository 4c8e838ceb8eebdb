"""Batches: the same samples for all numbers of ranks and workers; one pass without overlap."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selfdistill.data import pack, rng
from selfdistill.data.errors import UserError
from selfdistill.data.loading import batches as streams
from selfdistill.data.loading import shared_memory
from selfdistill.data.loading.codec import Images
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.shards.manifest import Manifest
from tests.kit.launches import make_images
from tests.kit.shards import number_of, uneven

SHARDS = [7, 1, 12, 5, 9, 3, 4, 8, 2, 6, 10, 11]


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return uneven(tmp_path_factory.mktemp("data") / "train", [7, 1, 12, 5, 9, 3])


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return uneven(tmp_path_factory.mktemp("data") / "train", SHARDS)


def noise(positions: np.ndarray, _: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {"noise": rng.uniform(0, "mask", positions, 3)}


def take(loader: Loader, batches: int) -> list[dict[str, torch.Tensor]]:
    stream = iter(loader)
    out = [next(stream) for _ in range(batches)]
    stream.close()
    return out


def steps_of(manifest: Manifest, steps: int, world: int, **options: Any) -> list[np.ndarray]:
    """The global batch of each step as ids, put together from all ranks."""
    each = options.get("accumulation", 1)
    ranks = [
        take(Loader(manifest, rank=r, world=world, **options), steps * each) for r in range(world)
    ]
    return [
        np.concatenate([b["ids"].numpy() for r in ranks for b in r[s * each : (s + 1) * each]])
        for s in range(steps)
    ]


def test_a_batch_holds_what_it_says(split: Manifest) -> None:
    for batch in take(Loader(split, batch=8, keyed=noise, require_labels=True), 12):
        assert batch["images"].dtype == torch.uint8
        assert batch["images"].shape == (8, 3, 4, 4)
        numbers = [number_of(image.numpy()) for image in batch["images"]]
        assert numbers == batch["ids"].tolist()
        assert batch["labels"].tolist() == [n % 3 for n in numbers]
        expected = rng.uniform(0, "mask", batch["positions"].numpy(), 3)
        assert torch.equal(batch["noise"], torch.from_numpy(expected))
        assert set(batch) == {"images", "labels", "positions", "ids", "noise"}


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 2),
    st.integers(0, 99),
    st.integers(0, 20),
)
def test_steps_are_the_same_for_all_world_sizes(
    split: Manifest,
    world: int,
    accumulation: int,
    partitions: int,
    window: int,
    seed: int,
    start: int,
) -> None:
    batch = world * accumulation * partitions
    common: dict[str, Any] = {
        "batch": batch,
        "seed": seed,
        "partitions": partitions,
        "window": window,
        "start_step": start,
    }
    alone = steps_of(split, 3, 1, **common)
    together = steps_of(split, 3, world, accumulation=accumulation, **common)
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(a, b)
    whole = steps_of(split, start + 3, 1, **{**common, "start_step": 0})
    assert np.array_equal(np.concatenate(whole[start:]), np.concatenate(alone))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_change_nothing(split: Manifest, world: int, workers: int) -> None:
    options: dict[str, Any] = {"batch": 6, "seed": 5, "partitions": 3, "keyed": noise}
    alone = take(Loader(split, **options), 9)  # past the end of the first epoch
    ranks = [
        take(Loader(split, rank=r, world=world, workers=workers, **options), 9)
        for r in range(world)
    ]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert all(set(part) == set(whole) for part in parts)
        assert all(torch.equal(torch.cat([p[k] for p in parts]), whole[k]) for k in whole)


@pytest.mark.parametrize("workers", [1, 3])
def test_images_that_lie_in_the_ring(tmp_path: Path, workers: int) -> None:
    """Batches of more bytes than go by the pipe: none is overwritten, however long it is kept."""
    make_images(tmp_path / "images", size=48)
    pack.pack(str(tmp_path / "images"), str(tmp_path / "shards"), size=48)
    split = Manifest.load_split(str(tmp_path / "shards"), "train")
    options: dict[str, Any] = {"batch": 9, "seed": 5, "keyed": noise}
    alone = take(Loader(split, **options), 40)
    loader = Loader(split, workers=workers, **options)
    stream, found = iter(loader), []
    for number in range(40):
        if number == 20:
            time.sleep(0.5)  # all that may be on its way is there
            assert loader.samples.ring is not None
            beside = iter(loader)  # with workers and memory of its own
            assert torch.equal(next(beside)["images"], alone[0]["images"])
        found.append(next(stream))
    beside.close()
    assert found[0]["images"].nbytes > shared_memory._SMALL
    stream.close()
    assert loader.samples.ring is None
    for batch, wanted in zip(found, alone, strict=True):
        assert batch.keys() == wanted.keys()
        assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


def test_without_memory_for_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system refuses, or what is beyond the limit, comes the other way."""
    make_images(tmp_path / "images", size=48)
    pack.pack(str(tmp_path / "images"), str(tmp_path / "shards"), size=48)
    split = Manifest.load_split(str(tmp_path / "shards"), "train")
    alone = take(Loader(split, batch=9), 3)

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    for place, name, value in (
        (shared_memory.mmap, "mmap", refuse),
        (streams, "_RING_LIMIT", 10**5),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, value)
            loader = Loader(split, batch=9, workers=1)
            stream = iter(loader)
            found = [next(stream) for _ in range(3)]
            assert loader.samples.ring is None
            stream.close()
        for batch, wanted in zip(found, alone, strict=True):
            assert all(torch.equal(batch[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("partitions", [1, 3])
@pytest.mark.parametrize(
    ("window", "full_shuffle", "shards"),
    # Automatic: the whole run of a partition; above the limit, shards of 20 samples, so 20 x 12/78.
    [(1, 2**20, 1), (2, 2**20, 2), (5, 2**20, 5), (0, 2**20, 12), (0, 77, 3)],
)
def test_entering_reads_few_shards(
    many: Manifest,
    monkeypatch: pytest.MonkeyPatch,
    partitions: int,
    window: int,
    full_shuffle: int,
    shards: int,
) -> None:
    """Only the current window's shards of a rank's own partition are opened, wherever it enters."""
    monkeypatch.setattr("selfdistill.data.loading.order.FULL_SHUFFLE", full_shuffle)
    monkeypatch.setattr("selfdistill.data.loading.order.WINDOW_SAMPLES", 20)
    each, most = 3, 0
    for step in range(10**12, 10**12 + 40):
        read = []
        for rank in range(partitions):
            loader = Loader(
                many,
                batch=partitions * each,
                rank=rank,
                world=partitions,
                partitions=partitions,
                window=window,
                start_step=step,
            )
            batch = take(loader, 1)[0]
            opened = set(loader.samples.reader.opened)
            ids = batch["ids"].numpy()
            assert opened == set((np.searchsorted(many.starts, ids, side="right") - 1).tolist())
            current = {tuple(loader.order.shards_ahead(int(p), 1)[0]) for p in batch["positions"]}
            assert opened <= {shard for one in current for shard in one}
            assert all(len(one) <= shards for one in current)
            if len(current) == 1:  # no end of a window or an epoch within the batch
                most = max(most, len(opened))
                read.append(set(*current))
        # The runs of neighbours share the shard at their border, and nothing else.
        if len(read) == partitions:
            assert sum(map(len, read)) <= len(SHARDS) + partitions - 1
    assert most == min(each, shards)  # and they are shuffled together


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (3, 0), (5, 0), (3, 2)])
def test_one_pass_shares_the_samples_out(split: Manifest, world: int, workers: int) -> None:
    passes = [
        list(Sequential(split, batch=4, rank=r, world=world, workers=workers)) for r in range(world)
    ]
    assert len({len(p) for p in passes}) == 1
    assert len(passes[0]) == len(Sequential(split, batch=4, world=world))
    seen = []
    for r, batches in enumerate(passes):
        mine = torch.cat([b["ids"][b["valid"]] for b in batches]).tolist()
        assert mine == list(range(37 * r // world, 37 * (r + 1) // world))
        seen += mine
        for batch in batches:
            assert batch["images"].shape == (4, 3, 4, 4)
            assert (batch["labels"][~batch["valid"]] == -1).all()
            assert not batch["images"][~batch["valid"]].any()
    assert seen == list(range(37))


def test_more_ranks_than_samples(tmp_path: Path) -> None:
    tiny = uneven(tmp_path / "train", [2])
    counts = [
        sum(int(b["valid"].sum()) for b in Sequential(tiny, batch=3, rank=r, world=5))
        for r in range(5)
    ]
    assert sum(counts) == 2
    assert len(Sequential(tiny, batch=3, rank=4, world=5)) == 1


def test_size_fits_images(split: Manifest) -> None:
    assert take(Loader(split, batch=2, codec=Images(9)), 1)[0]["images"].shape == (2, 3, 9, 9)
    assert next(iter(Sequential(split, batch=2, codec=Images(9))))["images"].shape == (2, 3, 9, 9)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "give 1 or more"),
        ({"batch": 10, "world": 3}, "give 9 or 12"),
        ({"batch": 8, "world": 2, "accumulation": 3}, "give 6 or 12"),
        ({"batch": 2, "world": 4}, "give 4"),
        ({"batch": 8, "partitions": 3}, "multiple"),
        ({"batch": 8, "workers": -1}, "workers"),
        ({"batch": 8, "skip_broken": 1.5}, "skip_broken"),
    ],
)
def test_mistakes(split: Manifest, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Loader(split, **options)


def test_labels_can_be_demanded(tmp_path: Path) -> None:
    bare = uneven(tmp_path / "train", [3], labels=False)
    assert take(Loader(bare, batch=2), 1)[0]["labels"].tolist() == [-1, -1]
    with pytest.raises(UserError, match=r"3 of 3 samples .* have no label"):
        Loader(bare, batch=2, require_labels=True)
    with pytest.raises(UserError, match="no label"):
        Sequential(bare, batch=2, require_labels=True)


SCRIPT = """
import gc, os, signal, sys, time
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.loading.loader import Loader
stream = iter(Loader(Manifest.load(sys.argv[1]), batch=4, workers=1))
next(stream)
for pid in open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read().split():
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        os.kill(int(pid), number)
time.sleep(0.2)
for _ in range(20):
    next(stream)
print("read on")
if sys.argv[2] == "raise":
    raise SystemExit(3)
if sys.argv[2] == "lose":  # as in the traceback of an error: collected with all that it holds
    ring = [stream]
    ring.append(ring)
    del ring, stream
    gc.collect()
"""


@pytest.mark.parametrize("end", ["raise", "lose"])
def test_workers_ignore_signals_and_end_with_the_program(split: Manifest, end: str) -> None:
    """SLURM signals all processes of a job; the trainer then still needs its batches."""
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, split.root, end],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=False,
    )
    assert done.stdout == "read on\n", done.stderr
    assert done.returncode == (3 if end == "raise" else 0)
    assert time.monotonic() - begin < 45
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN


def test_what_lies_elsewhere_is_copied_into_the_ring() -> None:
    """Texts' arrays too large for the pipe, as far as there is room; nothing is written over."""
    mib = 2**17  # int64 numbers
    ring = shared_memory.Ring(slots=3, nbytes=8 * 2**20)
    room = ring.room(4)
    inside = torch.from_numpy(room[: 2**20 + 1])
    inside.fill_(7)
    batch = {
        "inside": inside,
        "small": torch.arange(9),
        "ids": torch.arange(2 * mib).reshape(2, mib),
        "mask": torch.arange(2**21) % 3 == 0,
        "columns": torch.arange(4 * mib).reshape(2, -1).T,  # not contiguous
        "more": torch.arange(4 * mib),  # no room is left for it
    }
    sent = ring.carry(4, batch)
    assert [isinstance(sent[name], shared_memory.InRing) for name in batch] == [
        *(True, False, True, True, False, False)
    ]
    found = shared_memory.received(sent)
    assert all(torch.equal(found[name], value) for name, value in batch.items())
    assert all(found[name].dtype == value.dtype for name, value in batch.items())
