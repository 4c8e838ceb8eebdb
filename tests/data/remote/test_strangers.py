"""Servers, manifests and caches of strangers: nothing of theirs is run, believed or waited for."""

import contextlib
import gzip
import http.server
import json
import os
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from selfdistill.data.errors import BrokenData, UserError
from selfdistill.data.remote import fetch
from selfdistill.data.remote.cache import ShardCache, fetch_bytes
from selfdistill.data.shards.manifest import Manifest
from tests.kit.launches import ROOT, environment
from tests.kit.shards import uneven

CERTIFICATE = Path(__file__).parent / "self_signed.pem"  # of 127.0.0.1, and its key


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.02)


@pytest.fixture
def split(tmp_path: Path) -> Manifest:
    return uneven(tmp_path / "www" / "train", [4, 6, 5, 3])


@contextmanager
def serving(body: bytes, coding: str = "", tls: bool = False) -> Iterator[str]:
    """A server that gives one answer; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if coding:
                self.send_header("Content-Encoding", coding)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the reader may have had enough
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http{'s' * tls}://127.0.0.1:{server.server_address[1]}/x"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    "name",
    [
        "pipe:touch x",
        "$(touch x)",
        "PIPE://touch x",
        "Pipe:touch x",
        "file:///x",
        "ssh://h/x",
        "s3://a::file:///x",
    ],
)
def test_a_manifest_cannot_run_commands(split: Manifest, name: str) -> None:
    """Neither a fetched one nor one in a folder that was downloaded."""
    path = Path(split.root) / "manifest.json"
    path.write_text(path.read_text().replace("t-000000.tar", name))
    said = f"{re.escape(repr(name))} is neither a plain file name nor an address"
    with pytest.raises(UserError, match=said):
        Manifest.load(f"pipe:cat {split.root}")
    with pytest.raises(UserError, match=said):
        Manifest.load(split.root)


@pytest.mark.parametrize(
    ("key", "value"),
    [("sha256", "../x"), ("sha256", "A" * 64), ("bytes", -1), ("bytes", 2**53), ("samples", -1)],
)
def test_hashes_and_numbers_of_a_manifest_are_bounded(
    split: Manifest, key: str, value: object
) -> None:
    path = Path(split.root) / "manifest.json"
    content = json.loads(path.read_text())
    content["shards"][0][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"is no manifest of this program: shards.0.{key}"):
        Manifest.load(split.root)


def test_a_manifest_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LARGEST", 2**20)
    with pytest.raises(
        BrokenData, match=r"cannot fetch pipe:yes.* \(more than 1 MiB; SELFDISTILL_FETCH_LARGEST"
    ):
        fetch_bytes("pipe:yes #")


def test_no_message_of_a_transfer_holds_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a library's own error in it, which may hold the address."""
    monkeypatch.setattr(fetch, "FIRST_WAIT", 0.01)
    url, lines = "http://me:pass@127.0.0.1:1/x?token=abc", list[str]()

    def fail(attempt: int) -> None:
        raise fetch.Failure(f"no luck with {url}")

    for tried in (
        lambda: fetch_bytes(url, lines.append),
        lambda: fetch.retry(url, fail, lines.append),
    ):
        with pytest.raises(BrokenData) as caught:
            tried()
        text = " ".join([str(caught.value), *lines])
        assert "pass" not in text
        assert "abc" not in text
        assert "http://***@127.0.0.1:1/x?token=***" in text


def test_a_table_without_end_fills_no_disk(split: Manifest, tmp_path: Path) -> None:
    with (Path(split.root) / "members.npy").open("ab") as file:
        file.write(bytes(2**20))
    cache = tmp_path / "cache"
    remote = Manifest.load(f"pipe:cat {split.root}", str(cache))
    most = 4096 + 32 * split.samples
    with pytest.raises(BrokenData, match=rf"is not the file .*more than {most} bytes"):
        _ = remote.members
    assert not list(cache.glob("*.part"))


def test_an_answer_that_is_compressed_all_the_same() -> None:
    """`Accept-Encoding: identity` is asked for; what a server does is its own affair."""
    content = b"what it is" * 1000
    with serving(gzip.compress(content), "gzip") as url:
        assert fetch_bytes(url) == content
    with serving(b"no gzip", "gzip") as url, pytest.raises(BrokenData, match="Content-Encoding"):
        fetch_bytes(url, lambda _: None)


