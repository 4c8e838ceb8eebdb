"""The closed forms against PyTorch's own counter, run on the real modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models import adapters
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE, random_mask
from selfdistill.engine.models.texts.language import MaskedLanguageModel
from selfdistill.engine.models.texts.weights import Language
from selfdistill.engine.monitoring import flops
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.modalities.text import TextModality
from tests.kit.texts import config_of

SMALL = Shape(64, 8, 192, 6, 3, 768, 96, 2, 3, 384)
# Another patch size, mask ratio, and MLP widths that are no multiples of the widths.
ODD = Shape(48, 6, 64, 2, 4, 100, 96, 3, 2, 70, mask_ratio=0.5)
BASE = Shape(224, 16, 768, 12, 12, 3072)
DINO = Shape(48, 6, 64, 2, 4, 100, 96, 3, 2, 70, layer_scale=True, registers=4, gated=True)
ROTARY = Shape(48, 6, 64, 2, 4, 100, 96, 3, 2, 70, layer_scale=True, registers=4, rope=100.0)
OBLONG = Shape((48, 30), 6, 64, 2, 4, 100, 96, 3, 2, 70)
SIGLIP = Shape(48, 6, 64, 2, 4, 100, 96, 3, 2, 70, class_token=False)


def counted(
    stage: flops.Stage,
    shape: Shape,
    teacher: flops.TeacherMode,
    classes: int,
    cls_only: bool,
    config: Config | None = None,
) -> float:
    """FLOPs an image of one step, as the counter sees them."""
    batch = 2
    # Tensors without data: only shapes are counted.
    with torch.device("meta"):
        sizes = (stage, shape, teacher, classes, batch, cls_only)
        return _counted(*sizes, config or Config()) / batch


def _counted(
    stage: flops.Stage,
    shape: Shape,
    teacher: flops.TeacherMode,
    classes: int,
    batch: int,
    cls_only: bool,
    config: Config,
) -> int:
    images = torch.randn(batch, 3, *shape.sides)
    noise = torch.rand(batch, shape.patches)
    model = ViTMAE(shape)
    adapters.adapt(model.encoder, config)
    frozen = ViTEncoder(shape).requires_grad_(False)
    pool = "cls" if cls_only else "mean"
    classifier = ViTClassifier(ViTEncoder(shape), max(classes, 1), pool=pool)
    # The counter knows matrix products; fused attention on the CPU is none to it.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if stage == "finetune":
            loss = F.cross_entropy(classifier(images), torch.zeros(batch, dtype=torch.int64))
        else:
            # Without the loss itself, which is no matrix product (and knows no meta device).
            keep, hidden, _ = random_mask(noise, shape.mask_ratio)
            loss = model.decoder(model.encoder(images, keep), keep, hidden).sum()
        if stage == "distill":
            target = torch.zeros(batch, shape.width)
            if teacher != "cached":
                target = frozen(images, cls_only=cls_only)[:, 0]
            student = model.encoder(images, cls_only=cls_only)[:, 0]
            loss = loss + (student - target).pow(2).sum(-1).mean()
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("shape", [SMALL, ODD, BASE, DINO, ROTARY, SIGLIP, OBLONG])
@pytest.mark.parametrize(
    ("stage", "teacher", "classes"),
    [
        ("pretrain", "cached", 0),
        ("distill", "replicated", 0),
        ("distill", "sharded", 0),
        ("distill", "cached", 0),
        ("finetune", "cached", 700),
    ],
)
def test_closed_forms_agree_with_the_counter(
    shape: Shape, stage: flops.Stage, teacher: flops.TeacherMode, classes: int, cls_only: bool
) -> None:
    formula = flops.step_flops(shape, stage, teacher=teacher, classes=classes, cls_only=cls_only)
    count = counted(stage, shape, teacher, classes, cls_only)
    # The one difference: pixels need no gradient, so the projection's backward is one product,
    # not two, in each view that is trained.
    projected = {"pretrain": shape.kept, "finetune": shape.patches}
    patches = projected.get(stage, shape.kept + shape.patches)
    projection = 2 * patches * shape.patch_values * shape.width
    assert formula == pytest.approx(count + projection, rel=1e-9)
    if shape in (SMALL, BASE):
        assert formula == pytest.approx(count, rel=0.02)


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("shape", [SMALL, ODD])
@pytest.mark.parametrize("adapt", ["attention", "lora"])
@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_a_part_of_the_encoder(
    stage: flops.Stage, shape: Shape, adapt: Any, cls_only: bool
) -> None:
    """Exactly: what is frozen has no product for its gradient, nor has what is before it."""
    config = Config.model_validate(
        {"adapt": adapt, "lora": {"rank": 8}, "distill": {"feature": "cls"}}
    )
    options: Any = {"teacher": "cached", "cls_only": cls_only, "part": flops.Part(adapt, 8)}
    formula = flops.step_flops(shape, stage, **options)
    assert formula == pytest.approx(counted(stage, shape, "cached", 0, cls_only, config), rel=1e-9)
    whole = flops.step_flops(shape, stage, teacher="cached", cls_only=cls_only)
    assert 0.7 * whole < formula < whole


@pytest.mark.parametrize("adapt", ["full", "attention", "lora"])
@pytest.mark.parametrize("kind", ["roberta", "distilbert"])
@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_texts(stage: flops.Stage, kind: str, adapt: str) -> None:
    """Unpadded ones, whose last layer is cut or not."""
    config = Config.model_validate(
        {"adapt": adapt, "lora": {"rank": 4}, "distill": {"feature": "cls"}}
    )
    run = Run(config, Ranks(0, 0, 1, torch.device("cpu")), Path())
    shape = config_of(kind, 300)
    no_data: Any = None  # which FLOPs never ask for
    modality: Any = TextModality(run, no_data)
    base = Language(shape, None, 62, {}, None, "", "")
    model = MaskedLanguageModel(shape)
    adapters.adapt(model.encoder, config)
    ids, at = torch.randint(5, 300, (3, 20)), torch.arange(0, 60, 5)
    view = {"attention_mask": torch.ones_like(ids)}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model.reconstruct(
            masked_ids=ids, masked_at=at, originals=ids.flatten()[at], scale=torch.ones(()), **view
        )["loss"]
        if stage == "distill":
            loss = loss + model.encode(input_ids=ids, cls_only=True, **view)[0][:, 0].sum()
        loss.backward()
    formula = modality.flops(base, stage, "cached", 0, view | {"masked_at": at})
    assert formula == pytest.approx(counter.get_total_flops(), rel=1e-9)


def test_vit_base_at_224() -> None:
    """The published arithmetic is 199.2 GFLOP an image, all rows computed; ours leaves 1.5 out."""
    full = flops.encoder_flops(BASE, BASE.patches)
    mae = flops.step_flops(BASE, "pretrain", teacher="cached")
    step = flops.step_flops(BASE, "distill", teacher="replicated")
    assert round(full / 1e9, 1) == 35.1
    assert round(3 * full / 1e9, 1) == 105.4
    unread = 2 * (BASE.patches - BASE.kept) * BASE.patch_values * BASE.width
    unread += flops.decoder_flops(BASE, whole=True) - flops.decoder_flops(BASE)
    assert round((mae + 3 * unread) / 1e9, 1) == 58.7
    assert round((step + 3 * unread) / 1e9, 1) == 199.2
    assert round(3 * unread / 1e9, 1) == 1.5
    assert step == 4 * full + mae
    assert flops.step_flops(BASE, "distill", teacher="cached") == 3 * full + mae
    peak = flops.peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16)
    assert peak is not None
    assert peak / step == pytest.approx(5003, abs=3)


@pytest.mark.parametrize(
    ("device", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4),
        ("NVIDIA H100 PCIe", torch.float16, 756.0),
        ("NVIDIA H100 NVL", torch.bfloat16, 835.0),
        ("NVIDIA H200", torch.bfloat16, 989.4),
        ("NVIDIA GH200 480GB", torch.bfloat16, 989.4),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0),
        ("NVIDIA A100-PCIE-40GB", torch.float32, 19.5),
        ("NVIDIA A10", torch.bfloat16, 125.0),
        ("NVIDIA A10G", torch.bfloat16, None),  # another chip: not taken for an A10
        ("NVIDIA L4", torch.bfloat16, 121.0),
        ("NVIDIA L40S", torch.bfloat16, 362.0),
        ("Tesla V100-SXM2-16GB", torch.float16, 125.0),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),  # it has no such units
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
        ("cpu", torch.float32, None),
    ],
)
def test_peaks(device: str, dtype: torch.dtype, tera: float | None) -> None:
    assert flops.peak_flops(device, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_fp32_peak_follows_the_tf32_setting() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert flops.peak_flops("NVIDIA H200", torch.float32) == pytest.approx(66.9e12)
        torch.set_float32_matmul_precision("high")
        assert flops.peak_flops("NVIDIA H200", torch.float32) == pytest.approx(494.7e12)
    finally:
        torch.set_float32_matmul_precision(before)
