"""Sets in an object store: a process of moto's S3 server on loopback, spoken to by s3fs."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selfdistill.data.errors import UserError
from selfdistill.data.index import index
from selfdistill.data.loading.loader import Loader, Sequential
from selfdistill.data.pack import pack
from selfdistill.data.remote import fetch
from selfdistill.data.shards.manifest import Manifest
from selfdistill.data.verify import verify
from tests.kit.command import call
from tests.kit.launches import COMMON, ROOT, environment, free_port, launch, make_world
from tests.kit.shards import class_folders, uneven

pytestmark = pytest.mark.stores

SECRET = "a-secret-that-nobody-may-see"
ACCESS = {
    "AWS_ACCESS_KEY_ID": "a-key",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Server:
    """The server, and what it was asked for."""

    def __init__(self, folder: Path) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = folder / "log"
        words = ["-m", "moto.server", "-H", "127.0.0.1", "-p", self.url.rpartition(":")[2]]
        free = {"INITIAL_NO_AUTH_ACTION_COUNT": str(10**9)}  # until `closed`
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words], env=environment(**free), stdout=log, stderr=log
            )
        deadline = time.monotonic() + 120
        while b"Running on" not in self.log.read_bytes():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def puts(self, below: str) -> Counter[str]:
        """How often each file of a folder was written."""
        found = re.findall(rf'"PUT /{below}/(\S+) HTTP', self.log.read_text())
        return Counter(name for name in found if name.endswith(".tar"))

    def admit(self, count: int) -> None:
        """From now on so many requests are answered whatever their key."""
        ask = urllib.request.Request(
            f"{self.url}/moto-api/reset-auth",
            data=str(count).encode(),
            headers={"Content-Type": "text/plain"},
        )
        urllib.request.urlopen(ask).close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    before = dict(os.environ)
    os.environ |= ACCESS | {"AWS_ENDPOINT_URL": server.url}
    yield server
    os.environ.clear()
    os.environ.update(before)
    server.process.kill()
    server.process.wait()


@pytest.fixture
def store(
    server: Server, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The address of a bucket of its own; in the end no file of this test holds the secret."""
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.02)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower())[:60].strip("-")
    files().mkdir(name)
    yield f"s3://{name}"
    assert not list((tmp_path / "tmp").iterdir())
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    if files().exists(name):
        assert not [one for one in files().find(name) if SECRET.encode() in files().cat_file(one)]


def files() -> Any:
    return fsspec.filesystem("s3", use_listings_cache=False)


def there(address: str) -> dict[str, bytes]:
    """Every file of a set; parts.json, which a local launch does not write, aside."""
    root = address.removeprefix("s3://")
    found = [name for name in files().find(root) if not name.endswith("parts.json")]
    return {name.removeprefix(f"{root}/"): files().cat_file(name) for name in found}


def here(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != "parts.json"
    }


