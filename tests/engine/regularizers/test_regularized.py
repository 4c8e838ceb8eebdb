"""Whole runs with each regularizer and each ablation, on two ranks and on one.

A start of DeepSpeed costs ten seconds: all runs of two ranks share one, those of one rank another.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import ViTForImageClassification

from selfdistill.engine.training.views import Flips
from selfdistill.launcher.plan import memory
from tests.engine.training.scoring.test_analysis import pictures
from tests.engine.training.test_parity_training import batches
from tests.kit import texts as text_kit
from tests.kit.launches import make_world, metrics, run_cases
from tests.kit.plain_loop import RATE, STEPS, ZERO3, finetuning_rates, largest_difference

pytestmark = pytest.mark.multi

#: Pulls that matter within five steps, at the rates of `finetuning_rates`.
RECADAM = {
    "finetune.regularizer": "recadam",
    "recadam.c": 400.0,
    "recadam.k": 0.7,
    "recadam.t0": 3.0,
}
MARS = {"finetune.regularizer": "mars", "mars.radius": 0.004, "mars.head_radius": 0.15}
R3F = {"finetune.regularizer": "r3f", "r3f.eps": 0.5, "r3f.weight": 2.0}
#: Options that must be plain fine-tuning, bit for bit.
NOTHING: dict[str, dict[str, object]] = {
    "recadam": {**RECADAM, "recadam.c": 0.0},
    "mars": {**MARS, "mars.radius": 1e9, "mars.head_radius": 1e9},
    "infinite": {**MARS, "mars.radius": "inf", "mars.head_radius": "inf"},
    "r3f": {**R3F, "r3f.weight": 0.0},
}
SUPCON = {"stage": "pretrain", "pretrain.objective": "supcon", "pretrain.lr": RATE}
DIET = {"stage": "pretrain", "pretrain.objective": "diet", "pretrain.lr": RATE}


def case(root: Path, name: str, kind: str, **more: object) -> dict[str, object]:
    return {
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.lr": RATE,
        "data": str(root / ("shards" if kind == "image" else "texts")),
        "model": str(root / ("base" if kind == "image" else "language")),
        "output": str(root / "runs" / name),
        "text.bucket": 8,
        "finetune.test": False,
        "finetune.train_scored": 0,
        **more,
    }


def two_ranks(root: Path) -> list[dict[str, object]]:
    zero3 = str(root / "zero3.json")
    every = {"save_every": 1, "keep": 9, "finetune.test": True}
    low = {"precision": "bf16", "zero": "zero1"}
    distill = {"stage": "distill", "distill.lr": RATE, "distill.weight": 0.5}
    distill["teacher"] = str(root / "teacher")
    texts = {**distill, "teacher": str(root / "language-teacher")}
    found = [
        case(root, f"{n}-{zero}", "image", zero=zero, **options)
        for zero in ("zero0", "zero2")
        for n, options in {"plain": {}, **NOTHING}.items()
        if zero == "zero2" or n in ("plain", "mars")
    ]
    found += [
        case(root, f"pull-{Path(zero).stem}", "image", zero=zero, **RECADAM)
        for zero in ("zero0", "zero2", zero3)
    ]
    found += [
        case(root, f"radius-{zero}", "image", zero=zero, **MARS, **every)
        for zero in ("zero0", "zero2")
    ]
    found += [
        case(root, "radius-bf16", "image", zero="zero2", precision="bf16", **MARS, **every),
        case(root, "pull-bf16", "text", **low, **RECADAM),
        case(root, "cut-bf16", "text", **low, **RECADAM, leave_at="step 4"),
        case(root, "cut-bf16", "text", **low, **RECADAM),
        case(root, "noise-2", "image", zero=zero3, **R3F),
        case(root, "text-plain", "text"),
        case(root, "text-noise-2", "text", zero="zero2", **R3F),
        case(root, "text-radius", "text", zero="zero2", **MARS, **every),
        case(root, "supcon-2", "image", zero="zero2", **SUPCON, **{"supcon.dropout": 0.0}),
        case(root, "supcon-3", "image", zero=zero3, **SUPCON, **{"supcon.dropout": 0.0}),
        case(root, "text-supcon", "text", **SUPCON),
        case(root, "diet-2", "image", zero="zero2", **DIET),
        case(root, "diet-3", "image", zero=zero3, **DIET),
        case(root, "text-diet", "text", **DIET),
        # Interrupted after three steps: goes on here, and on one rank below.
        *(
            case(root, f"cut-{n}", "image", zero="zero2", **RECADAM, leave_at="step 4")
            for n in (1, 2)
        ),
        case(root, "cut-2", "image", zero="zero2", **RECADAM),
        # The ablations of the distillation term.
        case(root, "no-mae", "image", **distill, **{"distill.mae_weight": 0}),
        case(root, "no-distill", "image", **{**distill, "teacher": str(root / "nowhere")})
        | {"distill.weight": 0},
        case(
            root, "predictions", "image", **distill, **{"distill.match": "prediction"}, zero=zero3
        ),
        case(root, "l2", "image", **distill, **{"distill.match": "weights_l2"}, zero="zero2"),
        case(root, "mars-l", "image", **distill, **{"distill.match": "weights_mars"})
        | {"distill.mae_weight": 0},
        case(root, "text-no-mae", "text", **texts, **{"distill.mae_weight": 0}),
        case(root, "text-predictions", "text", **texts, **{"distill.match": "prediction"}),
        case(root, "text-l2", "text", **texts, **{"distill.match": "weights_l2"}),
    ]
    return found


def one_rank(root: Path) -> list[dict[str, object]]:
    return [
        case(root, "cut-1", "image", **RECADAM),
        case(root, "noise-1", "image", **R3F),
        case(root, "text-noise-1", "text", **R3F),
        case(root, "packed-noise-1", "text", **R3F, **{"text.packed": True}),
        case(root, "supcon-1", "image", **SUPCON, **{"supcon.dropout": 0.0}),
        case(root, "diet-1", "image", **DIET, leave_at="step 4"),
        case(root, "diet-1", "image", **DIET),
    ]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("regularized"))
    (root / "zero3.json").write_text(ZERO3)
    text_kit.make_texts(root / "texts")
    text_kit.make_language(root / "language")
    text_kit.make_language(root / "language-teacher", seed=1)
    run_cases(root / "two", two_ranks(root))
    printed = run_cases(root / "one", one_rank(root), ranks=1)
    assert "resumed at step 3 of 5, saved by 2 ranks" in printed
    return root


def export(root: Path, name: str, stage: str = "finetune-model") -> dict[str, torch.Tensor]:
    return load_file(root / "runs" / name / stage / "export" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


def logged(root: Path, name: str, tag: str, stage: str = "finetune-model") -> list[float]:
    return [line[tag] for line in metrics(root / "runs" / name / stage) if tag in line]


def test_strength_0_is_plain_fine_tuning_bit_for_bit(root: Path) -> None:
    for zero in ("zero0", "zero2"):
        plain = export(root, f"plain-{zero}")
        for name in NOTHING:
            if zero == "zero2" or name == "mars":
                assert equal(plain, export(root, f"{name}-{zero}")), (name, zero)
    for name in ("pull-zero2", "radius-zero2", "noise-2"):
        assert not equal(export(root, "plain-zero2"), export(root, name)), name
    for name in ("text-noise-2", "text-radius"):
        assert not equal(export(root, "text-plain"), export(root, name)), name


def oracle_recadam(root: Path) -> dict[str, torch.Tensor]:
    """transformers' classifier, its own loop, and RecAdam's update written out."""
    from selfdistill.engine.checkpoints.folder import Run
    from selfdistill.engine.config.schema import Config
    from selfdistill.engine.models.images.weights import load_pretrained
    from selfdistill.engine.runtime.distributed import Ranks
    from selfdistill.engine.training.modalities.image import ImageModality

    model = ViTForImageClassification.from_pretrained(
        root / "base", num_labels=3, ignore_mismatched_sizes=True, hidden_dropout_prob=0.0
    ).train()
    config = Config()
    config.finetune.dropout = 0.0
    run = Run(config, Ranks(0, 0, 1, torch.device("cpu")), root)
    base = load_pretrained(str(root / "base"))
    head = ImageModality(run).classifier(base, ["a", "b", "c"], seed=0).network.head
    model.classifier.load_state_dict(head.state_dict())
    start = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    value = {n: p.clone() for n, p in start.items()}
    m, v = ({n: torch.zeros_like(p) for n, p in start.items()} for _ in range(2))
    for step, batch in enumerate(batches(root, Flips(0))):
        mirrored = batch["pixels"].flip(-1)
        pixels = torch.where(batch["flip"].view(-1, 1, 1, 1), mirrored, batch["pixels"])
        model.zero_grad()
        F.cross_entropy(model(pixels).logits, batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        t, lr = step + 1, finetuning_rates()[step]
        share = 1 / (1 + np.exp(-0.7 * (t - 3)))
        for n, p in model.named_parameters():
            held = not n.startswith("classifier")
            g = p.grad.double()
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.999 * v[n] + 0.001 * g**2
            if not n.endswith(("bias", "position_embeddings", "cls_token")):
                value[n] = value[n] * (1 - lr * 0.01)
            adam = (m[n] / (1 - 0.9**t)) / ((v[n] / (1 - 0.999**t)).sqrt() + 1e-8)
            value[n] = value[n] - lr * (share if held else 1) * adam
            if held:
                value[n] = value[n] - lr * (1 - share) * 400 * (value[n] - start[n])
            p.data.copy_(value[n])
    return model.state_dict()


def test_recadam_equals_the_plain_loop(root: Path) -> None:
    wanted = oracle_recadam(root)
    for name in ("pull-zero0", "pull-zero2", "pull-zero3", "cut-1"):
        folder = root / "runs" / name / "finetune-model" / "export"
        ours = ViTForImageClassification.from_pretrained(folder).state_dict()
        assert largest_difference(ours, wanted) < 1e-5, name
    plain = root / "runs" / "plain-zero0" / "finetune-model" / "export"
    free = ViTForImageClassification.from_pretrained(plain).state_dict()
    assert largest_difference(free, wanted) > 1e-4  # the pull matters


def test_recadam_goes_on_bit_for_bit_with_its_anchor(root: Path) -> None:
    assert equal(export(root, "cut-2"), export(root, "pull-zero2"))
    assert equal(export(root, "cut-bf16"), export(root, "pull-bf16"))
    moved = [
        json.loads((root / "runs" / name / "finetune-model" / "result.json").read_text())
        for name in ("pull-bf16", "text-plain")
    ]
    held, free = (found["analysis"]["distance_from_init"] for found in moved)
    assert 0 < held < 0.6 * free
    losses = [logged(root, name, "loss/loss") for name in ("cut-2", "pull-zero2")]
    assert losses[0] == losses[1]
    folder = root / "runs" / "cut-2" / "finetune-model" / "checkpoints" / "step-00000003"
    saved = tensors(folder)
    begin = load_file(root / "base" / "model.safetensors")
    anchors = {k.removeprefix("anchor/"): v for k, v in saved.items() if k.startswith("anchor/")}
    assert not any("head" in name for name in anchors)
    weights = {k.removeprefix("fp32/") for k in saved if k.startswith("fp32/")}
    assert weights - set(anchors) == {"model.network.head.weight", "model.network.head.bias"}
    found = anchors["model.network.encoder.blocks.1.mlp.fc1.weight"]
    layer = "encoder.layer.1.intermediate.dense.weight"
    (wanted,) = (value for name, value in begin.items() if name.endswith(layer))
    assert torch.equal(found, wanted)
    now = saved["fp32/model.network.encoder.blocks.1.mlp.fc1.weight"]
    assert not torch.equal(now, found)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {k: v for part in checkpoint.glob("*.safetensors") for k, v in load_file(part).items()}


def test_mars_holds_after_every_step(root: Path) -> None:
    """Of weights and of what the forward pass uses: the scores are those of the exported ones."""
    for name in ("radius-zero0", "radius-zero2", "radius-bf16", "text-radius"):
        stage = root / "runs" / name / "finetune-model"
        folders = sorted((stage / "checkpoints").glob("step-*"))
        assert len(folders) == STEPS
        # At step 1 the rate is 0: the weights are the first ones.
        begin = tensors(folders[0])
        reached = {"radius": 0.0, "head": 0.0}
        for folder in folders:
            for key, value in tensors(folder).items():
                if not key.startswith("fp32/") or value.ndim not in (2, 4):
                    continue
                fresh = "head" in key or "classifier" in key
                if not fresh and "embeddings" in key:
                    continue  # tables of vectors are no linear maps
                away = value.double() - (0 if fresh else begin[key].double())
                size = away.reshape(len(away), -1).abs().sum(1).max().item()
                limit = 0.15 if fresh else 0.004
                assert size <= limit * (1 + 1e-4) + 1e-6, (name, folder.name, key, size)
                which = "head" if fresh else "radius"
                reached[which] = max(reached[which], size / limit)
        assert reached["radius"] == pytest.approx(1, rel=1e-3), name
        assert reached["head"] == pytest.approx(1, rel=1e-3), name
    for name, close in (("radius-zero2", 1e-5), ("radius-bf16", 2e-2)):
        stage = root / "runs" / name / "finetune-model"
        model = ViTForImageClassification.from_pretrained(stage / "export").eval()
        images, labels = pictures(root, "test")
        with torch.no_grad():
            loss = float(F.cross_entropy(model(images).logits, labels))
        found = json.loads((stage / "result.json").read_text())["metrics"]["test_loss"]
        assert found == pytest.approx(loss, rel=close), name


def test_noise_depends_neither_on_ranks_nor_on_padding(root: Path) -> None:
    others = {
        "noise-1": "noise-2",
        "text-noise-1": "text-noise-2",
        "packed-noise-1": "text-noise-2",
    }
    for name, other in others.items():
        one, two = (logged(root, n, "loss/r3f") for n in (name, other))
        assert len(one) == STEPS
        assert one == pytest.approx(two, rel=1e-4), name
        assert min(one) > 1e-6
        # A mean over the batch: doubled noise on one half would show.
        parts = zip(
            *(logged(root, name, f"loss/{k}") for k in ("loss", "cross_entropy", "r3f")),
            strict=True,
        )
        for loss, clean, term in parts:
            assert loss == pytest.approx(clean + 2 * term, rel=1e-5)


@pytest.mark.parametrize("method", ["supcon", "diet"])
def test_other_objectives_on_two_ranks_are_those_of_one(root: Path, method: str) -> None:
    """DIET's single rank was interrupted, too."""
    one = logged(root, f"{method}-1", f"loss/{method}", "pretrain")
    assert len(one) == STEPS
    assert one[-1] < one[0]
    for name in (f"{method}-2", f"{method}-3"):
        found = logged(root, name, f"loss/{method}", "pretrain")
        assert found == pytest.approx(one, rel=1e-4), name
        a, b = (export(root, n, "pretrain") for n in (f"{method}-1", name))
        compared = [k for k in a if not k.endswith(("key.bias", "k_proj.bias"))]
        assert max(float((a[k] - b[k]).abs().max()) for k in compared) < 2e-5, name
    kept(root, f"{method}-2", "base", "pretrain")
    kept(root, f"text-{method}", "language", "pretrain")


