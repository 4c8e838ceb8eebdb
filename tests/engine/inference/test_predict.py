"""launcher.predict: labels score as evaluation did, on any number of ranks, interrupted or not."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import accuracy_score
from transformers import ViTConfig, ViTForImageClassification

from selfdistill.data import pack
from selfdistill.data.errors import UserError
from selfdistill.data.inputs.packed import Packed
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.inference import work
from selfdistill.engine.inference.model import load
from selfdistill.engine.inference.parts import BLOCK, Parts
from selfdistill.engine.models.images.types.base import IMAGENET_MEAN, IMAGENET_STD
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.launcher import predict as command
from selfdistill.launcher.predict import predict
from tests.data.inputs import messy
from tests.engine.inference.test_foreign import SIZES
from tests.engine.inference.test_model import trained
from tests.kit import texts as text_kit
from tests.kit import warm
from tests.kit.launches import ROOT, environment, launch, make_base

PHOTOS = {
    "broken.jpg": "runcated",
    "empty.png": "it is empty",
    "IMG_1.HEIC": "it is HEIC, which is not read here: convert it to JPEG or PNG",
    "text.jpg": "it is no image of a known kind",
}


class World:
    """A packed set, a run on it, and its test pictures in a mess."""

    def __init__(self, root: Path, ranks: Ranks) -> None:
        self.root, self.photos = root, root / "photos"
        self.truth = messy.make(root)
        pack.pack(str(root / "set"), str(root / "shards"), size=messy.SIDE)
        make_base(root / "base", size=messy.SIDE)
        options = {"data.path": str(root / "shards"), "model.path": str(root / "base")}
        more = {"finetune.start": "model", "finetune.steps": 14, "finetune.lr": 3e-3}
        more |= {"finetune.seeds": 2, "finetune.flip": False}
        self.run = trained(ranks, output=str(root / "run"), **options, **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Iterator[World]:
    threads = torch.get_num_threads()
    yield World(tmp_path_factory.mktemp("world"), ranks)
    torch.set_num_threads(threads)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_labels_of_a_mess_score_as_the_run_did(world: World, tmp_path: Path) -> None:
    out = tmp_path / "labels.csv"
    done = predict(str(world.run), str(world.photos), str(out), top=2)
    found = rows(out)
    assert [row["path"] for row in found] == sorted(
        (str(p) for p in [*world.truth, *(world.photos / name for name in PHOTOS)]), key=Path
    )
    errors = {Path(row["path"]).name: row["error"] for row in found if row["error"]}
    assert errors.keys() == PHOTOS.keys()
    assert all(PHOTOS[name] in error for name, error in errors.items())
    assert done.unreadable == len(PHOTOS)
    good = [row for row in found if not row["error"]]
    chosen = load(world.run)
    seed = Path(chosen.notes[-1].split()[1].rstrip(","))
    result = json.loads((seed / "result.json").read_text())["metrics"]
    right = accuracy_score([world.truth[row["path"]] for row in good], [r["class"] for r in good])
    assert right == result["test_accuracy"]
    assert 0.5 < right < 1  # a model that is always right, or never, would show nothing
    for row in good:
        assert float(row["probability"]) >= float(row["probability_2"])
    assert not list(tmp_path.glob("*.parts"))


def test_originals_are_decoded_to_what_was_packed(world: World) -> None:
    model = load(world.run)
    manifest = Manifest.load_split(str(world.root / "shards"), "test")
    assert manifest.span is not None  # 12 bits: the export has to know
    packed, codec = Packed(manifest), model.codec_of(manifest)
    for place in range(packed.samples):
        one = packed.read(place)
        words = re.split("[_.-]", one.name)  # 00000001-blue_with_spaces_1.png
        (path,) = (world.root / "set/test" / words[1]).glob(f"* {words[-2]}.*")
        ours = model.decode(path.read_bytes(), path.name)
        np.testing.assert_array_equal(ours, codec.decode(one.content, one.name))


def listed(world: World, folder: Path, count: int = 1200) -> Path:
    """A table of many rows, among them some that cannot be read, and further columns."""
    names = [os.path.relpath(path, folder) for path in sorted(world.truth)]
    table = folder / "many.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["picture", "patient"])
        writer.writerows(
            [names[i % len(names)] if i % 97 else f"gone {i}.png", i] for i in range(count)
        )
    return table


@pytest.mark.multi
def test_any_number_of_ranks_and_interruptions_give_one_file(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, one = listed(world, tmp_path), tmp_path / "one.csv"
    options = {"path_column": "picture", "top": 3}
    predict(str(world.run), str(table), str(one), **options)
    assert [row["path"] for row in rows(one)][:3] == [
        "gone 0.png",
        *(os.path.relpath(path, tmp_path) for path in sorted(world.truth)[1:3]),
    ]

    # Interrupted in its second block, refused with other settings, and gone on with.
    calls, honest = [], command.rows_of

    def interrupted(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return honest(*given)

    two = tmp_path / "two.csv"
    with monkeypatch.context() as patch:
        patch.setattr(command, "rows_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            predict(str(world.run), str(table), str(two), **options)
    assert not two.exists()
    with pytest.raises(UserError, match=r"another settings.*--overwrite begins anew"):
        predict(str(world.run), str(table), str(two), path_column="picture", top=2)
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(command, "rows_of", lambda *given: calls.append(1) or honest(*given))
        predict(str(world.run), str(table), str(two), **options)
    assert 0 < len(calls) <= 11  # of 19 batches the first block's 8 were there
    assert two.read_bytes() == one.read_bytes()

    three = tmp_path / "three.csv"
    words = ["--module", "selfdistill.launcher.predict", world.run, table, three]
    done = launch(*words, "--path_column", "picture", "--top", "3", ranks=3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert three.read_bytes() == one.read_bytes()
    assert "13 unreadable" in done.stdout
    assert not list(tmp_path.glob("*.parts"))


def test_the_three_kinds_of_tables_agree(world: World, tmp_path: Path) -> None:
    outs = [tmp_path / f"out.{kind}" for kind in ("csv", "jsonl", "parquet")]
    for out in outs:
        predict(str(world.run), str(world.root / "shards/test"), str(out), top=2)
    plain = rows(outs[0])
    lines = [json.loads(line) for line in outs[1].read_text().splitlines()]
    assert pq.read_table(outs[2]).to_pylist() == lines
    assert [{k: str(v) for k, v in line.items()} for line in lines] == plain
    assert list(lines[0]) == ["path", "class", "probability", "class_2", "probability_2", "error"]


def test_texts_from_files_and_standard_input(tmp_path: Path, ranks: Ranks) -> None:
    text_kit.make_texts(tmp_path / "shards", other=12)
    text_kit.make_language(tmp_path / "base")
    options = {"data.path": str(tmp_path / "shards"), "model.path": str(tmp_path / "base")}
    more = {"finetune.start": "model", "finetune.steps": 12, "finetune.lr": 5e-3}
    run = trained(ranks, output=str(tmp_path / "run"), **options, **more)
    packed = tmp_path / "packed.jsonl"
    predict(str(run), str(tmp_path / "shards"), str(packed), split="test")
    expected = [json.loads(line) for line in packed.read_text().splitlines()]
    result = json.loads((run / "finetune-model/result.json").read_text())["metrics"]
    labels = [number % 3 for number in range(12)]  # as they were made
    assert (
        accuracy_score(labels, ["abc".index(r["class"]) for r in expected])
        == (result["test_accuracy"])
    )
    split = Packed(Manifest.load_split(str(tmp_path / "shards"), "test"))
    texts = [split.read(i).content.decode() for i in range(split.samples)]
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"body": t, "id": f"k{i}"}) + "\n" for i, t in enumerate(texts))
    )
    (tmp_path / "t.txt").write_text("\n".join(texts))
    with (tmp_path / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "body"], *([i, t] for i, t in enumerate(texts))])
    for name in ("t.jsonl", "t.txt", "t.csv"):
        out = tmp_path / f"{name}.out.jsonl"
        predict(str(run), str(tmp_path / name), str(out), text_column="body")
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [r["class"] for r in found] == [r["class"] for r in expected]
        assert [r["probability"] for r in found] == [r["probability"] for r in expected]
    done = subprocess.run(
        [warm.executable(), "-m", "launcher.predict", run, "-", tmp_path / "stdin.csv"],
        input="\n".join(texts),
        text=True,
        capture_output=True,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert [r["class"] for r in rows(tmp_path / "stdin.csv")] == [r["class"] for r in expected]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.png").touch()
    with pytest.raises(UserError, match=r"has no texts .*\.png"):
        predict(str(run), str(tmp_path / "photos"), str(tmp_path / "x.csv"))


def test_a_model_of_several_classes_names_all_above_a_half(world: World, tmp_path: Path) -> None:
    torch.manual_seed(1)
    names = {i: f"n{i}" for i in range(6)}
    config = ViTConfig(**SIZES, id2label=names, problem_type="multi_label_classification")
    theirs = ViTForImageClassification(config).eval()
    torch.nn.init.normal_(theirs.classifier.weight)
    theirs.save_pretrained(tmp_path / "export")
    data, out = world.root / "shards/test", tmp_path / "out"
    predict(str(tmp_path / "export"), str(data), f"{out}.jsonl")
    predict(str(tmp_path / "export"), str(data), f"{out}.csv")
    lines = [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]
    split, model = Packed(Manifest.load(str(data))), load(tmp_path / "export")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    for place, line in enumerate(lines[:20]):
        pixels = model.decode(split.read(place).content, "")
        with torch.no_grad():
            logits = theirs(((torch.from_numpy(pixels.copy()) / 255 - mean) / std)[None]).logits[0]
        shares = logits.sigmoid()
        expected = [f"n{i}" for i in logits.argsort(descending=True) if shares[i] > 0.5]
        assert line["classes"] == expected
        above = shares[shares > 0.5].sort(descending=True).values.tolist()
        assert line["probabilities"] == pytest.approx(above, rel=1e-4)
    assert 1 < max(len(line["classes"]) for line in lines) < 6
    assert [row["classes"] for row in rows(Path(f"{out}.csv"))] == [
        ";".join(line["classes"]) for line in lines
    ]


BAD = [
    ({"inputs": "nowhere"}, r"there is no .*nowhere"),
    ({"inputs": "empty"}, r"empty has no pictures \(it has no files\)"),
    ({"model": "base"}, r"base is an encoder.*launcher.embed"),
    ({"model": "nothing"}, r"nothing is not there\."),
    ({"model": "begun"}, r"training of .*begun is not complete: wait for it, or launch it again"),
    ({"model": "half"}, r"half has no complete fine-tuning yet: wait for it"),
    ({"inputs": "t.csv"}, r"no column 'path' \(it has a, b\).*--path_column"),
    ({"inputs": "shards"}, r"has the splits train, val, test: name one \(--split"),
    ({"out": "labels.txt"}, r"ends in none of \.csv, \.jsonl, \.parquet"),
    ({"out": "there.csv"}, r"there\.csv is there: --overwrite"),
    ({"out": "/proc/x/labels.csv"}, r"/proc/x cannot be made"),
    ({"top": 0}, r"--top 0"),
    ({"batch": 0}, r"--batch 0"),
    ({"stdin": "paths"}, r"give - in place of"),
    ({"range": "auto"}, r"--range auto is for packing"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_mistakes_are_one_line(change: dict[str, Any], message: str, world: World) -> None:
    root = world.root
    (root / "empty").mkdir(exist_ok=True)
    (root / "t.csv").write_text("a,b\n1,2\n")
    (root / "there.csv").touch()
    for name in ("begun", "half"):  # a run that trains, before and after its first stage
        (root / name).mkdir(exist_ok=True)
        (root / name / ("log.txt" if name == "begun" else "config.toml")).touch()
    (root / "half" / "pretrain").mkdir(exist_ok=True)
    (root / "half" / "pretrain" / "result.json").write_text('{"seconds": 1}')
    if not (root / "half" / "pretrain" / "export").exists():
        (root / "half" / "pretrain" / "export").symlink_to(root / "base")
    given = {"model": "run", "inputs": "photos", "out": "bad.csv"} | change
    places = {name: str(root / given.pop(name)) for name in ("model", "inputs", "out")}
    with pytest.raises(UserError, match=message) as caught:
        predict(**places, **given)
    assert "\n" not in str(caught.value)
    assert not (root / "bad.csv").exists()


def test_a_read_only_folder(world: World, tmp_path: Path) -> None:
    """Permissions bind no root: for it the folder is mounted anew, in a namespace of its own."""
    tmp_path.chmod(0o500)
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    apart = ["unshare", "--mount", "sh", "-c", mount, tmp_path] if os.geteuid() == 0 else []
    words = ["launcher.predict", world.root / "run", world.root / "photos", tmp_path / "rows.csv"]
    done = subprocess.run(
        [*apart, sys.executable, "-m", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} may not be written to: name another\n"


def test_one_rank_says_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = Parts(tmp_path / "labels.csv", {}, 4 * BLOCK)
    parts.prepare(overwrite=False)
    parts.write(1, [])
    assert parts.left() == [0, 2, 3]
    asked: list[Any] = []
    # As rank 0 sees it, whatever another host's view of the folder is.
    monkeypatch.setattr(work, "together", lambda ranks, action: [0, 1, 2])
    monkeypatch.setattr(work, "ListedBatches", lambda *given: asked.extend(given[2]) or ())
    nothing: Any = None
    second = Ranks(1, 0, 2, torch.device("cpu"))
    work.through(nothing, nothing, parts, nothing, ranks=second, batch=BLOCK, workers=0)
    assert [places[0] for places in asked] == [BLOCK]


def test_parts_without_their_record_are_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = Parts(tmp_path / "labels.csv", {"inputs": "a"}, 2 * BLOCK)
    parts.prepare(overwrite=False)
    parts.write(0, [], np.zeros(1))
    assert parts.prepare(overwrite=False) == 1
    (parts.folder / "made-by.json").unlink()
    (parts.folder / "notes.txt").touch()  # none of ours
    assert Parts(parts.out, {"inputs": "b"}, 2 * BLOCK).prepare(overwrite=False) == 0
    assert sorted(p.name for p in parts.folder.iterdir()) == ["made-by.json", "notes.txt"]

    def killed(folder: Path, **options: Any) -> None:
        if folder.exists():
            raise KeyboardInterrupt

    parts.write(0, [])
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.remove()
    assert not parts.folder.exists()
    assert Parts(parts.out, {"inputs": "b"}, 2 * BLOCK).prepare(overwrite=False) == 0
    parts.remove()
    assert not list(tmp_path.iterdir())