def python(*words: object, **variables: str) -> subprocess.Popen[str]:
    """A command line, in a process of its own."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", *map(str, words)],
        env=environment(**{"PYTHONPATH": path} | variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def refused(command: "subprocess.Popen[str]") -> str:
    """The line of a mistake."""
    out, err = command.communicate(timeout=120)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert command.returncode == 2, err
    assert len(lines) == 1, err
    assert "Traceback" not in err
    assert SECRET not in out + err
    return lines[0]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    class_folders(tmp_path / "images", {"ant": 23, "bee": 9, "cow": 14})
    (tmp_path / "images" / "bee" / "900.png").write_bytes(b"no image")
    return tmp_path / "images"


OPTIONS = ("--samples_per_shard", 5, "--name", "zoo", "--skip_broken")


def test_the_set_is_that_of_a_folder(
    store: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(tmp_path / "more", {"x": 7}, start=300)
    for out in (tmp_path / "zoo", f"{store}/zoo"):
        assert call(pack, images, out, *OPTIONS, "--unlabelled", tmp_path / "more") == 0
    assert there(f"{store}/zoo") == here(tmp_path / "zoo")
    assert f"{store}/zoo/train: 36 samples" in capsys.readouterr().out
    cached = ("--cache_dir", tmp_path / "cache")
    assert call(verify, f"{store}/zoo", "--decode", *cached) == 0
    assert "train, val, test, unlabelled" in capsys.readouterr().out
    assert call(pack, images, f"{store}/zoo", *OPTIONS, "--unlabelled", tmp_path / "more") == 0
    assert f"{store}/zoo is complete" in capsys.readouterr().out
    for more, said in (
        (["--unlabelled", tmp_path / "more", "--seed", 1], "exists"),
        (["--overwrite"], "may be read meanwhile"),
        (["--split", "test", "--fit", "pad"], f"{store}/zoo/train was packed with --fit crop"),
    ):
        assert call(pack, images, f"{store}/zoo", *OPTIONS, *more) == 2
        assert said in (line := capsys.readouterr().err)
        assert str(tmp_path / "tmp") not in line


def test_parts_in_any_order(
    store: str, server: Server, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(pack, images, tmp_path / "zoo", *OPTIONS) == 0
    out = f"{store}/a/zoo"
    for part in ("3/3", "1/3"):
        assert call(pack, images, out, *OPTIONS, "--part", part) == 0
    assert "of parts 2 of 3" in capsys.readouterr().out
    assert call(pack, images, out, *OPTIONS, "--seed", 3, "--part", "2/3") == 2
    assert f"{out}/.zoo.train-val-test.parts was begun with" in capsys.readouterr().err
    # Somebody replaces a shard by one of the same size.
    bucket = out.removeprefix("s3://")
    (victim, *_) = files().glob(f"{bucket}/train/*.tar")
    whole = files().cat(victim)
    files().pipe(victim, whole[:-1] + b"x")
    assert call(pack, images, out, *OPTIONS, "--part", "2/3") == 0
    assert f"1 shard is not as written, the first in {out}/train" in (capsys.readouterr().out)
    assert not files().glob(f"{bucket}/**/manifest.json")
    assert call(pack, images, out, *OPTIONS) == 0
    assert there(out) == here(tmp_path / "zoo")
    twice = {name for name, count in server.puts(bucket).items() if count > 1}
    assert twice == {victim.removeprefix(f"{bucket}/")}
    files().pipe(f"{bucket}x/train/a.txt", b"x")
    assert call(pack, images, f"{out}x", *OPTIONS) == 2
    assert f"{out}x/train holds train/a.txt, and no interrupted packing" in capsys.readouterr().err


def test_a_killed_packing_goes_on(store: str, server: Server, images: Path, tmp_path: Path) -> None:
    words = (images, f"{store}/zoo", *OPTIONS[2:], "--samples_per_shard", 1)
    below = f"{store.removeprefix('s3://')}/zoo"
    assert call(pack, images, tmp_path / "zoo", *words[2:]) == 0
    killed = python("data.pack", *words, TMPDIR=str(tmp_path))
    while server.puts(below).total() < 4:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 4 <= server.puts(below).total() < 46
    assert not files().glob(f"{below}/**/manifest.json")
    assert call(pack, *words) == 0
    assert there(f"{store}/zoo") == here(tmp_path / "zoo")
    # At most the shard whose record the kill prevented.
    assert server.puts(below).total() <= 46 + 1


@pytest.mark.parametrize("launches", [1, 3])
def test_index(
    store: str, tmp_path: Path, launches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    for split, counts in (("train", [4, 6, 5, 3]), ("val", [2, 3])):
        uneven(tmp_path / "set" / split, counts)
        for name in ("manifest.json", "members.npy"):
            (tmp_path / "set" / split / name).unlink()
    (tmp_path / "set" / "train" / "README.txt").write_text("x")
    (tmp_path / "set" / "val" / "._a.tar").write_text("x")
    files().put(f"{tmp_path}/set/", f"{store}/set/", recursive=True)
    assert call(index, tmp_path / "set") == 0
    local = capsys.readouterr().out
    for number in range(launches, 0, -1):
        part = ["--part", f"{number}/{launches}"] if launches > 1 else []
        assert call(index, f"{store}/set", *part) == 0
    said = capsys.readouterr().out
    assert said.endswith(local.replace(f"{tmp_path}/set", f"{store}/set"))
    assert there(f"{store}/set") == here(tmp_path / "set")
    assert call(index, f"{store}/set") == 2
    assert f"{store}/set/train/manifest.json is there already" in capsys.readouterr().err
    assert call(index, f"{store}/set/val", "--overwrite") == 0
    assert there(f"{store}/set") == here(tmp_path / "set")
    files().pipe(f"{store}/set/test/a.tar", b"no tar")
    assert call(index, f"{store}/set/test") == 2
    assert f"error: {store}/set/test/a.tar is no whole tar" in capsys.readouterr().err
    for place in (f"{store}/none", f"{store}/set/val/t-000000.tar"):
        assert call(index, place) == 2
    assert call(index, f"{store}/set/val/t-000000.tar", f"{store}/set/val/t-000001.tar") == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bucket_vanishes_while_it_is_read(store: str, tmp_path: Path, workers: int) -> None:
    split = uneven(tmp_path / "set" / "train", [4, 6, 5, 3, 2, 7, 1, 5])
    files().put(f"{tmp_path}/set/", f"{store}/set/", recursive=True)
    cache = {"cache_dir": str(tmp_path / "cache"), "workers": workers}
    remote = Manifest.load_split(f"{store}/set", "train", cache["cache_dir"])
    batches = zip(
        *(Sequential(one, batch=6, **more) for one, more in ((split, {}), (remote, cache))),
        strict=True,
    )
    for local, far in batches:
        assert all(np.array_equal(local[key], far[key]) for key in local)
    for path in Path(cache["cache_dir"]).iterdir():
        path.unlink()
    stream = iter(Loader(remote, batch=2, window=1, seed=1, **cache))
    next(stream)
    files().rm(store, recursive=True)
    # Its files go first, then the bucket.
    said = rf"cannot fetch {store}/set/train/t-.* \((there is no such bucket|.* does not exist)"
    with pytest.raises(UserError, match=said):
        list(islice(stream, 40))


def test_a_bucket_vanishes_while_it_is_written(
    store: str, server: Server, images: Path, tmp_path: Path
) -> None:
    below = f"{store.removeprefix('s3://')}/zoo"
    words = (images, f"{store}/zoo", *OPTIONS[2:], "--samples_per_shard", 1)
    packing = python("data.pack", *words, TMPDIR=str(tmp_path / "tmp"))
    while server.puts(below).total() < 2:
        assert packing.poll() is None, packing.communicate()
        time.sleep(0.02)
    packing.send_signal(signal.SIGSTOP)  # else it may be done before the bucket is gone
    while files().exists(store):
        try:
            files().rm(store, recursive=True)
        except OSError:  # what was on its way came meanwhile
            continue
    packing.send_signal(signal.SIGCONT)
    assert re.search(rf"cannot (write|list) {store}/zoo/\S* \(there is no such", refused(packing))


@pytest.mark.parametrize(
    ("variables", "address", "said"),
    [
        ({"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "", "set AWS_ACCESS_KEY_ID and"),
        ({"AWS_ACCESS_KEY_ID": "wrong"}, "", "refused: .*: check the credentials of the"),
        ({}, "s3://there-is-none/zoo", r"no such bucket\): .* \(aws s3 mb s3://there-is-none\)"),
        ({"PYTHONPATH": str(ROOT)}, "", r"Install s3fs.*: pip install selfdistill\[s3\]"),
    ],
    ids=["no credentials", "wrong credentials", "no bucket", "no extra"],
)
def test_mistakes(
    store: str, server: Server, images: Path, variables: dict[str, str], address: str, said: str
) -> None:
    variables = {"HOME": str(images), **variables}  # without ~/.aws
    address = address or f"{store}/zoo"
    wrong = variables.get("AWS_ACCESS_KEY_ID") == "wrong"
    server.admit(0 if wrong else 10**9)
    try:
        commands = [
            python("data.pack", images, address, **variables),
            python("data.index", address, **variables),
            python("data.verify", address, **variables),
        ]
        lines = [refused(command) for command in commands]
    finally:
        server.admit(10**9)
    for line in lines:
        assert re.search(said, line), line
        assert address in line


def test_sources_and_subsets_are_of_files(
    store: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(pack, f"{store}/images", tmp_path / "out") == 2
    assert f"(aws s3 sync {store}/images FOLDER)" in capsys.readouterr().err
    assert call(pack, images, tmp_path / "out", "--unlabelled", f"{store}/more") == 2
    assert f"(aws s3 sync {store}/more FOLDER)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    for command in ((pack, images, "https://host/zoo"), (index, "pipe:cat tars")):
        assert call(*command) == 2
        assert "only object stores can be written to, or listed" in capsys.readouterr().err


@pytest.mark.multi
def test_training_ends_with_the_same_weights(store: str, tmp_path: Path) -> None:
    root = make_world(tmp_path / "world", samples_per_shard=4)
    files().put(f"{root}/shards/", f"{store}/shards/", recursive=True)
    settings = COMMON | {"pretrain.steps": 6, "stage": "pretrain", "data.workers": 1}
    weights = []
    for name, data in (("local", root / "shards"), ("far", f"{store}/shards")):
        table = settings | {"data": data, "model": root / "base", "output": root / name}
        table |= {"data.cache_dir": root / "cache"}
        words = [word for key, value in table.items() for word in (f"--{key}", str(value))]
        done = launch("engine/run.py", *words, ranks=1, launcher="python")
        assert done.returncode == 0, done.stderr[-3000:]
        weights.append(load_file(root / name / "pretrain" / "export" / "model.safetensors"))
    local, far = weights
    assert local.keys() == far.keys()
    assert all(torch.equal(local[key], far[key]) for key in local)
