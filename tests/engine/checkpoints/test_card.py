"""Model cards: the hub reads them, and the code in them runs; what a result says of its origin."""

import contextlib
import io
import json
import platform
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints import card, provenance
from selfdistill.engine.checkpoints.folder import open_run
from selfdistill.engine.config import options as configuration
from selfdistill.engine.inference.model import load
from selfdistill.engine.run import run_stages
from selfdistill.engine.runtime.distributed import Ranks
from tests.kit import texts as text_kit
from tests.kit.launches import COMMON, ROOT, make_world

#: Exports by their place in the runs' folder -> the hub's word for what they do.
EXPORTS = {
    "images/pretrain": "image-feature-extraction",
    "images/distill-1": "image-feature-extraction",
    "images/finetune": "image-classification",
    "mean/finetune-model": "image-classification",
    "texts/pretrain": "fill-mask",
    "texts/finetune": "text-classification",
}


def launched(ranks: Ranks, **options: Any) -> None:
    run = open_run(configuration.load(COMMON | options), ranks)
    try:
        run_stages(run)
    finally:
        run.close()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    root = make_world(tmp_path_factory.mktemp("cards"))
    told = "---\nlicense: mit\nbase_model: facebook/vit-mae-base\n---\n# A base\n"
    (root / "base" / "README.md").write_text(told)
    text_kit.make_texts(root / "texts")
    text_kit.make_language(root / "roberta", kind="roberta")
    pictures = {"data": str(root / "shards"), "model": str(root / "base")}
    launched(ranks, stage="all", output=str(root / "images"), **pictures)
    launched(
        ranks, stage="finetune", output=str(root / "mean"), **pictures,
        **{"finetune.start": "model", "finetune.pool": "mean", "finetune.epochs": 2,
           "finetune.steps": None},
    )  # fmt: skip
    words = {"data": str(root / "texts"), "model": str(root / "roberta")}
    launched(ranks, stage="all", output=str(root / "texts-run"), **words)
    (root / "texts-run").rename(root / "run")
    return root


def place(root: Path, name: str) -> Path:
    return root / name.replace("texts/", "run/")


def result(root: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((place(root, name) / "result.json").read_text())
    return content


@pytest.mark.parametrize("name", EXPORTS)
def test_the_hub_reads_it(root: Path, name: str) -> None:
    folder = place(root, name) / "export"
    told, made = ModelCard.load(folder / "README.md").data, result(root, name)
    pictures = not name.startswith("texts")
    assert told.pipeline_tag == EXPORTS[name]
    assert told.library_name == "transformers"
    assert told.license == ("mit" if pictures else "unknown")
    assert told.base_model == ("facebook/vit-mae-base" if pictures else None)
    assert told.datasets == ["shards" if pictures else "texts"]
    scores = {s.metric_name: s.metric_value for s in told.eval_results or []}
    if "finetune" in name:
        for split in ("val", "test"):
            for metric in ("accuracy", "macro_f1"):
                wanted = made["metrics"][f"{split}_{metric}"]
                assert scores[f"{split} {metric}"] == pytest.approx(wanted, abs=1e-6)
    else:
        assert not scores
    page = (folder / "README.md").read_text()
    assert made["model"]["sha256"] in page
    assert made["manifest"] in page
    assert str(root) not in page  # places on this disk are nobody's business
    assert card.read_card(folder)["pipeline_tag"] == EXPORTS[name]


@pytest.mark.parametrize("name", EXPORTS)
def test_its_code_runs(
    root: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place(root, name) / "export", tmp_path / "copy")
    photo = Image.effect_noise((40, 25), 90).convert("RGB")
    photo.save(tmp_path / "copy" / "photo.jpg")
    monkeypatch.chdir(tmp_path / "copy")
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    pictures = not name.startswith("texts")
    assert len(blocks) == (2 if pictures else 1)
    for block in blocks:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(block, {})
        if "finetune" not in name:
            assert out.getvalue().strip().startswith("torch.Size([1, ")
            continue
        found = eval(out.getvalue())  # printed by the code above
        found = found if isinstance(found, dict) else {r["label"]: r["score"] for r in found}
        model = load(".")
        assert found.keys() <= set(model.classes)
        if pictures:  # the pipelines' torchvision resizes nearly as Pillow
            array = model.decode(Path("photo.jpg").read_bytes(), "photo.jpg")
            batch = model.codec.collate([array], ["photo.jpg"])
            ours = torch.softmax(model.forward(batch)["logits"][0], 0).tolist()
            for label, score in found.items():
                assert score == pytest.approx(ours[model.classes.index(label)], abs=0.02)


def test_it_says_how_it_was_made(root: Path) -> None:
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in (root / "images/finetune/export/README.md").read_text().splitlines()
        if re.match(r"\| (pretrain|distill-1|finetune) ", line)
    ]
    # 5 steps of batch 8 over 27 samples are 1.48 epochs.
    assert [row[:4] for row in rows] == [
        [stage, "5", "1.48", "8"] for stage in ("pretrain", "distill-1", "finetune")
    ]
    assert rows[2][4:] == ["0.0001", "0.01", "0"]
    page = (root / "mean/finetune-model/export/README.md").read_text()
    assert "| finetune-model | 7 | 2.07 |" in page  # 2 epochs asked for
    assert "then cut to the centre" in page
    assert "Classes: blue, green, red." in page


