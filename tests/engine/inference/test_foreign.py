"""Models from elsewhere: logits and features are those of the library that saved them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.utils import filter_repo_objects
from timm.models import save_for_hf
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    RobertaForSequenceClassification,
    SiglipConfig,
    SiglipForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from selfdistill.data.errors import UserError
from selfdistill.data.formats.texts import Text
from selfdistill.engine.inference.model import load
from selfdistill.engine.models.texts import sentences
from tests.kit import texts as text_kit
from tests.kit.launches import make_base

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
NAMES = {0: "ant", 1: "bee", 2: "cat"}
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 16, 16), np.uint8))


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    told = {"id2label": NAMES, "label2id": {v: k for k, v in NAMES.items()}}
    if kind == "vit":
        model: PreTrainedModel = ViTForImageClassification(ViTConfig(**SIZES, **told))
    elif kind == "dinov2":
        model = Dinov2ForImageClassification(Dinov2Config(**SIZES, mlp_ratio=2, **told))
    else:
        model = SiglipForImageClassification(SiglipConfig(vision_config=SIZES, **told))
    with torch.no_grad():  # transformers leaves biases, and some tables, at zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize(("kind", "pool"), [("vit", "cls"), ("dinov2", "both"), ("siglip", "mean")])
def test_classifiers_of_transformers(kind: str, pool: str, tmp_path: Path) -> None:
    theirs = made(kind)
    theirs.save_pretrained(tmp_path)
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    told = {"image_mean": mean, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    ours = load(tmp_path)
    assert ours.classes == list(NAMES.values())
    assert ours.pool == pool
    scale = [torch.tensor(one).view(-1, 1, 1) for one in (mean, std)]
    with torch.no_grad():
        expected = theirs((PIXELS.float() / 255 - scale[0]) / scale[1]).logits
    torch.testing.assert_close(ours.forward({"images": PIXELS})["logits"], expected)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_classifiers_of_timm(pool: str, tmp_path: Path) -> None:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    more = {"global_pool": pool, "fc_norm": False, "num_classes": 3}
    theirs = timm.create_model("vit_base_patch16_224", **sizes, **more).eval()
    torch.nn.init.normal_(theirs.head.weight)
    config = {"label_names": list(NAMES.values())}
    save_for_hf(theirs, tmp_path, model_config=config, model_args=sizes | more)
    path = tmp_path / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"norm_eps": 1e-6, "model_args": sizes | more}))
    ours = load(tmp_path)
    assert ours.classes == list(NAMES.values())
    cfg = theirs.pretrained_cfg
    mean, std = (torch.tensor(cfg[name]).view(-1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = theirs((PIXELS.float() / 255 - mean) / std)
    torch.testing.assert_close(ours.forward({"images": PIXELS})["logits"], expected)


def test_classifiers_of_texts(tmp_path: Path) -> None:
    tokenizer = text_kit.make_tokenizer()
    config = text_kit.config_of("roberta", len(tokenizer))
    config.id2label, config.label2id = NAMES, {v: k for k, v in NAMES.items()}
    torch.manual_seed(0)
    theirs = RobertaForSequenceClassification(config).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = load(tmp_path)
    texts = [*text_kit.SENTENCES, "a pair"]
    pairs = [None] * 4 + ["of texts"]
    arrays = [ours.decode(Text(t, p), t) for t, p in zip(texts, pairs, strict=True)]
    logits = ours.forward(ours.codec.collate(arrays, texts))["logits"]
    for row, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
        with torch.no_grad():
            expected = theirs(**tokenizer(text, pair, return_tensors="pt")).logits[0]
        torch.testing.assert_close(logits[row], expected)
    assert ours.classes == list(NAMES.values())


@pytest.mark.parametrize("problem", [None, "regression", "multi_label_classification"])
@pytest.mark.parametrize("kind", ["vit", "timm", "roberta"])
def test_one_number_is_no_class(kind: str, problem: str | None, tmp_path: Path) -> None:
    """A reranker's or a regression's; of samples that may have several classes one is enough."""
    told = {"num_labels": 1, "problem_type": problem}
    if kind == "vit":
        ViTForImageClassification(ViTConfig(**SIZES, **told)).save_pretrained(tmp_path)
    elif kind == "timm":
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
        model = timm.create_model("vit_base_patch16_224", **sizes, num_classes=1)
        save_for_hf(model, tmp_path, model_config={"problem_type": problem}, model_args=sizes)
    else:
        tokenizer = text_kit.make_tokenizer()
        config = text_kit.config_of("roberta", len(tokenizer))
        config.num_labels, config.problem_type = 1, problem
        RobertaForSequenceClassification(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    if problem == "multi_label_classification":
        assert len(load(tmp_path).classes) == 1
        return
    with pytest.raises(UserError, match="gives a score") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_regression_of_several_numbers_is_no_classifier(tmp_path: Path) -> None:
    config = ViTConfig(**SIZES, num_labels=3, problem_type="regression")
    ViTForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="gives scores"):
        load(tmp_path)


def on_hub(folder: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> str:
    """The name of a folder that lies on a hub, of which a snapshot has what is asked for alone."""

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        files = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (cache / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, cache / name / file)
        return str(cache / name)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return "me/vit_model.v1"


@pytest.mark.parametrize("kind", ["vit", "siglip", "mean"])
def test_a_classifier_on_the_hub_is_what_its_folder_is(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "export"
    told: dict[str, object] = {"image": {"fit": "pad", "range": [0, 4095]}}
    if kind == "mean":
        told = {"bucket": 16}
        text_kit.make_language(folder)
        config = json.loads((folder / "config.json").read_text()) | {"id2label": NAMES}
        (folder / "config.json").write_text(json.dumps(config))
        head = {"weight": torch.randn(3, config["hidden_size"]), "bias": torch.randn(3)}
        sentences.write(folder, sentences.Sentences(), config["hidden_size"], head)
    else:
        made(kind).save_pretrained(folder)
    (folder / "selfdistill.json").write_text(json.dumps(told))
    monkeypatch.chdir(tmp_path)
    ours, theirs = load(folder), load(on_hub(folder, monkeypatch, tmp_path / "cache"))
    assert theirs.classes == ours.classes == list(NAMES.values())
    assert theirs.sha256 == ours.sha256
    assert (theirs.kind, theirs.pool) == (ours.kind, ours.pool)
    if kind != "mean":
        assert (theirs.codec.how, theirs.codec.span) == ("pad", (0, 4095))
    assert [note.replace(theirs.origin, ours.origin) for note in theirs.notes] == [*ours.notes]


def stage(folder: Path, **result: object) -> Path:
    """A stage as a launch leaves it; without a result it is not complete."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").touch()
    if result:
        told = {"seconds": 1.0, "metric": "accuracy"} | result
        (folder / "result.json").write_text(json.dumps(told))
    return folder


