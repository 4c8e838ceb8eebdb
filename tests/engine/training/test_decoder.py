"""Stage 0 on two real ranks: the decoder alone is trained, kept, and found again."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, RobertaForMaskedLM, ViTMAEForPreTraining

from tests.engine.training.test_parity_text import batches, kind_of
from tests.kit import texts as text_kit
from tests.kit.launches import make_world, metrics, run_cases
from tests.kit.plain_loop import RATE, STEPS, ZERO3, adamw, is_bias_or_1d, largest_difference

pytestmark = pytest.mark.multi

#: A decoder of another shape than the configuration of the encoder says.
THIN = {"decoder.width": 96, "decoder.depth": 2}
ZEROS = ("zero0", "zero1", "zero2", "zero3")


def without_decoder(whole: Path, folder: Path) -> Path:
    """A ViT-MAE's folder with its encoder alone."""
    shutil.copytree(whole, folder)
    tensors = load_file(whole / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if not k.startswith("decoder.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("decoder")
    before = os.environ.get("SELFDISTILL_DECODERS")
    os.environ["SELFDISTILL_DECODERS"] = str(root / "shelf")
    yield root
    del os.environ["SELFDISTILL_DECODERS"]
    if before is not None:
        os.environ["SELFDISTILL_DECODERS"] = before


@pytest.fixture(scope="module")
def said(root: Path) -> str:
    text_kit.make_texts(root / "shards")
    for seed, name in enumerate(("base", "other")):
        whole = text_kit.make_language(root / f"whole-{name}", seed=seed)
        AutoModel.from_pretrained(whole, add_pooling_layer=False).save_pretrained(root / name)
        text_kit.make_tokenizer().save_pretrained(root / name)
    make_world(root / "images")
    encoder = without_decoder(root / "images" / "base", root / "images" / "encoder")
    (root / "zero3.json").write_text(ZERO3)
    common = {"data": str(root / "shards"), "model": str(root / "base"), "text.bucket": 8}
    common |= {"text.split": False, "decoder.steps": STEPS, "decoder.batch": 8, "decoder.lr": RATE}
    images = common | {"data": str(root / "images" / "shards"), "model": str(encoder)}
    del images["text.bucket"], images["text.split"]
    runs = root / "runs"
    cases: list[dict[str, Any]] = []
    for zero in ZEROS:
        setting = {"zero": zero if zero != "zero3" else str(root / "zero3.json")}
        # The layout is no part of what a decoder is known by: so that none finds another's.
        own = {"stage": "decoder", "output": str(runs / zero)}
        cases.append(common | setting | own | {"decoder.eps": (1.1 + len(cases)) * 1e-8})
    cases += [
        common | {"stage": "all", "output": str(runs / "all")},
        images | {"stage": "all", "output": str(runs / "images")},
        images | {"stage": "all", "output": str(runs / "again")},
        images | {"stage": "pretrain", "output": str(runs / "none"), "save_every": 1},
        images | {"stage": "all", "output": str(runs / "none"), "save_every": 1},
        images
        | {"stage": "all", "output": str(runs / "off"), "decoder.auto": False}
        | {"save_every": 1, "keep_finished": False, "finetune.metric": "macro_f1"},
        images
        | {"stage": "decoder", "output": str(runs / "whole")}
        | {"model": str(root / "images" / "base"), "decoder.width": 64},
        images | {"stage": "all", "output": str(runs / "thin")} | THIN,
        images
        | {"stage": "all", "output": str(runs / "thin"), "decoder.depth": 3, "decoder.width": 96}
        | {"expect_error": "made with decoder.depth = 2, now it is 3"},
        # The decoder of the run has its shape: what is asked of another one is of no use.
        images | {"stage": "pretrain", "output": str(runs / "images"), "decoder.width": 64},
        # What was refused before its first step has not begun without.
        images
        | {"stage": "pretrain", "output": str(runs / "refused"), "pretrain.warmup": 5}
        | {"expect_error": "the stage has 5 steps"},
        images | {"stage": "decoder", "output": str(runs / "refused"), "resume": "never"},
        images | {"stage": "all", "output": str(runs / "thin-off"), "decoder.auto": False} | THIN,
        common
        | {"stage": "pretrain", "output": str(runs / "zero0"), "model": str(root / "other")}
        | {"expect_error": "is the decoder of another encoder"},
    ]
    return run_cases(root, cases)


def test_it_equals_a_plain_loop(root: Path, said: str) -> None:
    """transformers' model, its encoder frozen; the fresh head is random: the oracle takes ours."""
    kind = kind_of(root)
    ours = kind.autoencoder(kind.load(str(root / "base")), 0.0)
    model = RobertaForMaskedLM.from_pretrained(root / "base").train()
    model.load_state_dict(ours.network.state_dict())
    model.roberta.requires_grad_(False)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer: Any = adamw(model, is_bias_or_1d, RATE, (0.9, 0.95))
    for step, batch in enumerate(batches(root, kind, masked=True)):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (STEPS - step) / STEPS
        labels = torch.full_like(batch["input_ids"], -100).flatten()
        labels[batch["masked_at"]] = batch["originals"]
        labels = labels.view_as(batch["input_ids"])
        mask = batch["attention_mask"]
        loss = model(batch["masked_ids"], attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert largest_difference(start, model.state_dict()) > 1e-3  # it did train
    for zero in ZEROS:
        found = RobertaForMaskedLM.from_pretrained(root / "runs" / zero / "decoder" / "export")
        assert largest_difference(found.state_dict(), model.state_dict()) < 1e-5, zero


def test_the_encoder_stays_bit_for_bit(root: Path, said: str) -> None:
    base = AutoModel.from_pretrained(root / "base", add_pooling_layer=False).state_dict()
    for run in (*ZEROS, "all"):
        export = root / "runs" / run / "decoder" / "export"
        found = RobertaForMaskedLM.from_pretrained(export).roberta.state_dict()
        assert all(torch.equal(found[name], base[name]) for name in base), run
    before = load_file(root / "images" / "encoder" / "model.safetensors")
    after = load_file(root / "runs" / "images" / "decoder" / "export" / "model.safetensors")
    queries = "encoder.layer.0.attention.attention.query.weight"
    old = {k: v for k, v in before.items() if k.endswith(("query.weight", "q_proj.weight"))}
    assert torch.equal(after[f"vit.{queries}"], next(iter(old.values())))


def test_stage_1_starts_from_it(root: Path, said: str) -> None:
    """Its first loss is that of the trained decoder, and not that of a random one."""
    for run, loss in (("all", "loss/mlm"), ("images", "loss/mae")):
        alone = metrics(root / "runs" / run / "decoder")
        first = metrics(root / "runs" / run / "pretrain")[0]
        assert first[loss] < alone[0][loss]
    random = metrics(root / "runs" / "none" / "pretrain")[0]["loss/mae"]
    assert metrics(root / "runs" / "images" / "pretrain")[0]["loss/mae"] < random
    assert metrics(root / "runs" / "off" / "pretrain")[0]["loss/mae"] == random
    assert said.count("has no decoder: a new, random one takes its place") == 5
    assert not (root / "runs" / "off" / "decoder").exists()
    # One that began without goes on without.
    assert not (root / "runs" / "none" / "decoder").exists()
    assert (root / "runs" / "none" / "finetune" / "result.json").exists()
    for run in ("all", "images", "none"):
        result = json.loads((root / "runs" / run / "pretrain" / "result.json").read_text())
        assert len(result["model"]["sha256"]) == 64
    assert (root / "runs" / "images" / "finetune" / "result.json").exists()


def test_figures_are_put_into_proportion(root: Path, said: str) -> None:
    assert "finetune: test: macro F1 " in said
    assert "the commonest class alone gives 33.33% accuracy; 9 samples" in said
    assert "warning: test has 9 samples: one of them is 11.1 points" in said
    told = {
        run: json.loads((root / "runs" / run / "finetune" / "result.json").read_text())["metric"]
        for run in ("images", "off")
    }
    assert told == {"images": "accuracy", "off": "macro_f1"}
    assert "finetune: test_macro_f1 " in said


def test_checkpoints_of_what_is_complete_may_go(root: Path, said: str) -> None:
    assert (root / "runs" / "none" / "pretrain" / "checkpoints").is_dir()
    assert (root / "runs" / "off" / "finetune" / "result.json").exists()
    assert not list((root / "runs" / "off").rglob("checkpoints"))


def test_a_model_with_a_decoder_needs_none(root: Path, said: str) -> None:
    assert said.count(f"decoder: {root / 'images' / 'base'} has one: nothing to do") == 1
    assert not (root / "runs" / "whole" / "decoder").exists()


def test_it_has_the_shape_that_is_asked_for(root: Path, said: str) -> None:
    """Whichever stage makes it; transformers' own class loads it, and goes by its settings."""
    for run, stages in {
        "thin": ("decoder", "pretrain", "distill-1"),
        "thin-off": ("pretrain", "distill-1"),
    }.items():
        for stage in stages:
            export = root / "runs" / run / stage / "export"
            model, told = ViTMAEForPreTraining.from_pretrained(export, output_loading_info=True)
            assert not told["missing_keys"] | told["unexpected_keys"] | told["mismatched_keys"]
            config = model.config
            assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (96, 2)
            heads = config.decoder_num_attention_heads
            assert (heads, config.decoder_intermediate_size) == (3, 384)
    for there in (root / "images" / "base", root / "runs" / "images" / "decoder" / "export"):
        assert f"of no use: --decoder.width: {there} has a decoder already, 16 x 1" in said


def test_it_is_found_again(root: Path, said: str) -> None:
    """By encoder, data and settings: another run takes it, and what comes of it is the same."""
    assert said.count("decoder: found again") == 2
    assert (root / "runs" / "refused" / "decoder" / "result.json").exists()
    assert (
        len(list((root / "shelf").iterdir())) == len(ZEROS) + 3
    )  # one more of texts, two of images
    for stage in ("decoder", "pretrain", "distill-1"):
        first, second = (
            load_file(root / "runs" / run / stage / "export" / "model.safetensors")
            for run in ("images", "again")
        )
        assert all(torch.equal(first[name], second[name]) for name in first), stage
    assert not (root / "runs" / "again" / "decoder" / "checkpoints").exists()