def test_a_compressed_answer_counts_as_what_it_comes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LARGEST", 2**20)
    bomb = gzip.compress(bytes(2**26))
    assert len(bomb) < 2**17
    with serving(bomb, "gzip") as url, pytest.raises(BrokenData, match="more than 1 MiB"):
        fetch_bytes(url)
    monkeypatch.setenv("SELFDISTILL_FETCH_LARGEST", "64")
    with serving(bomb, "gzip") as url:
        assert len(fetch_bytes(url)) == 2**26
    monkeypatch.setenv("SELFDISTILL_FETCH_LARGEST", "much")
    with pytest.raises(UserError, match="SELFDISTILL_FETCH_LARGEST is 'much': give whole MiB"):
        fetch_bytes("pipe:echo x #")


def test_a_certificate_that_nobody_vouches_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at once; taken where the user names it."""
    lines: list[str] = []
    with serving(b"content", tls=True) as url:
        with pytest.raises(BrokenData, match=r"CERTIFICATE_VERIFY.*SSL_CERT_FILE=ca\.pem"):
            fetch_bytes(url, lines.append)
        assert not lines  # no second try
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        assert fetch_bytes(url, lines.append) == b"content"


def test_a_command_ends_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shell's child holds the pipe, and would go on for a minute."""
    # 3 s: until then the shell must have left its note, on a busy machine, too.
    monkeypatch.setattr(fetch, "_PATIENCE", 0.1)
    monkeypatch.setattr(fetch, "TRIES", 1)
    note = tmp_path / "pid"
    with pytest.raises(BrokenData, match="nothing came"):
        fetch_bytes(f"pipe:(sleep 60 & echo $! > {note}; wait) #")
    place = Path(f"/proc/{note.read_text().strip()}/stat")
    for _ in range(1000):  # a zombie until init has seen it
        try:
            if place.read_text().rpartition(")")[2].split()[0] == "Z":
                break
        except OSError:  # it is gone
            break
        time.sleep(0.02)
    else:
        pytest.fail("it still runs")


def test_a_note_of_a_failure_that_is_no_file(split: Manifest, tmp_path: Path) -> None:
    cache, info = ShardCache(tmp_path / "cache"), split.shards[0]
    os.mkfifo(cache.folder / f"{info.sha256}.failed")
    url = f"pipe:cat {split.root}/{info.name}"
    assert cache.path(url, info.sha256, info.bytes).stat().st_size == info.bytes


def test_a_cache_that_everybody_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(UserError, match=r"may be written by everybody.*chmod o-w"):
        ShardCache(folder)
    folder.chmod(0o775)  # a team's
    ShardCache(folder)


MIDWAY = """
import subprocess, sys
from selfdistill.data.cli import format_error
from selfdistill.data.errors import UserError
from selfdistill.data.remote.cache import ShardCache
from selfdistill.data.shards.manifest import Manifest

root, disk = sys.argv[1:]
split, cache = Manifest.load(root), ShardCache(disk, verify=True)
wanted = [(f"pipe:cat {root}/{i.name}", i.sha256, i.bytes) for i in split.shards]
cache.path(*wanted[0])
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
assert ShardCache(disk, verify=True).path(*wanted[0]).stat().st_size == wanted[0][2]
try:
    cache.path(*wanted[1])
except UserError as error:
    print("error:", format_error(error))
"""


def test_a_disk_that_turns_read_only_midway(split: Manifest, tmp_path: Path) -> None:
    """On a real file system: what is cached is still read, what is not is said in a line."""
    disk, script = tmp_path / "disk", tmp_path / "midway.py"
    disk.mkdir()
    script.write_text(MIDWAY)
    mount = f"mount -t tmpfs -o size=9m,mode=755 tmpfs {disk}"
    inner = f"{mount} && {sys.executable} {script} {split.root} {disk}"
    done = subprocess.run(
        ["unshare", *(["-m"] if os.geteuid() == 0 else ["-rm"]), "sh", "-c", inner],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT), SELFDISTILL_CACHE=str(tmp_path / "tables")),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"error: cannot keep .* \(Read-only file system\): .*\n", done.stdout), done
