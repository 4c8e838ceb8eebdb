"""Damaged data in whole stages: what is skipped is counted over the ranks, what is hidden is found.

All cases run in one process group of two ranks.
"""

import http.server
import io
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selfdistill.data import pack
from selfdistill.data.loading.order import Order
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest
from tests.kit.launches import make_world, metrics, run_cases

pytestmark = pytest.mark.multi

BATCH = 8


def damage(manifest: Manifest, sample: int, column: int, change: Callable[[bytes], bytes]) -> None:
    """Changes the bytes of a sample's member (column 0: input, 2: label); the size stays."""
    shard = int(np.searchsorted(manifest.starts, sample, side="right")) - 1
    at, size = (int(x) for x in manifest.members[sample, column : column + 2])
    path = Path(manifest.shard_place(shard))
    content = path.read_bytes()
    changed = change(content[at : at + size])
    assert len(changed) == size
    path.write_bytes(content[:at] + changed + content[at + size :])


def flipped(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def unnoticed(content: bytes) -> bytes:
    """A bit is another, and Pillow reads other pixels without a word."""
    before = np.asarray(Image.open(io.BytesIO(content)))
    for at in range(len(content) - 4, len(content) // 2, -1):
        changed = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        try:
            after = np.asarray(Image.open(io.BytesIO(changed)))
        except OSError:
            continue
        if after.shape == before.shape and (after != before).any():
            return changed
    raise AssertionError("every flipped bit shows")


def met(train: Manifest, step: int, rank: int) -> list[int]:
    """The samples that one of two ranks meets at a step of a stage."""
    order = Order(train.counts, 0, 1, 0)
    return [int(i) for i in order.ids(order.slice(step, BATCH, rank, 2))]


def next_class(label: bytes) -> bytes:
    return str((int(label) + 1) % 3).encode()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; what lies in a folder of that name is forbidden."""

    def do_GET(self) -> None:
        if "/forbidden/test/" in self.path:
            self.send_error(403)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(root))
    ) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("skipping"), samples_per_shard=9)
    for path in sorted((root / "images").rglob("*.png")):
        jpeg = root / "jpegs" / path.relative_to(root / "images").with_suffix(".jpg")
        jpeg.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).save(jpeg, quality=90)
    pack.pack(str(root / "jpegs"), str(root / "originals"), keep_original=True)
    return root


def copied(root: Path, name: str, of: str = "shards") -> Callable[[str], Manifest]:
    """A copy of a data set, by split."""
    shutil.copytree(root / of, root / name)
    return lambda split: Manifest.load_split(str(root / name), split)


@pytest.fixture(scope="module")
def printed(root: Path, url: str) -> str:
    """What all the cases print."""
    one = copied(root, "one")
    damage(one("train"), 3, 0, flipped)
    for split in ("val", "test"):
        damage(one(split), 2, 0, flipped)

    # Each rank meets one of two: in its part of the feature table, and in the first step. Of three
    # a launch meets one before its checkpoint and two after it, the next launch those two.
    train = Manifest.load_split(str(root / "shards"), "train")
    first, second = (met(train, 0, rank) for rank in (0, 1))
    third = [met(train, 2, rank)[0] for rank in (0, 1)]
    pairs = (("table", 2, 20), ("stream", first[0], second[0]), ("resumed", first[0], *third))
    for name, *pair in pairs:
        both = copied(root, name)("train")
        for sample in pair:
            damage(both, sample, 0, flipped)

    damage(copied(root, "pixels", "originals")("train"), 4, 0, unnoticed)
    damage(copied(root, "label", "originals")("train"), 4, 2, next_class)
    damage(copied(root, "png-label")("train"), 4, 2, next_class)
    damage(copied(root, "val-label")("val"), 4, 2, next_class)

    for name in ("absent", "forbidden", "corrupt"):
        copied(root, name)
    shutil.rmtree(root / "absent" / "test")
    (root / "corrupt" / "test" / "manifest.json").write_text("<html>")

    some, often = {"data.skip_broken": 0.08}, {"pretrain.steps": 3, "save_every": 1}
    shared = {
        "model": str(root / "base"),
        "teacher": str(root / "teacher"),
        "finetune.start": "model",
    }

    def case(stage: str, data: str, output: str, **more: Any) -> dict[str, Any]:
        place = data if "://" in data else str(root / data)
        found = {"stage": stage, "data": place, "output": str(root / "runs" / output)}
        return shared | found | {f"{stage}.steps": 1, "finetune.warmup": 0} | more

    skip, cached = {"data.skip_broken": 0.07}, {"teacher.mode": "cached"}
    remote = {"data.cache_dir": str(root / "cache"), "data.window": 1}
    shard = train.shards[0].bytes
    whole = {"expect_error": "sha256 is not the manifest's, though every sample can be read"}
    cases = [
        case("distill", "one", "one", **skip, **cached, **{"distill.steps": 14}),
        case("finetune", "one", "one", **skip, **{"finetune.steps": 4, "finetune.eval_every": 2}),
        case("distill", "table", "table", expect_error="2 broken samples are", **skip, **cached),
        case("pretrain", "stream", "stream", expect_error="2 broken samples are", **skip),
        case("pretrain", "resumed", "resumed", expect_error="3 broken", **some, **often),
        case("pretrain", "resumed", "resumed", **{"data.skip_broken": 0.12}, **often),
        case("pretrain", "pixels", "pixels", **whole),
        case("pretrain", "pixels", "pixels-skip", **skip, **whole),
        case("pretrain", "pixels", "pixels-never", **{"data.check": "never"}),
        case("finetune", "label", "label", **whole),
        case("finetune", "png-label", "png-label", **whole),
        case("finetune", "val-label", "val-label", **whole),
        case("pretrain", "png-label", "png-auto"),
        case("pretrain", "png-label", "png-always", **{"data.check": "always"}, **whole),
        case("finetune", f"{url}/absent", "absent", **remote),
        case("finetune", f"{url}/forbidden", "forbidden", expect_error="cannot fetch"),
        case("finetune", f"{url}/corrupt", "corrupt", expect_error="is no manifest"),
        case(
            "pretrain",
            f"{url}/shards",
            "small-cache",
            **remote | {"data.cache_dir": str(root / "small"), "data.cache_gb": 1.6 * shard / 1e9},
        ),
    ]
    return run_cases(root / "cases", cases)


def result(root: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((root / "runs" / stage / "result.json").read_text()))


def test_a_skipped_sample_is_told_and_counted_once(root: Path, printed: str) -> None:
    train = Manifest.load_split(str(root / "one"), "train")
    lines = [x for x in printed.splitlines() if "warning: skipped: " in x and "/one/train/" in x]
    # By the rank whose part of the table it is in, and by the other one that meets it later.
    assert 1 <= len(lines) <= 2
    assert train.shards[0].name in lines[0]
    counts = [line["data/skipped"] for line in metrics(root / "runs/one/distill-1")]
    assert counts[-1] == 1
    assert sorted(counts) == counts
    assert result(root, "one/distill-1")["skipped"] == 1
    listed = json.loads((root / "runs/one/distill-1/skipped.json").read_text())
    assert list(listed) == ["3"]
    assert "the image cannot be read" in listed["3"]


def test_both_ranks_met_the_sample(root: Path, printed: str) -> None:
    """Otherwise the test above does not show that it is counted once."""
    train = Manifest.load_split(str(root / "one"), "train")
    for rank in (0, 1):
        assert any(3 in met(train, step, rank) for step in range(14))


def test_a_skipped_row_of_the_table_is_nan(root: Path, printed: str) -> None:
    table = np.load(root / "runs/one/distill-1/teacher/features.npy")
    assert np.flatnonzero(np.isnan(table).any(axis=1)).tolist() == [3]
    assert np.isnan(table[3]).all()


def test_evaluation_leaves_broken_samples_out(root: Path, printed: str) -> None:
    scores = result(root, "one/finetune-model")["metrics"]
    assert scores["val_samples"] == scores["test_samples"] == 14
    for split in ("val", "test"):
        # Three evaluations of val and one of test: each says it once, on one rank.
        assert printed.count(f"warning: {root}/one/{split}: scored without 1 broken of 15") == 1
        assert printed.count(f"warning: skipped: shard {root}/one/{split}/") == 1


def test_the_share_holds_for_all_ranks_together(root: Path, printed: str) -> None:
    for name in ("table", "stream"):
        assert not list((root / "runs" / name).glob("*/result.json"))
        line = next(x for x in printed.splitlines() if f"as expected: {root}/{name}/train" in x)
        assert "--data.skip_broken" in line
        assert "data.verify" in line


def test_a_resumed_stage_goes_on_counting(root: Path, printed: str) -> None:
    assert "pretrain: resumed at step 2 of 3" in printed
    assert result(root, "resumed/pretrain")["skipped"] == 3
    assert [x.get("data/skipped") for x in metrics(root / "runs/resumed/pretrain")] == [1, 1, 3]


def test_hidden_damage_is_named_before_training(root: Path, printed: str) -> None:
    for name in ("pixels", "label", "png-label", "val-label"):
        split = "val" if name == "val-label" else "train"
        line = next(x for x in printed.splitlines() if f"as expected: shard {root}/{name}/" in x)
        assert f"/{name}/{split}/" in line
        assert "copy it again" in line
    # Nothing else sees it, or the check would not be needed.
    for name in ("pixels-never", "png-auto"):
        assert result(root, f"{name}/pretrain")["steps"] == 1
    broken = Reader(Manifest.load_split(str(root / "pixels"), "train")).record(4)
    whole = Reader(Manifest.load_split(str(root / "originals"), "train")).record(4)
    assert broken.input != whole.input
    assert broken.label == whole.label


def test_an_absent_split_is_told_and_no_other_failure_is_taken_for_it(
    root: Path, url: str, printed: str
) -> None:
    assert f"no test split, nothing is scored on it: cannot fetch {url}/absent/test/" in printed
    scores = result(root, "absent/finetune-model")["metrics"]
    assert scores["val_samples"] == 15
    assert "test_samples" not in scores
    assert "as expected: cannot fetch" in printed
    assert f"{url}/corrupt/test/manifest.json is no manifest" in printed


def test_a_small_cache_is_told(printed: str) -> None:
    assert "warning: two shuffle windows of shards have" in printed
    assert "--data.cache_gb 1" in printed
