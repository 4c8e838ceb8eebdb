"""`python -m launcher.plan` against transformers' models, PyTorch's hooks and real engines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from selfdistill.data.errors import UserError
from selfdistill.engine.config.options import load
from selfdistill.engine.models.images import rows_block
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTClassifier, ViTEncoder, ViTMAE
from selfdistill.engine.models.texts.language import MaskedLanguageModel, with_dropout
from selfdistill.engine.runtime import zero
from selfdistill.engine.runtime.precision import autocast
from selfdistill.launcher.doctor.devices import find
from selfdistill.launcher.plan import Options, memory
from selfdistill.launcher.plan import __main__ as plan
from selfdistill.launcher.plan.activations import (
    CLS_ROW,
    Blocks,
    masked_images,
    masked_texts,
    whole_images,
    whole_texts,
)
from selfdistill.launcher.plan.forecast import Plan, prepare
from selfdistill.launcher.plan.workload import Parameters
from tests.kit.launches import launch
from tests.kit.shards import uneven

MILLION = Parameters(trained=1_000_000, frozen=100_000, largest=50_000)


def made(options: dict[str, Any] | None = None, **overrides: Any) -> Plan:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return prepare(Options(**{"samples": 6000} | (options or {})), load(named))


# Parameters


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("base", {}),
        (
            "large",
            {
                "hidden_size": 1024,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "intermediate_size": 4096,
            },
        ),
        (
            "huge",
            {
                "hidden_size": 1280,
                "num_hidden_layers": 32,
                "num_attention_heads": 16,
                "intermediate_size": 5120,
                "patch_size": 14,
            },
        ),
    ],
)
def test_parameters_are_those_of_transformers_vit_mae(name: str, sizes: dict[str, int]) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    with torch.device("meta"):
        theirs = ViTMAEForPreTraining(ViTMAEConfig(**sizes))
    ours = made(recipe="vit_base", model=f"facebook/vit-mae-{name}").work
    parameters = ours.parameters("distill", 0)
    assert parameters.all == sum(p.numel() for p in theirs.parameters())
    assert parameters.trained == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert ours.teacher() == sum(p.numel() for p in theirs.vit.parameters())


def test_parameters_are_those_of_transformers_roberta() -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1)
    config.num_labels = 7
    with torch.device("meta"):
        language, classifier = RobertaForMaskedLM(config), RobertaForSequenceClassification(config)
    work = made({"tokens": 100}, recipe="roberta_base").work
    for stage, theirs in (("pretrain", language), ("finetune", classifier)):
        expected = sum(p.numel() for p in theirs.parameters())
        # stage is one of the literals; mypy takes a loop variable for any string.
        assert work.parameters(stage, 7).trained == expected  # type: ignore[arg-type]
    assert work.parameters("pretrain", 7).all == 124_697_433


def test_a_local_folder_is_read() -> None:
    work = made(recipe="quickstart").work
    assert "32 pixels" in work.origin
    text = made({"tokens": 50}, recipe="quickstart_text").work
    assert "up to 160 tokens" in text.origin  # 162 positions, of which RoBERTa leaves out two


# Model states


def states(stage: int, size: int, world: int, **more: Any) -> memory.Need:
    section = {"stage": stage, "reduce_bucket_size": 1000, **more}
    content = {"zero_optimization": section}
    return memory.need(content, MILLION, size=size, world=world)


def test_states_in_closed_form() -> None:
    p, f, n = 1e6, 1e5, 8
    plain = states(0, 4, n)
    assert (plain.weights, plain.gradients, plain.optimizer) == (4 * (p + f), 4 * p, 8 * p)
    for stage in (1, 2):
        found = states(stage, 4, n, overlap_comm=True)
        assert (found.weights, found.gradients) == (4 * (p + f), 4 * p / n)
        assert found.optimizer == 12 * p / n
        assert found.backward == 2 * 4 * 1000
        assert found.buffers == 4 * p / n
    whole = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}}
    found = memory.need(whole, MILLION, size=4, world=n, accumulation=2)
    assert found.gradients == 4 * p
    third = states(3, 2, n)
    assert third.weights == 2 * (p + f) / n + 2 * (p + f)
    assert (third.gradients, third.optimizer) == (2 * p / n, 12 * p / n)
    live = states(3, 2, n, stage3_max_live_parameters=1000)
    assert live.weights == 2 * (p + f) / n + 2 * 1000
    away = zero.read("zero3_offload")
    found = memory.need(away, MILLION, size=2, world=n)
    assert found.optimizer == found.gradients == 0
    assert found.host > 12 * p / n


def test_the_peak_is_in_the_backward_or_in_the_step() -> None:
    busy = memory.Need(weights=1, gradients=2, optimizer=3, backward=4, step=9, activations=100)
    assert busy.total == 1 + 2 + 3 + 4 + 100
    idle = memory.Need(weights=1, gradients=2, optimizer=3, backward=4, step=9, activations=1)
    assert idle.total == 1 + 2 + 3 + 9


def test_teacher() -> None:
    low, billion = {"product": 2, "size": 4}, 10**9
    assert memory.teacher_bytes("cached", 1000, 2, **low) == 0
    assert memory.teacher_bytes("replicated", 1000, 2, **low) == 2000
    assert memory.teacher_bytes("sharded", billion, 8, **low) == 4 * (billion / 8 + 50e6)
    assert memory.teacher_bytes("sharded", billion, 1, **low) == 4 * billion


def test_deepspeeds_estimate() -> None:
    total = MILLION.all
    assert memory.deepspeed_estimate(zero.read("zero0"), MILLION, 8, 1) is None
    assert memory.deepspeed_estimate(zero.read("zero1"), MILLION, 8, 1) is None
    second = memory.deepspeed_estimate(zero.read("zero2"), MILLION, 4, 2)
    assert second == 2 * total + 18 * total // 8
    third = memory.deepspeed_estimate(zero.read("zero3"), MILLION, 4, 2)
    assert third == 4 * MILLION.largest + 18 * total // 8
    away = memory.deepspeed_estimate(zero.read("zero3_offload"), MILLION, 4, 2)
    assert away == 4 * MILLION.largest
    # In fp16 ours is below theirs by the fp32 gradients, which live in the step alone.
    ours = memory.need(zero.read("zero2"), Parameters(total, 0, 0), size=2, world=8)
    assert second - ours.states == pytest.approx(4 * total / 8)


@pytest.mark.multi
def test_states_of_real_engines(tmp_path: Path) -> None:
    """Storages of all tensors of DeepSpeed's engines on two ranks, at three moments."""
    done = launch(Path(__file__).with_name("count_engines.py"), tmp_path / "counted.json", ranks=2)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for name, product, content, trained, counted in json.loads(
        (tmp_path / "counted.json").read_text()
    ):
        found = memory.need(content, Parameters(trained, 0, 0), size=4, world=2)
        third = zero.stage_of(content) == 3
        gathered = 4 * trained if third else 0
        kept = found.weights + found.optimizer - gathered + (found.gradients if third else 0)
        stepping = found.states - gathered
        if zero.stage_of(content):
            stepping += 4 * trained / 2
        # Copies for bf16 products are autograd's, which Python does not see: see the activations.
        expected = {"kept": kept, "forward": kept + gathered, "stepping": stepping}
        assert counted == pytest.approx(expected, rel=0.03), (name, product)


