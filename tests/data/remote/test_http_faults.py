"""A server that fails at a fifth of its requests changes nothing; one that always does is named."""

import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.remote import fetch
from selfdistill.data.remote.cache import ShardCache
from selfdistill.data.remote.fetch import NotThere, fetch_bytes
from selfdistill.data.shards.manifest import Manifest
from tests.data.remote.faulty_server import KINDS, Faulty, serving
from tests.kit.launches import COMMON, ROOT, environment, launch, make_world
from tests.kit.shards import uneven

COUNTS = [4, 6, 5, 3, 2, 7, 1, 5]


STILL = r"\(no answer, or less than 1 kB/s, for 1 s in 6 tries\)"


@pytest.fixture
def split(tmp_path: Path) -> Manifest:
    return uneven(tmp_path / "www" / "train", COUNTS)


@pytest.fixture
def server(split: Manifest) -> Iterator[Faulty]:
    with serving(Path(split.root).parent) as server:
        yield server


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(fetch, "_told", count(1))
    monkeypatch.setenv("SELFDISTILL_FETCH_TIMEOUT", "1")


@pytest.mark.filterwarnings("ignore::selfdistill.data.remote.fetch.Retrying")
@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_is_the_local_one(
    split: Manifest, server: Faulty, tmp_path: Path, workers: int
) -> None:
    """Four epochs, each by a loader of its own; the cache holds two shards."""
    cache = str(tmp_path / "cache")
    room = 2 * max(s.bytes for s in split.shards) / 1e9
    lines: list[str] = []
    remote = Manifest.load_split(server.url, "train", cache)
    places = {"workers": workers, "cache_dir": cache, "cache_gb": room, "report": lines.append}
    steps = sum(COUNTS) // 6 + 1
    for epoch in range(4):
        options = {"batch": 6, "seed": 2, "window": 1, "start_step": epoch * steps}
        here, there = iter(Loader(split, **options)), iter(Loader(remote, **options, **places))
        for _ in range(steps):
            a, b = next(here), next(there)
            assert a.keys() == b.keys()
            assert all(torch.equal(a[k], b[k]) for k in a)
        there.close()
    ids = [b["ids"][b["valid"]] for b in Sequential(remote, batch=4, cache_dir=cache)]
    assert torch.cat(ids).tolist() == list(range(sum(COUNTS)))
    print(f"{sum(server.asked.values())} requests:", dict(server.done))
    assert all(server.done[kind] > 0 for kind in KINDS), server.done
    faults = sum(server.done[kind] for kind in KINDS)
    assert faults == pytest.approx(sum(server.asked.values()) / 5, abs=2)
    if not workers:  # a worker's report stays in its process
        assert any("trying again in 0.0" in line for line in lines)
    assert not list(Path(cache).glob("*.part"))


SETTINGS = COMMON | {"pretrain.steps": 6, "stage": "pretrain", "data.workers": 1}


@pytest.mark.multi
def test_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    root = make_world(tmp_path / "world", samples_per_shard=1)
    weights = []
    with serving(root / "shards") as server:
        for name, data in (("local", root / "shards"), ("http", server.url)):
            table = SETTINGS | {
                "data": data,
                "model": root / "base",
                "output": root / name,
                "data.cache_dir": root / "cache",
            }
            words = [word for key, value in table.items() for word in (f"--{key}", str(value))]
            done = launch("engine/run.py", *words, ranks=1, launcher="python")
            assert done.returncode == 0, done.stderr[-3000:]
            weights.append(load_file(root / name / "pretrain" / "export" / "model.safetensors"))
        printed = done.stdout + done.stderr
        print(f"{sum(server.asked.values())} requests:", dict(server.done))
        assert all(server.done[kind] > 0 for kind in KINDS), server.done
        assert "trying again in" in printed
        for fetched in root.glob("shards/train/*.tar"):
            assert server.asked[fetched.name] > 0
    local, remote = weights
    assert local.keys() == remote.keys()
    assert all(torch.equal(local[k], remote[k]) for k in local)


