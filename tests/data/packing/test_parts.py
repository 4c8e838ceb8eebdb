"""--part of data.pack and data.index: any number of launches, in any order, interrupted or not."""

import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from selfdistill.data.errors import UserError
from selfdistill.data.index import index
from selfdistill.data.pack import pack
from selfdistill.data.verify import verify
from tests.kit.command import call
from tests.kit.launches import ROOT, environment
from tests.kit.shards import class_folders, numbered, png


def files(root: Path) -> dict[str, bytes]:
    """Every file below a folder; parts.json, which one launch has no need of, aside."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != "parts.json"
    }


def in_parts(source: Path, out: Path, of: int, **options: Any) -> None:
    """Packs as so many parts, the last one first."""
    for number in range(of, 0, -1):
        pack(str(source), str(out), part=f"{number}/{of}", **options)


def pictures(root: Path) -> tuple[Path, dict[str, Any]]:
    class_folders(root / "images", {"ant": 23, "bee": 9, "cow": 14})
    for number in range(0, 40, 13):
        (root / f"images/bee/{900 + number}.png").write_bytes(b"no image")
    return root / "images", {"samples_per_shard": 5, "skip_broken": True}


def several(root: Path) -> tuple[Path, dict[str, Any]]:
    rows = ["path,label"]
    for i, names in enumerate(itertools.islice(itertools.cycle(["a;b", "", "b", "c;a"]), 30)):
        (root / f"{i}.png").write_bytes(png(numbered(i)))
        rows.append(f"{i}.png,{names}")
    (root / "list.csv").write_text("\n".join(rows) + "\n")
    return root / "list.csv", {"label_separator": ";", "samples_per_shard": 4}


def texts(root: Path) -> tuple[Path, dict[str, Any]]:
    (root / "t.txt").write_text("".join(f"line {i % 90}\n" for i in range(100)))
    return root / "t.txt", {"samples_per_shard": 7}


def joined(root: Path) -> tuple[Path, dict[str, Any]]:
    class_folders(root / "more", {"x": 6}, start=100)
    class_folders(root / "images", {"ant": 8, "bee": 8})
    options = {"unlabelled": str(root / "more"), "splits": "0.5,0.5", "samples_per_shard": 3}
    return root / "images", options


@pytest.mark.parametrize("source", [pictures, several, texts, joined])
@pytest.mark.parametrize("of", [1, 3, 7])
def test_the_set_is_that_of_one_launch(
    source: Any, of: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, options = source(tmp_path)
    pack(str(place), str(tmp_path / "one" / "set"), **options)
    alone = capsys.readouterr().out
    in_parts(place, tmp_path / "parts" / "set", of, **options)
    assert files(tmp_path / "parts" / "set") == files(tmp_path / "one" / "set")
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["set"]
    told = capsys.readouterr().out
    for line in alone.replace(f"{tmp_path}/one", f"{tmp_path}/parts").splitlines():
        if line.startswith(str(tmp_path)):  # samples, classes, shards, bytes
            assert line in told
    verify(str(tmp_path / "parts" / "set"))
    pack(str(place), str(tmp_path / "parts" / "set"), part=f"1/{of}", **options)
    assert "is complete: nothing is left to do" in capsys.readouterr().out


def launched(place: Path, out: Path, part: str) -> "subprocess.Popen[str]":
    words = ["data.pack", place, out, "--samples_per_shard", "5", "--part", part]
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_parts_at_the_same_time(tmp_path: Path) -> None:
    class_folders(tmp_path / "images", {"ant": 60, "bee": 40})
    pack(str(tmp_path / "images"), str(tmp_path / "one" / "set"), samples_per_shard=5)
    out = tmp_path / "parts" / "set"
    started = [launched(tmp_path / "images", out, f"{n}/3") for n in (1, 2, 3)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert files(out) == files(tmp_path / "one" / "set")
    assert sum(f"{out}/train: " in told for told, _ in said) == 1


def test_a_killed_part_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "images", {"ant": 60, "bee": 40})
    pack(str(tmp_path / "images"), str(tmp_path / "one" / "set"), samples_per_shard=5)
    out = tmp_path / "parts" / "set"
    waiting = out.parent / ".set.train-val-test.parts"
    process = launched(tmp_path / "images", out, "1/2")
    until = time.monotonic() + 100
    while len(list(waiting.glob(".records/train/*.npz"))) < 2 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (waiting / "train" / ".set-train-000099.tar.1").write_bytes(b"half")  # as a kill leaves it
    there = {path: path.stat().st_mtime_ns for path in waiting.glob("train/set-train-*.tar")}
    recorded = {path.stem for path in waiting.glob(".records/train/*.npz")}
    pack(str(tmp_path / "images"), str(out), samples_per_shard=5, part="1/2")
    told = capsys.readouterr().out
    assert "10 of 20 shards are not done yet: of parts 2 of 2" in told
    kept = [path for path in there if path.stem[-6:] in recorded]
    assert kept
    assert all(path.stat().st_mtime_ns == there[path] for path in kept)
    pack(str(tmp_path / "images"), str(out), samples_per_shard=5, part="2/2")
    assert files(out) == files(tmp_path / "one" / "set")


def test_a_join_that_was_killed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "images", {"ant": 20, "bee": 20})
    source, out = str(tmp_path / "images"), tmp_path / "parts" / "set"
    pack(source, str(tmp_path / "one" / "set"), samples_per_shard=5)
    pack(source, str(out), samples_per_shard=5, part="1/2")
    waiting = out.parent / ".set.train-val-test.parts"
    joining = waiting.with_name(f"{waiting.name}.joining-node7-12")
    waiting.rename(joining)
    pack(source, str(out), samples_per_shard=5, part="2/2")
    assert f"mv {joining} {waiting}, and launch any part again" in capsys.readouterr().out
    joining.rename(waiting)
    shutil.copytree(waiting, tmp_path / "kept")
    pack(source, str(out), samples_per_shard=5, part="2/2")
    # Killed after the first split was moved.
    shutil.copytree(tmp_path / "kept", waiting)
    shutil.rmtree(out / "train")
    pack(source, str(out), samples_per_shard=5, part="2/2")
    assert files(out) == files(tmp_path / "one" / "set")


def test_a_join_that_was_killed_at_the_shared_shards(tmp_path: Path) -> None:
    place, options = joined(tmp_path)
    pack(str(place), str(tmp_path / "one" / "set"), **options)
    out = tmp_path / "parts" / "set"
    pack(str(place), str(out), part="1/2", **options)
    (waiting,) = out.parent.glob(".set.*.parts")
    first = next((waiting / "train").glob("*.tar"))
    (waiting / "unlabelled" / first.name).hardlink_to(first)
    pack(str(place), str(out), part="2/2", **options)
    assert files(out) == files(tmp_path / "one" / "set")


def tars(folder: Path) -> Path:
    """Seven tars of pictures, some of 16 bits, with their classes by name; one has no picture."""
    (folder / "train").mkdir(parents=True)
    for tar in range(7):
        with tarfile.open(folder / "train" / f"t{tar}.tar", "w") as file:
            for sample in range(3):
                deep = Image.new("I;16", (4, 4), 100 * tar + sample)
                picture = png(deep if sample == 1 else numbered(sample))
                name = {"animal": ["cow", "ant", "bee"][(tar + sample) % 3], "by": "me"}
                members = [("json", json.dumps(name).encode()), ("txt", b"a note")]
                if (tar, sample) != (4, 2):
                    members.append(("png", picture))
                for suffix, content in members:
                    info = tarfile.TarInfo(f"{tar}-{sample}.{suffix}")
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize("of", [1, 3, 9])
def test_an_index_in_parts(of: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words: dict[str, Any] = {"label_field": "animal", "skip_incomplete": True}
    index(str(tars(tmp_path / "one")), **words)
    alone = capsys.readouterr().out
    parts = tars(tmp_path / "parts")
    for number in range(of, 1, -1):
        index(str(parts), part=f"{number}/{of}", **words)
        assert f"part {number}/{of}: " in (said := capsys.readouterr().out)
        assert "shards are not done yet: of parts 1" in said
    if of > 1:
        with pytest.raises(UserError, match=r"begun with label_field animal, not by: give every"):
            index(str(parts), part=f"1/{of}", **(words | {"label_field": "by"}))
    index(str(parts), part=f"1/{of}", **words)
    assert capsys.readouterr().out == alone.replace(f"{tmp_path}/one", f"{tmp_path}/parts")
    assert "601" in alone  # the range of values is that of all tars
    assert files(parts) == files(tmp_path / "one")
    index(str(parts), part=f"1/{of}", **words)
    assert "manifest.json is there: nothing is left to do" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"remove the manifests"):
        index(str(parts), part="1/2", overwrite=True)


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class_folders(tmp_path / "images", {"ant": 20, "bee": 20})
    source, out = str(tmp_path / "images"), str(tmp_path / "out" / "set")

    def refused(message: str, **options: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            pack(options.pop("source", source), out, **({"part": "1/3"} | options))
        assert "\n" not in str(caught.value)

    for text in ("4/3", "0/3", "3", "a/b", "-1/3", "1/0"):
        refused(rf"--part {text}: give a number and how many there are, such as 3/64", part=text)
    refused("remove OUT", overwrite=True)
    refused("--range auto looks at all pictures", range="auto")
    shutil.make_archive(str(tmp_path / "set"), "tar", tmp_path / "images")
    refused("every part would unpack .*set.tar anew", source=str(tmp_path / "set.tar"))
    pack(source, out, part="1/3", size=4, samples_per_shard=6)
    assert "of parts 2, 3 of 3" in capsys.readouterr().out
    refused(r"was begun with stored .*'size': 4.*not .*'size': 8", size=8, samples_per_shard=6)
    refused("was begun with channels None, not 2", size=4, samples_per_shard=6, channels="2")
    refused("was begun with samples_per_shard 6, not 5", size=4, samples_per_shard=5)
    (tmp_path / "images" / "ant" / "late.png").write_bytes(png(numbered(77)))
    refused("another source: give every part the same", size=4, samples_per_shard=6)
    (tmp_path / "images" / "ant" / "late.png").unlink()
    for number in (2, 1):  # another number of parts is no matter
        pack(source, out, part=f"{number}/2", size=4, samples_per_shard=6)
    refused(r"set/train exists: give another folder, or remove it", size=8)
    foreign = Path(out) / "unlabelled"
    shutil.copytree(Path(out) / "val", foreign)
    refused(
        r"set/unlabelled exists: give another folder, or remove it", size=4, samples_per_shard=6
    )
    shutil.rmtree(foreign)
    told = json.loads((Path(out) / "train" / "parts.json").read_text())
    assert told["source"]["train"]["samples"] == 32
    (tmp_path / "images" / "ant" / "torn.png").write_bytes(b"no image")
    words = [source, tmp_path / "torn", "--part", "1/1"]
    assert call(pack, *words) == 2
    assert "torn.png: the image cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [False, True])
def test_no_part_sees_the_range_of_deep_pictures(
    keep: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Twelve bits packed as sixteen would be nearly black."""
    for number in range(4):
        place = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png(Image.new("I;16", (4, 4), 1000 + number)))
    source, out = tmp_path / "images", tmp_path / "parts" / "set"
    words = ["--splits", "1", "--keep_original", keep, "--skip_broken"]
    assert call(pack, source, out, *words, "--part", "1/1") == 2
    said = capsys.readouterr().err
    assert "no part sees the values of all: give --range LOW,HIGH (0,65535 for the whole" in said
    words, ranged = [*words, "--range", "0,4095"], out.with_name("ranged")
    assert call(pack, source, tmp_path / "one" / "set", *words) == 0
    assert call(pack, source, ranged, *words, "--name", "set", "--part", "1/1") == 0
    assert files(ranged) == files(tmp_path / "one" / "set")
