"""Precision: what auto means, where bf16 keeps fp32, what a step asks of a device."""

import itertools
import os
import tomllib
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.checkpoints.folder import CONFIG, Run, open_run
from selfdistill.engine.config.options import load
from selfdistill.engine.config.schema import Config
from selfdistill.engine.models.images.networks import ImageAutoencoder, Normalize
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.vit_mae import ViTMAE
from selfdistill.engine.models.images.weights import Pretrained, load_pretrained
from selfdistill.engine.runtime import precision, zero
from selfdistill.engine.runtime.allocator import release
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training.engine import build_engine
from selfdistill.engine.training.loop import Step, take_step
from selfdistill.engine.training.modalities.image import ImageModality
from selfdistill.engine.training.objectives import (
    ClassifyObjective,
    DistillObjective,
    FeatureExtractor,
)
from selfdistill.engine.training.teacher import frozen
from selfdistill.launcher.examples import __main__ as example
from tests.kit.launches import ROOT, metrics, run_cases

CPU = torch.device("cpu")

#: As many parameters as ViT-B's auto-encoder: 12 blocks and 8 of the decoder.
DEEP = Shape(16, 4, 24, 12, 2, 48, 16, 8, 2, 32)


# What auto means


def test_auto_takes_bf16_where_there_are_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for units, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision, "fast_bf16", lambda _, units=units: units)
        assert precision.choose("auto", None, CPU)[0] == expected
        assert precision.choose("auto", "fp32", CPU) == ("fp32", "as the run began")
        assert precision.choose("auto", "bf16", CPU)[0] == "bf16"
        assert ("slow" in precision.choose("auto", "bf16", CPU)[1]) == (not units)
        assert precision.choose("fp16", "bf16", CPU) == ("fp16", "")


