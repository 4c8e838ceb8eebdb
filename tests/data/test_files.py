"""Files in folders that others may write to: no link there leads to a victim."""

import os
from pathlib import Path

import pytest

from selfdistill.data.errors import UserError
from selfdistill.data.files import fresh, nofollow
from selfdistill.data.remote.cache import ShardCache
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.checkpoints.folder import open_run
from selfdistill.engine.config.options import load
from selfdistill.engine.monitoring.monitor import Monitor
from selfdistill.engine.runtime.distributed import Ranks
from tests.kit.shards import uneven


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    file = tmp_path / "victim"
    file.write_text("precious")
    return file


def test_a_link_is_refused_and_a_draft_takes_its_place(victim: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(victim)
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT):
        with pytest.raises(UserError, match="link is a symbolic link, which is not followed"):
            nofollow(str(link), flags)
    with fresh(link) as file:
        file.write("new")
    assert (link.read_text(), victim.read_text()) == ("new", "precious")
    assert not link.is_symlink()


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        for flags in (os.O_RDONLY, os.O_WRONLY):  # neither waits for the pipe's other end
            with pytest.raises(UserError, match="is no regular file"):
                nofollow(str(path), flags)


def test_links_in_a_run_folder_destroy_nothing(victim: Path, tmp_path: Path, ranks: Ranks) -> None:
    for name in (".result.json.tmp", ".config.toml.tmp"):
        (tmp_path / name).symlink_to(victim)
        write_text(tmp_path / name[1:-4], "content")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(victim)
    with pytest.raises(UserError, match=r"\.lock is a symbolic link"):
        open_run(load({"output": str(run), "watchdog": 0}), ranks)
    stage = tmp_path / "stage"
    stage.mkdir()
    (stage / "metrics.jsonl").symlink_to(victim)
    options = {"stage": "pretrain", "steps": 1, "samples_per_step": 1, "log_every": 1}
    with Monitor(stage, enabled=True, quiet=True, **options) as monitor:
        monitor.log(1, {"loss": 1.0})
    assert not (stage / "metrics.jsonl").is_symlink()
    assert victim.read_text() == "precious"


def test_links_in_a_cache_destroy_nothing(victim: Path, tmp_path: Path) -> None:
    split = uneven(tmp_path / "train", [2, 2])
    info, cache = split.shards[0], ShardCache(tmp_path / "cache")
    url = f"pipe:cat {split.root}/{info.name}"
    (cache.folder / f"{info.sha256}.part").symlink_to(victim)
    (cache.folder / info.sha256).symlink_to(victim)
    os.truncate(victim, info.bytes)  # of the right size
    kept = victim.read_bytes()
    handle = cache.open(url, info.sha256, info.bytes)
    assert os.read(handle, info.bytes) == (Path(split.root) / info.name).read_bytes()
    os.close(handle)
    assert victim.read_bytes() == kept
    (cache.folder / f"{split.shards[1].sha256}.lock").symlink_to(victim)
    with pytest.raises(UserError, match="is a symbolic link"):
        cache.path("pipe:false", split.shards[1].sha256, split.shards[1].bytes)


def test_a_swapped_file_of_a_cache_is_noticed_where_it_is_asked_for(tmp_path: Path) -> None:
    split = uneven(tmp_path / "train", [2, 2])
    info = split.shards[0]
    url = f"pipe:cat {split.root}/{info.name}"
    content = (Path(split.root) / info.name).read_bytes()
    lines: list[str] = []
    ShardCache(tmp_path / "cache").path(url, info.sha256, info.bytes)
    place = tmp_path / "cache" / info.sha256
    place.write_bytes(bytes(info.bytes))
    trusting = ShardCache(tmp_path / "cache", report=lines.append)
    assert trusting.path(url, info.sha256, info.bytes).read_bytes() == bytes(info.bytes)
    careful = ShardCache(tmp_path / "cache", report=lines.append, verify=True)
    assert careful.path(url, info.sha256, info.bytes).read_bytes() == content
    assert lines == [f"{place} is not what its name says: it is fetched again"]