# Activations

SHAPE = Shape(64, 8, 96, 3, 3, 384, 64, 2, 2, 256)


def saved(model: nn.Module, call: Any, dtype: torch.dtype) -> int:
    """Bytes of all storages that autograd saves in a forward, parameters and copies left out."""
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with autocast(torch.device("cpu"), dtype), saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    if dtype == torch.float32:
        return sum(found.values())
    used = {id(p) for p, t in zip(model.parameters(), _used(model, call), strict=True) if t}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    copied = {id(m.weight): m.weight.numel() for m in layers if id(m.weight) in used}
    return sum(found.values()) - 2 * sum(copied.values())


def _used(model: nn.Module, call: Any) -> list[bool]:
    """Which parameters a forward uses."""
    result = call()
    loss = result["loss"] if isinstance(result, dict) else result
    for parameter in model.parameters():
        parameter.grad = None
    loss.backward()
    return [p.grad is not None for p in model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_images(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU: on a CPU attention is computed, and kept, in fp32.
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        rows_block, "_attention", lambda q, k, v, p: attention(q, k, v, dropout_p=p)
    )
    batch, size = 4, dtype.itemsize
    images, noise = torch.randn(batch, 3, 64, 64), torch.rand(batch, SHAPE.patches)
    mae = ViTMAE(SHAPE)
    found = saved(mae, lambda: mae(images, noise), dtype) / batch
    # More than autograd's: what the forward itself still holds, the prediction and its target.
    assert 1 <= masked_images(SHAPE, size) / found < 1.12
    for dropout in (0.0, 0.1):
        for pool in ("cls", "mean"):
            network = ViTClassifier(ViTEncoder(SHAPE, dropout=dropout), 5, pool=pool)
            found = saved(network, lambda network=network: network(images).sum(), dtype) / batch
            mask = size if dropout else 0
            estimate = whole_images(SHAPE, size, mask=mask, cls_only=pool == "cls")
            assert estimate == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_texts(dtype: torch.dtype) -> None:
    from transformers import RobertaConfig

    batch, tokens, size, vocabulary = 4, 64, dtype.itemsize, 1000
    config = RobertaConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=384,
        max_position_embeddings=130,
        type_vocab_size=1,
    )
    model = MaskedLanguageModel(with_dropout(config, 0.0))
    model.network.set_attn_implementation("sdpa")  # as on a GPU: not in fp32
    ids = torch.randint(5, vocabulary, (batch, tokens))
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    mask[0, -5:] = 0
    at = torch.arange(0, batch * tokens, 7)
    blocks = Blocks(3, 96, 384, 3)
    for cls_only, cut in ((False, None), (True, CLS_ROW)):
        view = {"input_ids": ids, "attention_mask": mask, "cls_only": cls_only}
        found = saved(model, lambda view=view: model.encode(**view)[0].sum(), dtype) / batch
        # In bf16 the CPU's attention keeps its mask, a value for each pair of tokens.
        bound = 0.02 if dtype == torch.float32 else 0.05
        assert whole_texts(blocks, tokens, size, cut=cut) == pytest.approx(found, rel=bound)
    scale = torch.tensor(1.0)
    view = {"masked_ids": ids, "attention_mask": mask, "masked_at": at, "scale": scale}
    call = lambda: model.reconstruct(originals=ids.flatten()[at], **view)  # noqa: E731
    found = saved(model, call, dtype) / batch
    estimate = masked_texts(blocks, tokens, len(at) / batch, vocabulary, size, mask=0, cuts=True)
    assert 0.97 <= estimate / found < 1.12