def test_a_result_says_where_it_comes_from(root: Path, ranks: Ranks, capsys: Any) -> None:
    made = result(root, "images/finetune")
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert made["git"]["commit"] == commit
    assert isinstance(made["git"]["dirty"], bool)
    assert made["host"] == socket.gethostname()
    assert made["python"] == platform.python_version()
    assert re.fullmatch("[0-9a-f]{64}", made["packages"])
    assert made["command"]
    assert made["driver"] is None or re.fullmatch(r"[\d.]+", made["driver"])
    assert {"torch", "deepspeed", "transformers", "timm"} <= made["versions"].keys()
    # From another commit, machine and command it goes on all the same.
    path = root / "images" / "pretrain" / "result.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"git": None, "host": "x", "command": "y", "packages": ""}))
    launched(
        ranks, stage="pretrain", output=str(root / "images"), data=str(root / "shards"),
        model=str(root / "base"),
    )  # fmt: skip
    assert "pretrain: complete, skipped" in capsys.readouterr().out


def test_a_clone_is_told_from_another_project(tmp_path: Path) -> None:
    ask = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*ask, *words], check=True)
    (tmp_path / "site").mkdir()
    assert provenance.git(tmp_path / "site") is None  # installed in somebody's clone
    found = provenance.git(tmp_path)
    assert found is not None
    assert found["dirty"] is False
    (tmp_path / "file").write_text("x")
    subprocess.run([*ask, "add", "file"], check=True)
    changed = provenance.git(tmp_path)
    assert changed is not None
    assert changed["dirty"] is True


def test_bases_and_names_of_any_kind(root: Path, tmp_path: Path) -> None:
    assert card.base_of(None) == card.Base("a fresh model", None, None)
    hub = card.base_of("facebook/no-such-model-here")
    assert hub == card.Base("facebook/no-such-model-here", "facebook/no-such-model-here", None)
    assert card.base_of("timm:vit_x").hub == "timm/vit_x"
    (tmp_path / "odd|base\n#").mkdir()
    (tmp_path / "odd|base\n#" / "README.md").write_text("---\nlicense: [a\n---\n")
    assert card.base_of(str(tmp_path / "odd|base\n#")).name == "odd|base #"
    folder = tmp_path / "export"
    shutil.copytree(root / "images" / "finetune" / "export", folder)
    made = result(root, "images/finetune") | {
        "model": {"path": str(tmp_path / "odd|base\n#")},
        "metrics": {"test_accuracy": 0.5, "test_samples": 9, "train_accuracy": 1.0},
        "intervals": {"test_accuracy": [0.25, 0.75]},
        "steps": 3,
        "stopped": 3,
        "kept": {"step": 2},
    }
    train = Manifest.load(str(root / "shards" / "train"))
    train.classes = ["a|b", "`c`", "d\n# e"]
    page = card.text(folder, made, train)
    assert r"- Base: odd\|base #" in page
    assert "name: 'odd|base #" in page or "name: odd|base #" in page
    assert "| test | accuracy | 0.5000 | 0.2500 to 0.7500 |" in page
    assert "| finetune | 3 of 5, stopped early, weights of step 2 | 0.889 | 8 |" in page
    assert r"Classes: a\|b, \`c\`, d # e." in page
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"has no README.md, the card"):
        card.read_card(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    with pytest.raises(UserError, match="say no library_name: add it"):
        card.read_card(folder)
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(UserError, match="the hub could not read its first lines"):
        card.read_card(folder)
