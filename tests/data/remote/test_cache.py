"""Shards behind HTTP and pipes: read as local, fetched once a node, kept while there is room."""

import fcntl
import http.server
import multiprocessing
import os
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.loading.reader import Reader
from selfdistill.data.remote import fetch
from selfdistill.data.remote.cache import NotThere, ShardCache, default_folder, fetch_bytes
from selfdistill.data.shards import tars
from selfdistill.data.shards.manifest import Manifest
from tests.kit.shards import uneven

COUNTS = [4, 6, 5, 3]


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder and counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        self.asked: Counter[str] = Counter()
        self.delay = 0.0
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked[self.path.rsplit("/", 1)[-1]] += 1
                time.sleep(outer.delay)
                if "/forbidden/" in self.path:
                    self.send_error(403)
                else:
                    super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def tars(self) -> dict[str, int]:
        return {k: n for k, n in self.asked.items() if k.endswith(".tar")}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.02)


@pytest.fixture
def split(tmp_path: Path) -> Manifest:
    return uneven(tmp_path / "www" / "train", COUNTS)


@pytest.fixture
def server(split: Manifest) -> Iterator[Server]:
    with Server(Path(split.root).parent) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def epoch(manifest: Manifest, **options: object) -> list[dict[str, np.ndarray]]:
    stream = iter(Loader(manifest, batch=6, seed=2, window=1, **options))
    batches = [{k: v.numpy() for k, v in next(stream).items()} for _ in range(3)]
    stream.close()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_http_reads_as_local(split: Manifest, server: Server, cache: str, workers: int) -> None:
    remote = Manifest.load_split(server.url, "train", cache)
    assert remote.hash == split.hash
    here, there = epoch(split), epoch(remote, workers=workers, cache_dir=cache)
    for a, b in zip(here, there, strict=True):
        assert all(np.array_equal(a[k], b[k]) for k in a)
    rows = [b["ids"] for b in Sequential(remote, batch=5, cache_dir=cache, workers=workers)]
    assert np.concatenate(rows)[:18].tolist() == list(range(18))
    assert server.tars() == {s.name: 1 for s in split.shards}
    assert server.asked["members.npy"] == 1
    assert not list(Path(cache).glob("*.part"))


def _read_all(url: str, cache: str, ready: "multiprocessing.synchronize.Barrier") -> None:
    remote = Manifest.load_split(url, "train", cache)
    ready.wait()
    epoch(remote, cache_dir=cache)


