"""A thousand million samples in a hundred thousand shards: what their index costs a rank."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.kit.launches import ROOT, environment

SAMPLES, SHARDS = 10**9, 10**5

OPEN = """
import resource, sys, time
from selfdistill.data.loading.order import Order
from selfdistill.data.loading.reader import Reader
from selfdistill.data.shards.manifest import Manifest

def mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before, began = mib(), time.process_time()
manifest = Manifest.load(sys.argv[1])
order, reader = Order(manifest.counts, 0), Reader(manifest)
reader.check_shards()
ids = order.ids(order.slice(10**6 + 17, 1024, 3, 8))
assert len(set(ids.tolist())) == 128 and 0 <= ids.min() and ids.max() < manifest.samples
assert manifest.members[int(ids[0])].tolist() == [0, 0, 0, 0]
assert len(reader._starts) == len(reader._sizes) + 1 == len(reader._places) + 1
print(mib() - before, time.process_time() - began)
"""


def test_the_index_is_small_and_quickly_read(tmp_path: Path) -> None:
    table = tmp_path / "members.npy"  # 32 GB, of which a sparse file has a few KB
    np.lib.format.open_memmap(table, "w+", np.int64, (SAMPLES, 4)).flush()
    shard = {"bytes": 10**8, "samples": SAMPLES // SHARDS}
    content = {
        "format": "selfdistill-shards",
        "version": 1,
        "kind": "image",
        "split": "train",
        "classes": [],
        "class_counts": [],
        "samples": SAMPLES,
        "image": {"size": 224, "stored": "png"},
        "members": {"file": table.name, "sha256": "0" * 64},
        "shards": [
            {"name": f"t-{i:06d}.tar", "sha256": f"{i:064x}"} | shard for i in range(SHARDS)
        ],
    }
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    done = subprocess.run(
        [sys.executable, "-c", OPEN, tmp_path],
        cwd=ROOT,
        env=environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=True,
    )
    mib, seconds = map(float, done.stdout.split())
    assert mib < 300
    assert seconds < 20, "3 s on a machine that does nothing else"