@pytest.mark.parametrize(
    ("kind", "tries", "said"),
    [
        ("503", 6, r"cannot fetch .*t-000000.tar \(the server said 503 in 6 tries\): check"),
        ("429", 6, r"the server said 429 in 6 tries"),
        ("reset", 6, r"the connection broke.* in 6 tries|no answer in 6 tries"),
        ("half", 6, r"cut off in 6 tries"),
        ("short", 2, r"not the file that its manifest names \(\d+ bytes where \d+ belong in 2"),
        ("stall", 6, STILL),
        ("mute", 6, STILL),
        ("flip", 6, r"comes damaged, each time otherwise \(another sha256 in 6 tries\): check the"),
        ("flip the same", 2, r"not the file .* \(another sha256 in 2 tries\): upload shards and"),
        ("403", 1, r"cannot fetch .*t-000000.tar \(the server said 403\): check"),
        ("404", 1, r"cannot fetch .*t-000000.tar \(the server said 404\): check"),
        ("401", 1, r"\(the server said 401\)"),
        ("410", 1, r"\(the server said 410\)"),
    ],
)
def test_a_server_that_never_gives_the_file(
    split: Manifest, server: Faulty, tmp_path: Path, kind: str, tries: int, said: str
) -> None:
    server.always = kind
    lines: list[str] = []
    cache = ShardCache(tmp_path / "cache", report=lines.append)
    info = split.shards[0]
    url = f"{server.url}/train/{info.name}"
    with pytest.raises(BrokenData, match=said) as caught:
        cache.path(url, info.sha256, info.bytes)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, NotThere) == (kind in ("404", "410"))
    assert server.asked[info.name] == tries
    assert 0 < len(lines) + (tries == 1) <= 5
    assert all(line.startswith(f"{url}: ") for line in lines)
    if tries == 6:
        assert lines[-1].endswith("s (6 of 6)")
        assert "trying again in 0." in lines[-1]
    assert sum("no-cache" in text for text in server.headers) == tries - 1
    assert not list(cache.folder.glob("*.part"))
    server.always, server.rate = "", 0
    assert cache.path(url, info.sha256, info.bytes).exists()
    assert not list(cache.folder.glob("*.failed"))