def test_processes_of_a_node_fetch_each_shard_once(
    split: Manifest, server: Server, cache: str
) -> None:
    server.delay = 0.2  # so that all of them want the shard before it is there
    context = multiprocessing.get_context("fork")
    ready = context.Barrier(3)
    ranks = [context.Process(target=_read_all, args=(server.url, cache, ready)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [r.exitcode for r in ranks] == [0, 0, 0]
    assert server.tars() == {s.name: 1 for s in split.shards}
    assert server.asked["members.npy"] == 1


def test_a_partition_fetches_its_own_shards_only(
    split: Manifest, server: Server, cache: str
) -> None:
    remote = Manifest.load_split(server.url, "train", cache)
    loader = Loader(
        remote, batch=2, rank=0, world=2, partitions=2, window=1, seed=4, cache_dir=cache
    )
    stream = iter(loader)
    own = {
        int(np.searchsorted(split.starts, i, side="right")) - 1
        for _ in range(9)
        for i in next(stream)["ids"].tolist()
    }
    stream.close()
    assert len(own) < len(COUNTS)
    ahead = {s for w in loader.order.shards_ahead(16) for s in w}
    fetched = {int(name[2:8]) for name in server.tars()}
    assert own <= fetched <= own | ahead


def test_the_next_window_is_fetched_ahead(split: Manifest, server: Server, cache: str) -> None:
    remote = Manifest.load_split(server.url, "train", cache)
    loader = Loader(remote, batch=1, window=1, seed=4, cache_dir=cache)
    stream = iter(loader)
    next(stream)
    now, following = loader.order.shards_ahead(0)
    wanted = {f"t-{s:06d}.tar" for s in now + following}
    for _ in range(200):
        if set(server.tars()) >= wanted:
            break
        time.sleep(0.05)
    assert set(server.tars()) == wanted
    stream.close()


def test_pipe(split: Manifest, cache: str) -> None:
    remote = Manifest.load(f"pipe:cat {split.root}", cache)
    for a, b in zip(epoch(split), epoch(remote, cache_dir=cache), strict=True):
        assert np.array_equal(a["images"], b["images"])
    with pytest.raises(BrokenData, match=r"cannot fetch pipe:cat /no.*exit 1"):
        Manifest.load("pipe:cat /nowhere 2>/dev/null; false #", cache)


def test_a_lock_does_not_live_on_in_a_worker(split: Manifest, tmp_path: Path) -> None:
    """A worker forked while a thread fetches has a copy of the lock's descriptor."""
    cache = ShardCache(tmp_path / "cache")
    context = multiprocessing.get_context("fork")
    gate = context.Event()
    worker = context.Process(target=gate.wait, args=(30,))
    with cache._locked(split.shards[0].sha256):
        worker.start()
    with (tmp_path / "cache" / f"{split.shards[0].sha256}.lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError while it is held
    gate.set()
    worker.join(30)
    assert worker.exitcode == 0


def test_no_worker_is_forked_while_a_command_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would inherit the pipe that the command is waited for with."""
    starting, started = threading.Event(), threading.Event()
    popen = subprocess.Popen

    def slow(*words: object, **options: object) -> object:
        starting.set()
        time.sleep(0.5)
        started.set()
        return popen(*words, **options)

    monkeypatch.setattr(subprocess, "Popen", slow)
    thread = threading.Thread(target=fetch_bytes, args=("pipe:echo content",))
    thread.start()
    starting.wait()
    worker = multiprocessing.get_context("fork").Process(target=os.getpid)
    worker.start()
    assert started.is_set()
    worker.join(30)
    thread.join()
    assert worker.exitcode == 0


def test_any_file_system_of_fsspec(split: Manifest, cache: str) -> None:
    store = fsspec.filesystem("memory")
    store.put(f"{split.root}/", "/bucket/train", recursive=True)
    remote = Manifest.load("memory://bucket/train", cache)
    for a, b in zip(epoch(split), epoch(remote, cache_dir=cache), strict=True):
        assert np.array_equal(a["images"], b["images"])
    with pytest.raises(NotThere, match="memory://bucket/test"):
        Manifest.load("memory://bucket/test")


def test_remote_damage_is_named(split: Manifest, server: Server, cache: str) -> None:
    remote = Manifest.load_split(server.url, "train", cache)
    shard = Path(split.root) / "t-000001.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        UserError, match=r"t-000001.tar is not the file .* \(another sha256 in 2 tries\)"
    ):
        list(Sequential(remote, batch=4, cache_dir=cache))
    shard.write_bytes(content[:3000])
    with pytest.raises(UserError, match="3000 bytes where"):
        list(Sequential(remote, batch=4, cache_dir=cache))
    assert not Path(cache, split.shards[1].sha256).exists()
    shard.unlink()
    with pytest.raises(
        UserError, match=r"cannot fetch .*t-000001.tar \(the server said 404\)"
    ) as caught:
        list(Sequential(remote, batch=4, cache_dir=cache, workers=1))
    assert "\n" not in str(caught.value)
    run = Sequential(remote, batch=4, cache_dir=cache, skip_broken=0.5)
    with pytest.warns(UserWarning, match="skipped"):
        batches = list(run)
    assert sum(int(b["valid"].sum()) for b in batches) == 18 - COUNTS[1]
    with pytest.raises(UserError, match="cannot fetch http"):
        Manifest.load_split(server.url, "test")
    with pytest.raises(UserError, match=r"cannot fetch s3://.*'pipe:aws s3 cp"):
        Manifest.load("s3://bucket/train")


def test_what_is_not_there_is_told_from_what_cannot_be_fetched(
    split: Manifest, server: Server
) -> None:
    with pytest.raises(
        NotThere, match=r"cannot fetch .*/test/manifest.json \(the server said 404\)"
    ):
        Manifest.load_split(server.url, "test")
    with pytest.raises(NotThere, match="exit 1"):
        Manifest.load(f"pipe:cat {split.root}/none")
    for place, said in (
        (f"{server.url}/forbidden", r"\(the server said 403\)"),
        ("http://127.0.0.1:1", "no connection"),
        ("pipe:exit 255 #", "exit 255"),
        ("s3://bucket/train", "Install s3fs"),
    ):
        with pytest.raises(BrokenData, match=said) as caught:
            Manifest.load(place)
        assert not isinstance(caught.value, NotThere)


def wanted(split: Manifest, shard: int) -> tuple[str, str, int]:
    info = split.shards[shard]
    return f"pipe:cat {split.root}/{info.name}", info.sha256, info.bytes


def test_the_least_recently_used_goes_first(split: Manifest, tmp_path: Path) -> None:
    room = sum(s.bytes for s in split.shards[:2]) + split.shards[3].bytes
    cache = ShardCache(tmp_path / "cache", room / 1e9)
    paths = [cache.path(*wanted(split, s)) for s in (0, 1)]
    for age, path in ((50, paths[0]), (90, paths[1])):
        os.utime(path, (time.time() - age, time.time() - age))
    held = Reader(Manifest.load(f"pipe:cat {split.root}"), cache_dir=str(tmp_path / "cache"))
    kept = held.record(5)  # opens shard 1, which makes it the younger
    third = cache.path(*wanted(split, 2))
    assert not paths[0].exists()
    assert paths[1].exists()
    assert tars.sha256_of(third) == split.shards[2].sha256
    assert held.record(5) == kept
    # Dropped while it is open: still readable, and fetched again when opened anew.
    paths[1].unlink()
    assert held.record(5) == kept
    held.close()
    assert held.record(5) == kept


def test_prefetch_never_drops_what_is_wanted_now(split: Manifest, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", sum(s.bytes for s in split.shards[:2]) / 1e9)
    with pytest.warns(UserWarning, match="shuffle windows"):
        cache.prefetch([wanted(split, s) for s in (0, 1, 2, 3)])
    for _ in range(200):
        if len(list(cache.folder.glob("*.lock"))) >= 3 and not list(cache.folder.glob("*.part")):
            break
        time.sleep(0.05)
    time.sleep(0.3)
    held = {p.name for p in cache.folder.iterdir() if "." not in p.name}
    assert held == {split.shards[0].sha256, split.shards[1].sha256}


def test_a_small_cache_is_reported_once(split: Manifest, tmp_path: Path) -> None:
    lines: list[str] = []
    cache = ShardCache(tmp_path / "cache", split.shards[0].bytes / 1e9, lines.append)
    for shards in ((0, 1), (1, 2, 3)):
        cache.prefetch([wanted(split, s) for s in shards])
    assert len(lines) == 1
    assert "--data.cache_gb 1" in lines[0]


def test_bad_caches(split: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="give it more"):
        ShardCache(tmp_path / "cache", 1e-6).path(*wanted(split, 0))
    with pytest.raises(UserError, match="more than 0"):
        ShardCache(tmp_path / "cache", 0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the shard cache"):
        ShardCache(tmp_path / "file" / "cache")
    full = ShardCache(tmp_path / "full")
    monkeypatch.setattr("selfdistill.data.remote.cache.fresh", _full)
    with pytest.raises(UserError, match="No space left on device"):
        full.path(*wanted(split, 0))
    monkeypatch.setenv("SELFDISTILL_CACHE", "/a/b")
    assert default_folder() == Path("/a/b")


def _full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")
