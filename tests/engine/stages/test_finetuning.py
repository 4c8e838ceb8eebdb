"""Cosine, layer decay, crops and averaged weights together, against a plain loop.

The loop's model and schedule are transformers', its average timm's. One start of two ranks for all.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F
from transformers import (
    RobertaForSequenceClassification,
    ViTForImageClassification,
    get_cosine_schedule_with_warmup,
)

from selfdistill.engine.training.views import Crops, Flips, Together
from selfdistill.launcher.plan import memory
from tests.engine.training import test_parity_text as text_parity
from tests.engine.training.scoring.test_analysis import pictures
from tests.engine.training.test_parity_training import batches, fresh_classifier
from tests.kit import texts as text_kit
from tests.kit.launches import make_world, metrics, run_cases
from tests.kit.plain_loop import RATE, STEPS, ZERO3, largest_difference

pytestmark = pytest.mark.multi

Batch = dict[str, torch.Tensor]

ZEROS = ("zero0", "zero1", "zero2", "zero3")
DECAY, EMA, CROP = 0.6, 0.7, (0.3, 0.9)
#: More than the plain loop has: all that is random, and other optimisers.
ODD: dict[str, dict[str, object]] = {
    "random": {"finetune.dropout": 0.3, "finetune.drop_path": 0.4},
    "recadam": {"finetune.regularizer": "recadam", "recadam.c": 400.0, "recadam.t0": 3.0},
    "mars": {"finetune.regularizer": "mars", "mars.radius": 0.004},
}


def case(root: Path, name: str, zero: str, **more: object) -> dict[str, object]:
    return {
        "stage": "finetune",
        "finetune.start": "model",
        "finetune.lr": RATE,
        "finetune.schedule": "cosine",
        "finetune.layer_decay": DECAY,
        "finetune.ema": EMA,
        "finetune.crop": CROP,
        "finetune.eval_every": 2,
        "data": str(root / "shards"),
        "model": str(root / "base"),
        "output": str(root / "runs" / name),
        "zero": str(root / "zero3.json") if zero == "zero3" else zero,
        **more,
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_world(tmp_path_factory.mktemp("finetuning"))
    (root / "zero3.json").write_text(ZERO3)
    cases = [case(root, f"whole-{zero}", zero) for zero in ZEROS]
    for zero in ZEROS:
        cases += [
            case(root, f"left-{zero}", zero, leave_at="step 4"),
            case(root, f"left-{zero}", zero),
        ]
    for zero in ("zero1", "zero3"):
        name = f"scoring-{zero}"
        cases += [case(root, name, zero, leave_at="scoring"), case(root, name, zero)]
    cases += [case(root, "moved", "zero2", leave_at="step 4"), case(root, "moved", "zero3")]
    for name, more in ODD.items():
        cases.append(case(root, f"whole-{name}", "zero1", **more))
        cases.append(case(root, f"left-{name}", "zero1", **more, leave_at="step 4"))
        cases.append(case(root, f"left-{name}", "zero1", **more))
    text_kit.make_texts(root / "text" / "shards")
    text_kit.make_language(root / "text" / "base")
    text: dict[str, object] = {"finetune.crop": None, "text.bucket": 8}
    text |= {"data": str(root / "text" / "shards"), "model": str(root / "text" / "base")}
    cases += [case(root, f"text-{zero}", zero, **text) for zero in ("zero0", "zero3")]
    # Another length of the texts is another fine-tuning, though no weight tells it.
    told = {"expect_error": "made with text.max_length = 62, now it is 32"}
    cases.append(case(root, "text-zero0", "zero0", **text | {"text.max_length": 32} | told))
    for option in ("crop", "drop_path"):
        given = {f"finetune.{option}": CROP if option == "crop" else 0.1}
        refused = {"expect_error": f"--finetune.{option} is for images"}
        cases.append(case(root, "refused", "zero0", **text | given | refused))
    printed = run_cases(root, cases)
    assert printed.count("resumed at step 3") == len(ZEROS) + 1 + len(ODD)
    assert printed.count("resumed at step 2") == 2
    return root


def layer(name: str, depth: int) -> int:
    number = re.search(r"layers?\.(\d+)\.", name)
    if number:
        return int(number[1]) + 1
    return 0 if "embeddings" in name else depth if "layernorm" in name else depth + 1


def averages(
    model: nn.Module, batches: Iterator[Batch], loss_of: Callable[[Batch], torch.Tensor]
) -> Iterator[nn.Module]:
    """The plain loop: after each step the average."""
    groups = [
        {
            "params": [parameter],
            "lr": RATE * DECAY ** (3 - layer(name, depth=2)),
            "weight_decay": 0.0
            if name.endswith(("bias", "cls_token")) or "position_embeddings" in name
            else 0.01,
        }
        for name, parameter in model.named_parameters()
    ]
    assert {group["lr"] for group in groups} == {RATE * DECAY**n for n in range(4)}
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    average = ModelEmaV3(model, decay=EMA)
    for batch in batches:
        loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update(model)
        yield average.module.eval()
    difference = largest_difference(average.module.state_dict(), model.state_dict())
    assert difference > 1e-4  # the average is not what was trained


def oracle(root: Path) -> tuple[dict[str, torch.Tensor], dict[int, float]]:
    """The average after the last step, and by step its loss on the validation split."""
    model = fresh_classifier(root, root / "base").train()

    def loss_of(batch: Batch) -> torch.Tensor:
        mirrored = batch["pixels"].flip(-1)
        pixels = torch.where(batch["flip"].view(-1, 1, 1, 1), mirrored, batch["pixels"])
        return F.cross_entropy(model(pixels).logits, batch["labels"])

    images, labels = pictures(root, "val")
    losses, keyed = {}, Together((Crops(0, *CROP), Flips(0)))
    for step, average in enumerate(averages(model, batches(root, keyed), loss_of), start=1):
        with torch.no_grad():
            losses[step] = float(F.cross_entropy(average(images).logits, labels))
    return average.state_dict(), losses


def test_the_average_equals_the_plain_loop(root: Path) -> None:
    expected, losses = oracle(root)
    for name in (*(f"whole-{zero}" for zero in ZEROS), "moved"):
        stage = root / "runs" / name / "finetune-model"
        ours = ViTForImageClassification.from_pretrained(stage / "export").state_dict()
        assert largest_difference(ours, expected) < 1e-5, name
        found = {line["step"]: line["val/loss"] for line in metrics(stage) if "val/loss" in line}
        assert found.keys() == {2, 4, STEPS}
        for step, loss in found.items():
            assert loss == pytest.approx(losses[int(step)], rel=1e-5), (name, step)


def test_texts_equal_the_plain_loop(root: Path) -> None:
    folder = root / "text"
    model = RobertaForSequenceClassification.from_pretrained(folder / "base", num_labels=3).train()
    kind = text_parity.kind_of(folder)
    ours = kind.classifier(kind.load(str(folder / "base")), ["a", "b", "c"], seed=0)
    model.classifier.load_state_dict(ours.network.classifier.state_dict())

    def loss_of(batch: Batch) -> torch.Tensor:
        names = ("input_ids", "attention_mask", "labels")
        loss: torch.Tensor = model(**{name: batch[name] for name in names}).loss
        return loss

    *_, average = averages(model, text_parity.batches(folder, kind, masked=False), loss_of)
    for zero in ("zero0", "zero3"):
        export = root / "runs" / f"text-{zero}" / "finetune-model" / "export"
        after = RobertaForSequenceClassification.from_pretrained(export)
        assert largest_difference(after.state_dict(), average.state_dict()) < 1e-5, zero


def test_a_run_that_was_left_ends_in_the_same_bits(root: Path) -> None:
    pairs = [(f"whole-{name}", f"left-{name}") for name in (*ZEROS, *ODD)]
    pairs += [(f"whole-{zero}", f"scoring-{zero}") for zero in ("zero1", "zero3")]
    for names in pairs:
        one, other = (
            load_file(root / "runs" / name / "finetune-model" / "export" / "model.safetensors")
            for name in names
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), names


def test_checkpoints_hold_weights_and_average(root: Path) -> None:
    folder = root / "runs" / "left-zero3" / "finetune-model" / "checkpoints" / "step-00000003"
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    names = [name.removeprefix("fp32/") for name in tensors if name.startswith("fp32/")]
    assert {f"average/{name}" for name in names} <= tensors.keys()
    planned = memory.checkpoint_bytes(
        memory.Parameters(sum(tensors[f"fp32/{n}"].numel() for n in names), 0, 0), copies=1
    )
    assert sum(tensor.nbytes for tensor in tensors.values()) == planned
    assert any(not torch.equal(tensors[f"average/{n}"], tensors[f"fp32/{n}"]) for n in names)