def test_slow_is_not_failed(
    split: Manifest, server: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transfer may last longer than the limit, as long as it moves."""
    # A busy machine may stand still for a second.
    monkeypatch.setenv("SELFDISTILL_FETCH_TIMEOUT", "4")
    content = os.urandom(120_000)
    (Path(split.root) / "big").write_bytes(content)
    server.rate = 0

    def slowly(handler: http.server.SimpleHTTPRequestHandler, _: str) -> None:
        handler.send_response(200)
        handler.end_headers()
        for at in range(0, len(content), 5000):
            handler.wfile.write(content[at : at + 5000])
            time.sleep(0.2)

    server.serve = slowly
    lines: list[str] = []
    assert fetch_bytes(f"{server.url}/train/big", lines.append) == content
    assert not lines


def test_commands_are_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "count"
    flaky = f"pipe:echo x >> {file}; test $(wc -l < {file}) -ge %d && echo content #"
    lines: list[str] = []
    # Exit 1 may mean that there is no such file: once more, no oftener.
    with pytest.raises(NotThere, match="exit 1 in 2 tries"):
        fetch_bytes(flaky % 3, lines.append)
    assert fetch_bytes(flaky % 4, lines.append) == b"content\n"
    with pytest.raises(BrokenData, match="exit 255 in 6 tries"):
        fetch_bytes("pipe:exit 255 #", lines.append)
    lines.clear()
    with pytest.raises(NotThere, match=r"Errno 2"):
        fetch_bytes(f"file://{tmp_path}/none", lines.append)
    with pytest.raises(BrokenData, match="s3"):
        fetch_bytes("s3://bucket/x", lines.append)
    assert not lines


def test_a_command_that_says_nothing_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "_PATIENCE", 0.2)
    monkeypatch.setattr(fetch, "TRIES", 2)
    with pytest.raises(BrokenData, match=r"nothing came for 0.2 s in 2 tries"):
        fetch_bytes("pipe:exec sleep 60 #", lambda _: None)


def test_the_limit_is_a_number(monkeypatch: pytest.MonkeyPatch, server: Faulty) -> None:
    for given in ("soon", "0", "-1", "1.5"):
        monkeypatch.setenv("SELFDISTILL_FETCH_TIMEOUT", given)
        with pytest.raises(UserError, match=r"SELFDISTILL_FETCH_TIMEOUT is .*: give whole seconds"):
            fetch_bytes(f"{server.url}/train/manifest.json")


def test_retries_do_not_flood(server: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run meets many single failures: only the first are told of."""
    lines: list[str] = []

    def once(attempt: int) -> int:
        if attempt == 1:
            raise fetch.Failure("cut off")
        return attempt

    monkeypatch.setattr(fetch, "FIRST_WAIT", 0)
    for number in range(100):
        assert fetch.retry(f"http://x/{number}", once, lines.append) == 2
    assert len(lines) <= fetch._TOLD


def test_who_waits_for_a_failure_does_not_repeat_it(
    split: Manifest, server: Faulty, tmp_path: Path
) -> None:
    """Five readers of a node want the same shard; one of them finds that it cannot be had."""
    server.always = "503"
    info = split.shards[0]
    cache = ShardCache(tmp_path / "cache", report=lambda _: None)
    errors: list[str] = []

    def read() -> None:
        try:
            cache.path(f"{server.url}/train/{info.name}", info.sha256, info.bytes)
        except BrokenData as error:
            errors.append(str(error))

    readers = [threading.Thread(target=read) for _ in range(5)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(errors) == 5
    assert len(set(errors)) == 1
    assert server.asked[info.name] == 6
    server.always, server.rate = "", 0
    read()  # whoever comes later tries by itself
    assert len(errors) == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_vanishes_from_the_server(
    split: Manifest, server: Faulty, tmp_path: Path, workers: int
) -> None:
    server.rate = 0
    cache = tmp_path / "cache"
    remote = Manifest.load_split(server.url, "train", str(cache))
    options = {"batch": 4, "workers": workers, "cache_dir": str(cache), "report": str}
    assert len(list(Sequential(remote, **options))) == 9
    gone = split.shards[3]
    (Path(split.root) / gone.name).unlink()
    assert len(list(Sequential(remote, **options))) == 9
    (cache / gone.sha256).unlink()
    with pytest.raises(UserError, match=rf"cannot fetch {server.url}/train/{gone.name} .*said 404"):
        list(Sequential(remote, **options))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_local_shard_vanishes(split: Manifest, workers: int) -> None:
    """Its steps before go on; the one that needs it names it."""
    stream = iter(Loader(split, batch=2, window=1, seed=1, workers=workers))
    first = next(stream)["ids"].tolist()
    used = {n for n in range(8) if set(first) & set(range(*split.starts[n : n + 2].tolist()))}
    order = Loader(split, batch=2, window=1, seed=1).order
    last = order.shards_ahead(sum(COUNTS) - 1)[0][0]
    assert last not in used
    (Path(split.root) / split.shards[last].name).unlink()
    begin = time.monotonic()
    with pytest.raises(UserError, match=rf"shard .*{split.shards[last].name} cannot be opened"):
        list(islice(stream, 20))
    assert time.monotonic() - begin < 25


FULL = """
import sys
from pathlib import Path
from selfdistill.data.remote.cache import ShardCache
from selfdistill.data.errors import UserError
from selfdistill.data.loading.loader import Sequential
from selfdistill.data.shards.manifest import Manifest

root, disk = sys.argv[1:]
split = Manifest.load(f"pipe:cat {root}")
lines = []
cache = ShardCache(disk, report=lines.append)
names = lambda: {p.name for p in Path(disk).iterdir() if "." not in p.name}
# What a killed process left behind goes first.
(Path(disk) / "dead.part").write_bytes(bytes(300_000))
for shard, info in enumerate(split.shards):
    place = split.shard_place(shard)
    assert cache.path(place, info.sha256, info.bytes).stat().st_size == info.bytes
    assert not list(Path(disk).glob("*.part")) or shard < 2, shard
    print(shard, len(names()))
assert info.sha256 in names() and split.shards[0].sha256 not in names()
assert len(lines) == 1 and "is full: it holds" in lines[0], lines
print(lines[0])
# Somebody else's file takes the room of all.
for name in names():
    (Path(disk) / name).unlink()
with open(f"{disk}/other.file", "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)):
            pass
    except OSError:
        pass
try:
    cache.path(split.shard_place(0), split.shards[0].sha256, split.shards[0].bytes)
except UserError as error:
    print("error:", error)
assert not list(Path(disk).glob("*.part"))
for workers in (0, 2):
    try:
        list(Sequential(split, batch=4, cache_dir=disk, workers=workers))
    except UserError as error:
        print("error:", error)
"""


def test_a_full_disk_gives_way(tmp_path: Path) -> None:
    """On a real file system of 1 MB; eight shards of about 250 kB."""
    split = uneven(tmp_path / "train", [12] * 8, size=4)
    for info in split.shards:
        path = Path(split.root) / info.name
        path.write_bytes(path.read_bytes() + bytes(250_000 - path.stat().st_size % 10_000))
    _renew(Path(split.root))
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "full.py"
    script.write_text(FULL)
    inner = (
        f"mount -t tmpfs -o size=1m,mode=755 tmpfs {disk} && {sys.executable} {script} {split.root}"
    )
    flags = ["-m"] if os.geteuid() == 0 else ["-rm"]
    done = subprocess.run(
        ["unshare", *flags, "sh", "-c", f"{inner} {disk}"],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT), SELFDISTILL_CACHE=str(tmp_path / "tables")),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(said) == 3
    assert all(f"in {disk} (No space left on device): make room" in line for line in said)


def _renew(folder: Path) -> None:
    """Writes the shards' sizes and hashes into the manifest anew."""
    table = json.loads((folder / "manifest.json").read_text())
    for shard in table["shards"]:
        content = (folder / shard["name"]).read_bytes()
        shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(table))


def test_a_killed_process_leaves_nobody_at_work(
    split: Manifest, server: Faulty, tmp_path: Path
) -> None:
    """A process that waits for a server does it itself, without a program of its own."""
    server.always = "mute"
    info = split.shards[0]
    words = f"ShardCache({str(tmp_path / 'cache')!r}).path("
    words += f"'{server.url}/train/{info.name}', {info.sha256!r}, {info.bytes})"
    script = f"from selfdistill.data.remote.cache import ShardCache; {words}"
    reader = subprocess.Popen(
        [sys.executable, "-c", script], env=environment(PYTHONPATH=str(ROOT)), cwd=ROOT
    )
    while not server.asked[info.name]:
        time.sleep(0.02)
        assert reader.poll() is None
    assert not Path(f"/proc/{reader.pid}/task/{reader.pid}/children").read_text().split()
    reader.send_signal(signal.SIGKILL)
    reader.wait()
