"""Stages 1 and 2 that train a part of the encoder, against plain PyTorch loops on equal batches."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import RobertaForMaskedLM, ViTMAEForPreTraining

from selfdistill.data.loading.loader import Loader
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models import adapters
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.stages.shared import Shared, updates_of
from selfdistill.engine.training.modalities.image import ImageModality
from selfdistill.engine.training.modalities.text import TextModality
from selfdistill.engine.training.objectives import FeatureExtractor
from selfdistill.engine.training.views import MaskNoise
from tests.engine.training.test_parity_training import batches
from tests.kit import texts as text_kit
from tests.kit.launches import make_world, metrics, run_cases
from tests.kit.plain_loop import (
    BATCH,
    RATE,
    STEPS,
    ZERO3,
    adamw,
    is_bias_or_1d,
    largest_difference,
)

pytestmark = pytest.mark.multi

ZEROS = ("zero0", "zero1", "zero2", "zero3")
LORA = {"adapt": "lora", "lora.rank": 4, "lora.alpha": 8}
ADAPTS: dict[str, dict[str, Any]] = {"attention": {"adapt": "attention"}, "lora": LORA}
#: Our layers -> those of transformers, of which a joint projection is three.
THEIRS = {
    "attn.qkv": [f"attention.{part}_proj" for part in "qkv"],
    "attn.proj": ["attention.o_proj"],
    "mlp.fc1": ["mlp.fc1"],
    "mlp.fc2": ["mlp.fc2"],
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("adapted"))
    text_kit.make_texts(root / "texts" / "shards")
    text_kit.make_language(root / "texts" / "base")
    (root / "zero3.json").write_text(ZERO3)
    return root


@pytest.fixture(scope="module")
def said(root: Path) -> str:
    """Both ways under every ZeRO stage on two ranks; resumed, refused; texts."""
    runs, cases = root / "runs", []
    images = {"data": str(root / "shards"), "model": str(root / "base"), "distill.weight": 0.5}
    images |= {f"{stage}.lr": RATE for stage in ("pretrain", "distill")}
    texts = {"data": str(root / "texts" / "shards"), "model": str(root / "texts" / "base")}
    texts |= {"text.bucket": 8, "stage": "all", "teacher.mode": "replicated"}
    for adapt, options in ADAPTS.items():
        common = images | options | {"teacher": str(runs / f"{adapt}-zero0" / "pretrain/export")}
        for number, zero in enumerate(ZEROS):
            setting = zero if zero != "zero3" else str(root / "zero3.json")
            own = {"zero": setting, "output": str(runs / f"{adapt}-{zero}")}
            own |= {"pretrain.accumulation": 1 + number % 2, "teacher.mode": "replicated"}
            first = common | own | {"stage": "pretrain"}
            cases += [first, first | {"stage": "distill"}]
            if zero in ("zero2", "zero3"):  # stage 1 once more, in two launches
                again = first | {"output": f"{own['output']}-again"}
                other = f"made with adapt = {adapt}, now it is full"
                cases += [again | {"leave_at": "step 4"}]
                cases += [again | {"adapt": "full", "expect_error": other}, again]
        cases.append(texts | options | {"output": str(runs / f"texts-{adapt}")})
    done = images | {"stage": "pretrain", "output": str(runs / "lora-zero0"), "zero": "zero0"}
    cases += [
        done | LORA | {"lora.rank": 8, "expect_error": "made with lora.rank = 4, now it is 8"},
        done | {"expect_error": "made with adapt = lora, now it is full"},
        images
        | {"stage": "all", "output": str(runs / "no"), "adapt": "attention"}
        | {"distill.match": "weights_l2", "expect_error": "compares all weights, and --adapt att"},
    ]
    return run_cases(root, cases)


class Oracle(nn.Module):
    """transformers' model with a part of its encoder trained; updates are added by hand."""

    def __init__(self, root: Path, adapt: str) -> None:
        super().__init__()
        self.model = ViTMAEForPreTraining.from_pretrained(root / "base").train()
        # MAE's position embeddings are fixed; in transformers 5, loading weights sets them free.
        self.model.decoder.decoder_pos_embed.requires_grad_(False)
        self.model.vit.requires_grad_(False)
        self.factors = nn.ParameterList()
        self.layers: list[list[str]] = []
        if adapt == "attention":
            for name, parameter in self.model.vit.named_parameters():
                parameter.requires_grad_("_proj." in name)
            return
        # A is random: the oracle takes ours, everything after it is its own.
        run = run_of(root)
        kind = ImageModality(run)
        encoder = kind.autoencoder(kind.load(str(root / "base"))).encoder
        adapters.adapt(encoder, run.config)
        for name, value in encoder.named_parameters():
            if value.requires_grad:
                self.factors.append(value.detach().clone())
            if "lora_A" in name:
                _, number, layer = name.split(".lora_A")[0].split(".", 2)
                self.layers.append([f"vit.layers.{number}.{part}.weight" for part in THEIRS[layer]])

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, those of adapted layers with their update."""
        found = dict(self.model.named_parameters())
        for number, names in enumerate(self.layers):
            a, b = self.factors[2 * number], self.factors[2 * number + 1]
            for name, rows in zip(names, b.chunk(len(names)), strict=True):
                found[name] = found[name] + 8 / 4 * rows @ a
        return found

    def vit(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """CLS vectors of the whole view."""
        own = {n.removeprefix("vit."): v for n, v in self.weights().items() if n[:4] == "vit."}
        found: Tensor = functional_call(
            self.model.vit, own, (pixels,), {"noise": noise}
        ).last_hidden_state[:, 0]
        return found


def oracle(root: Path, adapt: str, *, teacher: Path | None) -> dict[str, Tensor]:
    ours = Oracle(root, adapt)
    model, frozen = ours.model, None
    if teacher is not None:
        frozen = ViTMAEForPreTraining.from_pretrained(teacher).vit.eval()
        frozen.config.mask_ratio = 0.0
    optimizer: Any = adamw(ours, is_bias_or_1d, RATE, (0.9, 0.95))
    patches = (model.config.image_size // model.config.patch_size) ** 2
    noise = torch.arange(patches).float().expand(BATCH, -1)  # keeps every patch where it is
    for step, batch in enumerate(batches(root, MaskNoise(0, patches))):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (STEPS - step) / STEPS
        given = {"noise": batch["noise"]}
        loss = functional_call(model, ours.weights(), (batch["pixels"],), given).loss
        if frozen is not None:
            model.vit.config.mask_ratio = model.vit.embeddings.config.mask_ratio = 0.0
            student = ours.vit(batch["pixels"], noise)
            with torch.no_grad():
                target = frozen(batch["pixels"], noise=noise).last_hidden_state[:, 0]
            model.vit.config.mask_ratio = model.vit.embeddings.config.mask_ratio = 0.75
            loss = loss + 0.5 * (student - target).pow(2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {n: v.detach() for n, v in ours.weights().items()}


def exported(root: Path, run: str, stage: str) -> dict[str, Tensor]:
    model = ViTMAEForPreTraining.from_pretrained(root / "runs" / run / stage / "export")
    return dict(model.named_parameters())


@pytest.mark.parametrize("adapt", ADAPTS)
def test_they_equal_the_plain_loop(root: Path, said: str, adapt: str) -> None:
    base = ViTMAEForPreTraining.from_pretrained(root / "base")
    start = dict(base.named_parameters())
    teacher = root / "runs" / f"{adapt}-zero0" / "pretrain" / "export"
    oracles = {
        "pretrain": oracle(root, adapt, teacher=None),
        "distill-1": oracle(root, adapt, teacher=teacher),
    }
    attention = {n for n in start if n.startswith("vit.") and "_proj.weight" in n}
    for stage, expected in oracles.items():
        one, two = ({n: w[n] for n in attention} for w in (start, expected))
        assert largest_difference(one, two) > 1e-3  # it did train
        for zero in ZEROS:
            ours = exported(root, f"{adapt}-{zero}", stage)
            assert largest_difference(ours, expected) < 1e-5, (stage, zero)


def untrained(adapt: str, names: Iterator[str]) -> set[str]:
    """Names of the encoder's tensors that stay as they were."""
    trained = {"attention": ("_proj.",), "lora": ("_proj.weight", "fc1.weight", "fc2.weight")}
    return {n for n in names if n.startswith("vit.") and not any(t in n for t in trained[adapt])}


