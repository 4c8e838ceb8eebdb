"""What passes is no fault of a shard: it is not skipped, and the launch may be tried again."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from selfdistill.data.errors import TryAgain, UserError, redacted
from selfdistill.data.loading.loader import Sequential
from selfdistill.data.loading.reader import Reader
from selfdistill.data.remote import fetch
from selfdistill.data.remote.cache import ShardCache
from selfdistill.data.shards.manifest import Manifest
from tests.data.remote.faulty_server import Faulty, serving
from tests.kit.shards import uneven


@pytest.fixture
def split(tmp_path: Path) -> Manifest:
    return uneven(tmp_path / "www" / "train", [4, 6, 5, 3])


@pytest.fixture
def server(split: Manifest) -> Iterator[Faulty]:
    with serving(Path(split.root).parent) as server:
        server.rate = 0
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.02)


@pytest.mark.filterwarnings("ignore::selfdistill.data.remote.fetch.Retrying")
@pytest.mark.parametrize("workers", [0, 2])
def test_an_outage_skips_nothing(server: Faulty, tmp_path: Path, workers: int) -> None:
    remote = Manifest.load_split(server.url, "train", str(tmp_path / "cache"))
    _ = remote.members  # before the outage
    server.always = "503"
    options: dict[str, Any] = {"batch": 3, "workers": workers, "skip_broken": 0.9, "report": str}
    with pytest.raises(TryAgain, match="the server said 503 in 6 tries"):
        list(Sequential(remote, cache_dir=str(tmp_path / "cache"), **options))
    reader = Reader(remote, str(tmp_path / "cache"))
    with pytest.raises(TryAgain):
        reader.record(0)
    server.always = ""
    assert reader.record(0).input  # it is not given up


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_system_that_passes_is_told_by_the_shard(
    split: Manifest, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def stale(*_: object) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    _ = split.members
    monkeypatch.setattr(os, "pread", stale)
    with pytest.raises(TryAgain, match=r"shard .*-000000\.tar cannot be read: Stale file handle"):
        list(Sequential(split, batch=3, workers=workers))


def test_what_the_cache_dropped_is_closed(server: Faulty, tmp_path: Path) -> None:
    """As long as it is open its blocks are not free."""
    remote = Manifest.load_split(server.url, "train", str(tmp_path / "cache"))
    reader = Reader(remote, str(tmp_path / "cache"))
    for sample in remote.starts[:-1]:
        reader.record(int(sample))
        for path in (tmp_path / "cache").iterdir():
            if path.name in {shard.sha256 for shard in remote.shards}:
                path.unlink()
        assert len(reader.opened) == 1


def test_the_table_of_members_drops_no_shard(
    server: Faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a small file beside shards whose limit is the user's."""
    from selfdistill.data.remote import cache

    remote = Manifest.load_split(server.url, "train", str(tmp_path / "cache"))
    large = ShardCache(tmp_path / "cache", 1.0)
    for number in range(len(remote.shards)):
        info = remote.shards[number]
        large.path(remote.shard_place(number), info.sha256, info.bytes)
    monkeypatch.setattr(cache, "DEFAULT_GB", 1e-6)
    assert len(remote.members) == 18
    there = {path.name for path in (tmp_path / "cache").iterdir()}
    assert {shard.sha256 for shard in remote.shards} <= there


def test_a_record_of_a_power_cut_is_none(tmp_path: Path) -> None:
    from selfdistill.data.shards.store import Store

    store = Store(tmp_path / "parts")
    store.keep("train", 0, {"a": 1}, ids=np.arange(3))
    store.keep("train", 1, {"a": 1}, ids=np.arange(3))
    assert store.done("train") == {0, 1}
    next((tmp_path / "parts").rglob("000001.npz")).write_bytes(b"")
    assert store.done("train") == {0}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("pipe:curl -H 'Authorization: Bearer s3' x", "pipe:curl -H 'Authorization: Bearer ***' x"),
        ("pipe:AWS_SECRET_ACCESS_KEY=s3 aws s3 cp -", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp -"),
        ("pipe:curl -u me:s3 https://a:s3@h/x", "pipe:curl -u *** https://***@h/x"),
        ("pipe:aws s3 cp s3://bucket/keys/x.tar -\ntokens=5", None),
        ("there is no token: give one", None),
    ],
)
def test_commands_show_no_secrets(said: str, shown: str | None) -> None:
    assert redacted(said) == (shown or said)


def test_a_shard_that_is_gone_is_no_outage(split: Manifest) -> None:
    (Path(split.root) / split.shards[0].name).unlink()
    with pytest.raises(UserError, match="cannot be opened") as caught:
        Reader(split).record(0)
    assert not isinstance(caught.value, TryAgain)