def kept(root: Path, name: str, base: str, stage: str) -> None:
    """The encoder was trained, and the decoder is as it was."""
    before, after = load_file(root / base / "model.safetensors"), export(root, name, stage)
    head = [k for k in before if k.startswith(("decoder", "lm_head"))]
    head = [k for k in head if not k.endswith("decoder.weight") or k.startswith("decoder")]
    assert len(head) >= 4, list(before)
    assert all(torch.equal(before[k], after[k]) for k in head if k in after), name
    rest = [k for k in before if k not in head and k in after]
    assert sum(not torch.equal(before[k], after[k]) for k in rest) > 10, name


def test_ablations_of_the_distillation_term(root: Path) -> None:
    def line(name: str, step: int = 0) -> dict[str, float]:
        return metrics(root / "runs" / name / "distill-1")[step]

    # Without L_MAE there is nothing but the distance, and the decoder stays.
    for name, base in (("no-mae", "base"), ("text-no-mae", "language")):
        for step in range(STEPS):
            found = line(name, step)
            assert found["loss/loss"] == pytest.approx(0.5 * found["loss/distill"], rel=1e-6)
            assert "loss/mae" not in found
            assert "loss/mlm" not in found
        kept(root, name, base, "distill-1")
    # Without L_Distill no teacher is looked for.
    found = line("no-distill")
    assert found["loss/loss"] == found["loss/mae"]
    assert "loss/distill" not in found
    result = json.loads((root / "runs" / "no-distill" / "distill-1" / "result.json").read_text())
    assert "teacher" not in result
    assert "teacher" not in result["record"]

    for name, mae in (("predictions", "mae"), ("text-predictions", "mlm"), ("l2", "mae")):
        for step in range(STEPS):
            found = line(name, step)
            wanted = found[f"loss/{mae}"] + 0.5 * found["loss/distill"]
            assert found["loss/loss"] == pytest.approx(wanted, rel=1e-6), name
        assert line(name, -1)["loss/distill"] < line(name)["loss/distill"], name
    # The first distance is that of the two models as they are on the disk.
    for name, student, teacher in (
        ("l2", "base", "teacher"),
        ("mars-l", "base", "teacher"),
        ("text-l2", "language", "language-teacher"),
    ):
        wanted = stored_distance(root / student, root / teacher, largest="mars" in name)
        assert line(name)["loss/distill"] == pytest.approx(wanted, rel=1e-5), name
    mars = line("mars-l")
    assert mars["loss/loss"] == pytest.approx(0.5 * mars["loss/distill"], rel=1e-6)