@pytest.mark.parametrize("adapt", ADAPTS)
def test_the_rest_stays_and_the_distance_is_that_of_the_exports(
    root: Path, said: str, adapt: str
) -> None:
    base = dict(ViTMAEForPreTraining.from_pretrained(root / "base").named_parameters())
    for zero in ZEROS:
        for stage in ("pretrain", "distill-1"):
            ours = exported(root, f"{adapt}-{zero}", stage)
            still = untrained(adapt, iter(base))
            assert len(still) > 10
            assert all(torch.equal(ours[n], base[n]) for n in still), (zero, stage)
            square = sum((ours[n] - base[n]).detach().pow(2).sum() for n in base if n[:4] == "vit.")
            told = metrics(root / "runs" / f"{adapt}-{zero}" / stage)[-1]
            distance = told["feature/distance_from_init"]
            assert distance == pytest.approx(float(square) ** 0.5, rel=1e-3), (zero, stage)
            assert distance > 1e-2


@pytest.mark.parametrize("adapt", ADAPTS)
def test_resumed_bit_for_bit(root: Path, said: str, adapt: str) -> None:
    assert said.count("resumed at step 3 of 5") == 2 * len(ADAPTS)
    assert said.count("as expected:") == 2 * len(ADAPTS) + 3
    for zero in ("zero2", "zero3"):
        whole, again = (
            load_file(root / "runs" / f"{adapt}-{zero}{end}" / "pretrain/export/model.safetensors")
            for end in ("", "-again")
        )
        assert all(torch.equal(again[name], whole[name]) for name in whole), zero