@pytest.mark.parametrize(
    ("vendor", "flags", "expected"),
    [
        ("AuthenticAMD", "fpu avx2 avx512f avx512_bf16", True),
        ("GenuineIntel", "fpu avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "fpu avx2 avx512f avx512_bf16", False),
        ("AuthenticAMD", "fpu avx2 avx512f", False),
    ],
)
def test_units_of_a_processor(
    vendor: str, flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\nbugs\t\t: none\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: told)
    assert precision.fast_bf16(CPU) is expected


def test_a_run_keeps_the_precision_it_began_with(
    tmp_path: Path,
    ranks: Ranks,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for began, units in (("bf16", False), ("fp32", True)):
        folder = tmp_path / began
        folder.mkdir()
        (folder / CONFIG).write_text(f'precision = "{began}"\n')
        monkeypatch.setattr(precision, "fast_bf16", lambda _, units=units: units)
        config = load({"output": str(folder), "watchdog": 0})
        open_run(config, ranks).close()
        assert (config.precision, config.zero) == (began, "zero0")
        assert f"precision {began}: as the run began" in capsys.readouterr().out
        assert tomllib.loads(config.toml())["precision"] == began


# bf16


def shipped() -> Pretrained:
    return load_pretrained(str(ROOT / "recipes" / "vit_small"))


def autoencoder(shape: Shape) -> ImageAutoencoder:
    torch.manual_seed(0)
    return ImageAutoencoder(ViTMAE(shape), Normalize((0.5,) * 3, (0.5,) * 3))


def test_a_feature_leaves_its_layer_norm_unrounded() -> None:
    """A student with its teacher's weights has their very feature, and it is no bf16 number."""
    base = shipped()
    kind = ImageModality(Run(Config(), Ranks(0, 0, 1, CPU), Path()))
    student = kind.autoencoder(base)
    teacher = frozen(FeatureExtractor(kind.encoder(base), "cls"), CPU, torch.bfloat16)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    with precision.autocast(CPU, torch.bfloat16):
        target = teacher(images=images)
        out = DistillObjective(student, mae_weight=0.0)(target, images=images)
    assert out["distill"].item() == 0.0
    assert target.dtype == torch.float32
    assert (target != target.bfloat16().float()).any()
    whole = FeatureExtractor(kind.encoder(base), "cls")(images=images)
    assert (target - whole).pow(2).sum(-1).mean() < 1e-3 * whole.pow(2).sum(-1).mean()


def test_attention_on_a_cpu_is_in_fp32() -> None:
    """Backward it takes a third of the time that it takes in bf16."""
    seen: set[torch.dtype] = set()

    class Kinds(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if "scaled_dot_product" in func.__name__:
                seen.update(a.dtype for a in args if isinstance(a, Tensor))
            return func(*args, **(kwargs or {}))

    batch = {"images": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}
    batch |= {"noise": torch.rand(2, 16), "target": torch.randn(2, 24)}
    with Kinds():
        with precision.autocast(CPU, torch.bfloat16):
            loss = DistillObjective(autoencoder(DEEP))(**batch)["loss"]
        loss.backward()
    assert seen == {torch.float32}


def test_a_frozen_module_leaves_what_embeddings_share_in_fp32() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.own = nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(4, 4)
            self.head.weight = self.embed.weight

    found = frozen(Tied(), CPU, torch.bfloat16)
    assert found.embed.weight.dtype == torch.float32
    assert found.own.weight.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
def test_weights_and_gradients_are_fp32(name: str, ranks: Ranks) -> None:
    """Trained weights start from the source's own bits, and micro-batches add up in fp32."""
    config = Config.model_validate(
        {"precision": "bf16", "zero": name, "distill": {"batch": 2, "accumulation": 2}}
    )
    run = Run(config, ranks, Path())
    model = autoencoder(Shape(16, 4, 24, 2, 2, 48, 16, 1, 2, 32))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    engine = build_engine(run, DistillObjective(model), "distill", config.distill)
    now = zero.full_state(engine.module.model, keep=True)
    assert all(torch.equal(now[n], before[n]) for n in before)
    how = training_state.layout(engine, 0)
    assert all(flat.dtype == torch.float32 for flat in how.flats())
    seen: set[torch.dtype] = set()
    handles = [
        p.register_post_accumulate_grad_hook(lambda p: seen.add(p.grad.dtype))
        for p in engine.module.parameters()
        if p.requires_grad
    ]
    assert engine.communication_data_type in (torch.float32, None)
    batch = {"images": torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)}
    batch |= {"noise": torch.rand(1, 16), "target": torch.randn(1, 24)}
    for _ in range(2):
        engine.backward(engine(**batch)["loss"])
        engine.step()
    for handle in handles:
        handle.remove()
    assert seen <= {torch.float32}
    engine.destroy()


@pytest.mark.multi
def test_thirty_steps_in_bf16_are_within_a_percent_of_fp32(tmp_path: Path) -> None:
    """The shipped small model on digits; one teacher for both.

    The mean over the steps: AdamW's first steps, whose size the gradient's sign alone decides, make
    up to 2% of what rounding leaves of small gradients.
    """
    example.main("images", str(tmp_path / "digits"))
    shared: dict[str, object] = {
        "recipe": "quickstart",
        "data": str(tmp_path / "digits"),
        "model": str(ROOT / "recipes" / "vit_small"),
        "teacher": str(tmp_path / "fp32" / "pretrain" / "export"),
        "finetune.start": "model",
        "finetune.seeds": 1,
        "zero": "auto",
        "distill.lr": 1.5e-4,
        # Processors without units for it take minutes for all of a set in bf16.
        "teacher.mode": "replicated",
        "finetune.test": False,
        "finetune.train_scored": 0,
    }
    for stage in ("pretrain", "distill", "finetune"):
        shared |= {f"{stage}.steps": 30, f"{stage}.batch": 8}
    run_cases(
        tmp_path / "cases",
        [
            shared | {"stage": stage, "precision": name, "output": str(tmp_path / name)}
            for stage in ("pretrain", "distill", "finetune")
            for name in ("fp32", "bf16")
        ],
        ranks=1,
    )
    bounds = {
        "pretrain": {"loss": 0.01, "mae": 0.01},
        "distill-1": {"loss": 0.01, "mae": 0.01, "distill": 0.02},
        "finetune-model": {"loss": 0.01},
    }
    for stage, terms in bounds.items():
        full, low = (metrics(tmp_path / name / stage)[:30] for name in ("fp32", "bf16"))
        for term, bound in terms.items():
            key = f"loss/{term}"
            apart = [abs(b[key] / a[key] - 1) for a, b in zip(full, low, strict=True)]
            assert len(apart) == 30
            assert 0 < sum(apart) / 30 < bound, (stage, term, apart)
            assert max(apart) < 5 * bound, (stage, term, apart)


# What a step asks of the device


#: What makes no kernel: views, and memory that is not filled.
_FREE = {
    *("view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "split"),
    *("split_with_sizes", "unbind", "unsqueeze", "squeeze", "detach", "alias", "as_strided"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_to_copy.dtype"),
}


class Asked(TorchDispatchMode):
    """Counts the kernels that operations would launch, and the waits for their results."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "equal"):
            place = traceback.extract_stack(limit=8)[:-1]
            self.waits.append(" < ".join(f"{f.name}:{f.lineno}" for f in reversed(place)))
        elif name not in _FREE:
            self.kernels += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Counts within it, with a CPU that DeepSpeed takes for a device one has to wait for (a fake).

    A real CPU answers that data dependencies resolve themselves, and its synchronize does nothing.
    """
    from deepspeed.accelerator import get_accelerator

    device, found = get_accelerator(), Asked()
    with monkeypatch.context() as patch:
        patch.setattr(device, "synchronize", lambda *_: found.waits.append("synchronize"))
        patch.setattr(device, "resolves_data_dependency", lambda: False)
        with found:
            yield found


def step_of(ranks: Ranks, stage: str, **options: Any) -> tuple[Any, Any]:
    """A stage's step on a network with as many tensors as ViT-B's, and its engine."""
    config = load({"precision": "bf16", f"{stage}.batch": 2, **options})
    run = Run(config, ranks, Path())
    model: Any = autoencoder(DEEP)
    objective: nn.Module = DistillObjective(model)
    if stage == "finetune":
        config.finetune.dropout = 0.0
        base = Pretrained.fresh(ViTMAE(DEEP))
        model = ImageModality(run).classifier(base, ["a", "b"], seed=0)
        objective = ClassifyObjective(model)
    plan = getattr(config, stage)
    engine = build_engine(run, objective, stage, plan)
    batch: dict[str, Tensor] = {"images": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}
    if stage == "finetune":
        batch["labels"] = torch.tensor([0, 1])
    else:
        batch |= {"noise": torch.rand(2, 16), "target": torch.randn(2, 24)}

    engine.train()
    taken = itertools.count()

    def step(measure: bool = False) -> Step:
        return take_step(
            engine,
            [batch],
            lambda entries: entries,
            plan,
            ranks,
            seed=0,
            taken=next(taken),
            norm_wanted=measure,
        )

    return step, engine


def plain_kernels(engine: Any) -> int:
    """Those of a loop without DeepSpeed around the same module: what there is to launch."""
    objective = engine.module
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    batch = {"images": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}
    batch |= {"noise": torch.rand(2, 16), "target": torch.randn(2, 24)}
    for _ in range(2):  # the first makes the moments
        with Asked() as found:
            with precision.autocast(CPU, torch.bfloat16):
                loss = objective(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return found.kernels


@pytest.mark.parametrize(("name", "most"), [("zero0", 1.01), ("zero1", 1.5), ("zero2", 1.5)])
def test_a_step_waits_for_nothing(
    name: str, most: float, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, engine = step_of(ranks, "distill", zero=name)
    for _ in range(3):
        step()
    with asked(monkeypatch) as found:
        step()
    assert found.waits == []
    # A log step has the gradient's norm, and it alone.
    norm = step(measure=True).norm
    value = engine.get_global_grad_norm() if norm is None else norm
    assert float(value) > 0
    step()
    if name != "zero0":
        assert engine.optimizer._global_grad_norm is None
    release(engine)
    _, engine = step_of(ranks, "distill", zero="zero0")
    plain = plain_kernels(engine)
    assert plain <= found.kernels < most * plain
    release(engine)


def test_an_objective_is_compiled_once() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(DistillObjective(autoencoder(DEEP)), backend=backend)
    batch = {"images": torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)}
    batch |= {"noise": torch.rand(2, 16), "target": torch.randn(2, 24)}
    compiled(**batch)["loss"].backward()
    first = len(graphs)
    for _ in range(2):
        compiled(**batch)["loss"].backward()
    assert first == len(graphs) == 1
    torch.compiler.reset()


def test_deterministic_sets_what_cuda_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_PROTO")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    precision.before_cuda(Config())
    assert not any(name in os.environ for name in names)
    config = Config(deterministic=True)
    precision.before_cuda(config)
    assert [os.environ.pop(name) for name in names] == [":4096:8", "Ring", "Simple"]
    try:
        precision.set_switches(config, CPU)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert not torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        precision.set_switches(Config(), CPU)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()