# The plan of a run


def test_time_is_flops_over_peak() -> None:
    found = made(
        {"devices": 8, "mfu": 0.5},
        recipe="vit_base",
        precision="bf16",
        teacher__mode="replicated",
        distill__feature="tokens",
    )
    job = next(job for job in found.jobs if job.stage == "distill")
    assert found.work.flops("distill", found.mode, 0) == pytest.approx(197.7e9, rel=1e-3)
    # Table 9: 20,000 steps of 64; an H100's sheet says 989.4 TFLOP/s.
    expected = 20_000 * 64 * 197.7e9 / (8 * 989.4e12 * 0.5)
    assert found.seconds(found.flops(job)) == pytest.approx(expected, rel=1e-3)
    assert found.work.encode_flops() == pytest.approx(35.1e9, rel=2e-3)
    assert job.micro == 8


def test_time_of_texts_follows_their_length() -> None:
    short, long = (
        made({"tokens": tokens}, recipe="roberta_base").work.flops("finetune", "cached", 4)
        for tokens in (100, 200)
    )
    # 6 FLOPs a weight and token in 12 blocks of 12 D² weights, and a little attention.
    assert short == pytest.approx(6 * 12 * 12 * 768**2 * 100, rel=0.05)
    assert 2 < long / short < 2.1