def test_which_model_a_run_means(tmp_path: Path) -> None:
    run = stage(tmp_path / "run")
    with pytest.raises(UserError, match=r"training of .*run is not complete: wait for it"):
        load(run)
    make_base(stage(run / "pretrain", seconds=1) / "export")
    assert load(run).notes[0].endswith("pretrain, an encoder: the run has no complete fine-tuning")
    made("vit").save_pretrained(stage(run / "finetune-model", seconds=1) / "export")
    assert "finetune-model; there is also pretrain" in load(run).notes[0]
    for seed, score in ((3, 0.5), (4, 0.75), (5, 0.75)):
        made("vit").save_pretrained(
            stage(run / f"finetune/seed-{seed}", metrics={"val_accuracy": score}) / "export"
        )
    with pytest.raises(UserError, match="finetune is not complete"):
        load(run / "finetune")
    with pytest.raises(UserError, match=r"finetune is not complete: .*or name another stage"):
        load(run)
    with pytest.raises(UserError, match=r"runn is not there\. Did you mean run\?"):
        load(tmp_path / "runn")
    stage(run / "finetune", n=3)
    found = load(run)
    assert (
        "finetune/seed-4, of 3 seeds the one with the best val_accuracy (75.00%)"
        in (found.notes[0])
    )
    assert load(run / "finetune").sha256 == load(run / "finetune/seed-4/export").sha256
    assert found.precision == "fp32"
    stage(run / "finetune/seed-3", metrics={})
    assert "finetune/seed-3, the first of 3: not all have a val_accuracy" in load(run).notes[0]