def stored_distance(student: Path, teacher: Path, *, largest: bool) -> float:
    a, b = (load_file(f / "model.safetensors") for f in (student, teacher))
    names = [k for k in a if not k.startswith(("decoder", "lm_head"))]
    away = {k: (a[k] - b[k]).double() for k in names}
    if not largest:
        return sum(float(d.pow(2).sum()) for d in away.values())
    rows: dict[str, list[float]] = {}
    for key, value in away.items():
        if not key.endswith("weight") or value.ndim not in (2, 4):
            continue
        # One matrix makes queries, keys and values here.
        before, part, _ = key.rsplit(".", 2)
        fused = part in ("query", "key", "value", "q_proj", "k_proj", "v_proj")
        size = value.reshape(len(value), -1).abs().sum(1).max().item()
        rows.setdefault(before if fused else key, []).append(size)
    return sum(max(sizes) for sizes in rows.values())


def test_a_checkpoint_is_as_large_as_the_plan_says(root: Path) -> None:
    """Fine-tuning trains everything; small tensors and names make the files a little larger."""
    trained = sum(t.numel() for t in export(root, "radius-zero2").values())
    planned = memory.checkpoint_bytes(memory.Parameters(trained, 0, 0))
    folder = root / "runs" / "radius-zero2" / "finetune-model" / "checkpoints" / "step-00000003"
    kinds = ("fp32/", "exp_avg/", "exp_avg_sq/")
    assert sum(t.nbytes for k, t in tensors(folder).items() if k.startswith(kinds)) == planned
    assert planned < sum(p.stat().st_size for p in folder.iterdir()) < 1.3 * planned