def test_steps_and_bytes_come_from_the_manifest(tmp_path: Path) -> None:
    manifest = uneven(tmp_path / "train", [7, 3], size=16)
    found = made(
        {"samples": None},
        data=str(tmp_path),
        model="scratch",
        model__shape__image_size=16,
        pretrain__epochs=3,
        pretrain__batch=4,
    )
    job = found.jobs[0]
    assert (job.samples, job.steps) == (10, 8)
    assert job.sample_bytes == sum(p.stat().st_size for p in tmp_path.glob("*/*.tar")) / 10
    assert found.classes == len(manifest.classes) == 3


def test_the_report(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = "--recipe=vit_base --samples=6000 --devices=8 --precision=bf16 --price=3600"
    plan.main(words.split(" "))
    said = capsys.readouterr().out
    assert "P = 111,655,680 trained + 252,160 frozen" in said
    assert "zero1 *" in said
    assert "(12 B x 111,655,680 + 4 B x 252,160) x keep 2" in said
    assert "4 B x 6,000 x 768" in said
    assert "20,000 steps x 64 x 155.3 GFLOP / (8 x 989.4 TFLOP/s x 0.4) = 63 s" in said
    assert " device hours, " in said.partition(" at 3600 an hour")[0].splitlines()[-1]
    assert "bound by launching kernels" in said  # 3 ms a step: no 40% MFU on 8 images


def fits(**words: Any) -> list[bool]:
    from selfdistill.launcher.plan.tables import need

    options = {"tokens": 200, "device": words.pop("device")}
    found = made(options, recipe="roberta_base", **words)
    content = zero.read("zero1")
    return [need(found, job, content).total <= found.device.memory for job in found.jobs]


def test_fits() -> None:
    # 128 texts of up to 512 tokens in one batch.
    assert fits(device="t4", precision="fp16", stage="pretrain") == [False]
    assert fits(device="h200", precision="bf16", stage="pretrain") == [True]
    smaller = {"pretrain__accumulation": 32}
    assert fits(device="t4", precision="fp16", stage="pretrain", **smaller) == [True]


# Mistakes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--recipe vit_base --samples 9 --devises 8", "unknown option --devises. Did you mean"),
        ("--recipe vit_base --samples 9 --devises 8", "--devices?"),
        ("--recipe vit_base --samples 9 --pretrain.bach 8", "Did you mean --pretrain.batch?"),
        ("--recipe vit_base", "--data is missing"),
        ("--recipe vit_base --samples x", "--samples x: Input should be a valid integer"),
        ("--recipe vit_base --samples 0", "greater than or equal to 1"),
        ("--recipe vit_base --samples 9 --mfu 40", "--mfu 40: Input should be less than"),
        ("--recipe vit_base --samples 9 --samples 8", "--samples is given twice"),
        ("--recipe vit_base --samples", "--samples has no value"),
        ("--recipe vit_base --samples 9 --device h10", "did you mean h100?"),
        ("--recipe vit_base --samples 9 --device v100 --precision bf16", "no matrix units"),
        ("--recipe vit_base --samples 9 --devices 3", "batch 64 cannot be cut evenly over 3"),
        ("--recipe vit_base --samples 9 --model facebook/vit-mae-bas", "plan downloads nothing"),
        ("--recipe roberta_base --samples 9", "--tokens is missing"),
        ("--recipe vit_base --data no/such/folder", "no data set at no/such/folder"),
        ("--recipe vit_base --samples 9 --zero zero9", "no such setting"),
    ],
)
def test_mistakes_are_one_line(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main(words.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_device_of_ones_own() -> None:
    device = find("mine", torch.bfloat16, memory_gb=10, tflops=50)
    assert (device.memory, device.peak) == (10e9, 50e12)
    assert find("H100", torch.bfloat16).peak == 989.4e12
    with pytest.raises(UserError, match="not known"):
        find("mine", torch.bfloat16, memory_gb=10)