def test_the_teacher_shares_what_is_frozen(root: Path, said: str) -> None:
    """But for ZeRO-3's; its losses are those of the plain loop (above)."""
    told = {}
    for run in (*(f"{adapt}-{zero}" for adapt in ADAPTS for zero in ZEROS), "texts-lora"):
        result = json.loads((root / "runs" / run / "distill-1" / "result.json").read_text())
        told[run] = result["teacher"]["mode"]
    shared = {"lora-zero0", "lora-zero1", "lora-zero2", "texts-lora"}
    assert {run for run, mode in told.items() if mode == "shared"} == shared
    assert set(told.values()) == {"shared", "replicated"}


def run_of(root: Path, **more: Any) -> Run:
    settings = {"adapt": "lora", "lora": {"rank": 4, "alpha": 8}, "precision": "fp32"}
    config = Config.model_validate(settings | more)
    return Run(config, Ranks(0, 0, 1, torch.device("cpu")), root)


@pytest.mark.parametrize("kind", ["lora-zero0", "texts-lora"])
def test_a_shared_teacher_gives_the_features_of_its_export(
    root: Path, said: str, kind: str
) -> None:
    """Against its own encoder; and the student is what it was before."""
    place, export = (root / "texts" if "texts" in kind else root), root / "runs" / kind / "pretrain"
    run, split = run_of(root), Manifest.load_split(str(place / "shards"), "train")
    modality: Any = TextModality(run, split) if "texts" in kind else ImageModality(run)
    base, taught = (modality.load(str(f)) for f in (place / "base", export / "export"))
    student = modality.autoencoder(base).train()
    adapters.adapt(student.encoder, run.config)
    updates = updates_of(run, str(export / "export"), student.encoder, taught, base)
    assert updates is not None
    loader = Loader(split, batch=BATCH, seed=0, codec=modality.codec(base, split))
    batch, before = next(iter(loader)), {n: v.clone() for n, v in student.state_dict().items()}
    features: tuple[Any, ...] = ("cls", "mean")
    for feature in features:
        found = Shared(student, updates, feature, modality.full, run)(batch)
        alone = FeatureExtractor(modality.encoder(taught), feature).eval()
        expected = alone(**{n: batch[n] for n in modality.full if n in batch})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        first = FeatureExtractor(modality.encoder(base), feature).eval()
        start = first(**{n: batch[n] for n in modality.full if n in batch})
        assert (start - found).abs().max() > 1e-4
    assert student.training
    assert all(torch.equal(v, before[n]) for n, v in student.state_dict().items())


def test_updates_of_another_teacher_are_left_alone(root: Path, said: str, tmp_path: Path) -> None:
    """Of another base, rank or scale, or changed: the teacher is then a copy of its own."""
    source = root / "runs" / "lora-zero0" / "pretrain"
    good = load_file(source / "updates.safetensors")

    def taken(change: Any = lambda tensors: tensors, base: str = "base", **more: Any) -> bool:
        run = run_of(root, **more)
        kind = ImageModality(run)
        first, taught = (kind.load(str(f)) for f in (root / base, source / "export"))
        student = kind.autoencoder(first).encoder
        adapters.adapt(student, run.config)
        save_file(change(dict(good)), tmp_path / "updates.safetensors")
        place = str(tmp_path / "export")
        return updates_of(run, place, student, taught, first) is not None

    name = next(n for n in good if "lora_B" in n)
    assert taken()
    assert not taken(lambda t: t | {name: t[name] + 1e-3})
    assert not taken(lambda t: {n: v for n, v in t.items() if n != name})
    assert not taken(lambda t: t | {name: t[name][:, :3].clone()})
    assert not taken(base="teacher")
    assert not taken(lora={"rank": 4, "alpha": 9})
    assert not taken(adapt="attention")
    assert not taken(zero="zero3")
    (tmp_path / "updates.safetensors").unlink()
    assert updates_of(run_of(root), str(tmp_path / "export"), nn.Linear(1, 1), None, None) is None


@pytest.mark.parametrize("adapt", ADAPTS)
def test_texts(root: Path, said: str, adapt: str) -> None:
    """transformers loads what is exported; embeddings, also the head's tied ones, stay."""
    base = RobertaForMaskedLM.from_pretrained(root / "texts" / "base")
    start = base.state_dict()
    folder = root / "runs" / f"texts-{adapt}"
    for stage in ("pretrain", "distill-1"):
        found, told = RobertaForMaskedLM.from_pretrained(
            folder / stage / "export", output_loading_info=True
        )
        assert not told["missing_keys"]
        ours = found.state_dict()
        changed = {n for n in ours if not torch.equal(ours[n], start[n])}
        layers = {n for n in changed if n.startswith("roberta.")}
        mlp = {n for n in layers if "attention" not in n}
        assert len(layers - mlp) == 2 * 4 * (2 if adapt == "attention" else 1)
        assert len(mlp) == (0 if adapt == "attention" else 2 * 2)
        assert {n.split(".")[0] for n in changed - layers} == {"lm_head"}
        assert "lm_head.decoder.weight" not in changed
    assert (folder / "finetune" / "result.json").exists()
