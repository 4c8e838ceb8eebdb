"""launcher.embed: features are transformers', whatever file they go to; neighbours, projector."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, RobertaModel, ViTMAEModel

from selfdistill.data.errors import UserError
from selfdistill.launcher.embed import embed
from tests.kit import texts as text_kit
from tests.kit.launches import make_base, make_images

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("world")
    make_images(root / "images")
    make_base(root / "base")
    text_kit.make_language(root / "language")
    (root / "images/test/red/broken.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    return root


def expected(world: Path) -> torch.Tensor:
    """Every token's vector by transformers, of the pictures in images/test: [15, 17, 24]."""
    model = ViTMAEModel.from_pretrained(world / "base", mask_ratio=0.0).eval()
    paths = sorted(p for p in (world / "images/test").rglob("*.png") if p.name != "broken.png")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p))) for p in paths]).float()
    images = ((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    noise = torch.arange(16.0).expand(len(images), -1)  # nothing is masked, nor moved
    with torch.no_grad():
        return model(images, noise=noise).last_hidden_state


def ids(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("feature", ["own", "cls", "mean", "tokens"])
def test_features_of_pictures(world: Path, tmp_path: Path, feature: Any) -> None:
    tokens = expected(world)
    wanted = {"own": tokens[:, 0], "cls": tokens[:, 0], "tokens": tokens}
    wanted["mean"] = tokens[:, 1:].mean(1)
    out, table = tmp_path / "f.npy", tmp_path / "f.parquet"
    done = embed(str(world / "base"), str(world / "images/test"), str(out), feature=feature)
    embed(str(world / "base"), str(world / "images/test"), str(table), feature=feature)
    found = np.load(out)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted[feature].numpy(), atol=2e-6)
    listed = ids(tmp_path / "f.npy.ids.csv")
    assert [row["row"] for row in listed] == [str(i) for i in range(15)]
    assert done.unreadable == 1
    rows = pq.read_table(table).to_pylist()
    assert [r["path"] for r in rows if r["error"]] == [str(world / "images/test/red/broken.png")]
    good = [row for row in rows if not row["error"]]
    assert [row["path"] for row in good] == [row["path"] for row in listed]
    np.testing.assert_array_equal(np.array([r["embedding"] for r in good], np.float32), found)
    assert [row["embedding"] for row in rows if row["error"]] == [None]


def test_another_size(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    theirs = Dinov2Model(Dinov2Config(**sizes, image_size=24, patch_size=4)).eval()
    theirs.save_pretrained(tmp_path / "dino")
    picture = sorted((world / "images/test/green").glob("*.png"))[0]
    side = Image.open(picture).size[0]
    assert side == 16
    words = (str(tmp_path / "dino"), str(picture))
    embed(*words, str(tmp_path / "f.npy"), size=side)
    assert "(--size takes another)" in capsys.readouterr().out
    pixels = torch.from_numpy(np.array(Image.open(picture))).float() / 255
    with torch.no_grad():
        wanted = theirs(((pixels - MEAN) / STD).permute(2, 0, 1)[None]).last_hidden_state[:, 0]
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), wanted.numpy(), atol=1e-5)
    with pytest.raises(UserError, match=r"image size 15 is not a multiple of patch size 4"):
        embed(*words, str(tmp_path / "g.npy"), size=15)
    with pytest.raises(UserError, match=r"--size 32 is of pictures, and .*language takes texts"):
        embed(str(world / "language"), str(picture), str(tmp_path / "g.npy"), size=32)


@pytest.mark.parametrize("feature", ["cls", "mean", "tokens"])
def test_features_of_texts(world: Path, tmp_path: Path, feature: Any) -> None:
    lines = ["the cell divides", "a robust parser for free word order", "we are happy"]
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps({"id": f"t{i}", "text": text}) + "\n" for i, text in enumerate(lines))
        + "no json\n"
    )
    out, table = tmp_path / "f.npy", tmp_path / "f.parquet"
    for place in (out, table):
        embed(str(world / "language"), str(tmp_path / "t.jsonl"), str(place), feature=feature)
    tokenizer = AutoTokenizer.from_pretrained(world / "language")
    model = RobertaModel.from_pretrained(world / "language", add_pooling_layer=False).eval()
    wanted = []
    for line in lines:
        with torch.no_grad():
            hidden = model(**tokenizer(line, return_tensors="pt")).last_hidden_state[0].numpy()
        whole = {"cls": hidden[:1], "mean": hidden.mean(0, keepdims=True), "tokens": hidden}
        wanted.append(whole[feature])
    found = np.load(out)
    np.testing.assert_allclose(found, np.concatenate(wanted), atol=2e-6)
    listed = ids(tmp_path / "f.npy.ids.csv")
    assert [row["id"] for row in listed] == ["t0", "t1", "t2"]
    starts = np.cumsum([0, *(len(one) for one in wanted)])[:-1].tolist()
    assert [int(row["row"]) for row in listed] == starts
    if feature == "tokens":
        assert [int(row["tokens"]) for row in listed] == [len(one) for one in wanted]
    rows = pq.read_table(table).to_pylist()
    assert "no valid JSON" in rows[3]["error"]
    for row, one in zip(rows, wanted, strict=False):
        vectors = np.array(row["embedding"], np.float32).reshape(-1, 24)
        np.testing.assert_allclose(vectors, one, atol=2e-6)


def test_neighbours_and_the_projector(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.npy"
    words = str(world / "base"), str(world / "images/test"), str(out)
    embed(*words, nearest=3, projector=str(tmp_path / "points"))
    vectors = np.load(out)
    names = [row["path"] for row in ids(tmp_path / "f.npy.ids.csv")]
    near = ids(tmp_path / "f.npy.nearest.csv")
    cosine = cosine_similarity(vectors)
    np.fill_diagonal(cosine, -2)
    for number, name in enumerate(names):
        order = np.argsort(-cosine[number], kind="stable")[:3]
        mine = [row for row in near if row["name"] == name]
        assert [row["neighbour"] for row in mine] == [names[i] for i in order]
        assert [float(r["cosine"]) for r in mine] == pytest.approx(cosine[number][order], abs=2e-6)
    (folder,) = (tmp_path / "points").rglob("tensors.tsv")
    kept = np.loadtxt(folder, delimiter="\t")
    np.testing.assert_allclose(kept, vectors, atol=1e-5)
    assert folder.with_name("metadata.tsv").read_text().splitlines() == names
    assert Image.open(folder.with_name("sprite.png")).size == (4 * 48, 4 * 48)
    with pytest.raises(UserError, match=r"is there: --overwrite"):
        embed(*words)
    embed(*words, overwrite=True, feature="mean")
    assert not np.array_equal(np.load(out), vectors)
    assert not (tmp_path / "f.npy.nearest.csv").exists()  # of other features


def test_mistakes_are_one_line(world: Path, tmp_path: Path) -> None:
    base, images = str(world / "base"), str(world / "images")
    for options, message in (
        ({"feature": "tokens", "nearest": 2}, "no one vector"),
        ({"nearest": -1}, "--nearest -1"),
        ({"out": str(tmp_path / "f.csv")}, r"ends in none of \.npy, \.parquet"),
        ({"projector": images}, "holds files already"),
        ({"projector": str(world / "base" / "config.json")}, "is a file: name a folder"),
        ({"inputs": str(world / "language")}, "has no pictures"),
        ({"model": str(world / "images")}, "holds no model"),
    ):
        given = {"model": base, "inputs": images, "out": str(tmp_path / "f.npy")} | options
        with pytest.raises(UserError, match=message):
            embed(**given)
