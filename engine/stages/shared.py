"""A teacher that shares the student's frozen weights: theta_init, with another stage's updates.

Under `--adapt lora` teacher and student differ in their updates alone. A stage leaves its updates
beside its export; the next one puts them in the place of the student's for the teacher's pass, and
needs no second encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.func import functional_call

from selfdistill.engine.checkpoints.files import write_bytes
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.models.adapters import added
from selfdistill.engine.models.source import read_safetensors
from selfdistill.engine.runtime import zero
from selfdistill.engine.runtime.precision import autocast
from selfdistill.engine.training.objectives import Feature, pick
from selfdistill.engine.training.teacher import view

#: In a stage's folder, beside export/.
FILE = "updates.safetensors"


def keep_updates(run: Run, stage: str, encoder: nn.Module) -> None:
    """Leaves a stage's updates in its folder, by name in the encoder. Every rank calls it."""
    if run.config.adapt != "lora":
        return
    state = zero.full_state(encoder, keep=run.ranks.main, trained=True)
    if run.ranks.main:
        write_bytes(run.folder / stage / FILE, save(state, metadata={"format": "pt"}))


def updates_of(
    run: Run, export: str, student: nn.Module, taught: Any, base: Any
) -> dict[str, Tensor] | None:
    """A teacher's updates, if it is theta_init with these; None where it needs a copy of its own.

    Args:
        run: the launch.
        export: the teacher's folder, beside which its updates lie.
        student: the student's encoder, whole.
        taught: the teacher's weights.
        base: theta_init.
    """
    config, file = run.config, Path(export).with_name(FILE)
    # ZeRO-3 gathers weights by what they are, and would not know those that take their place.
    cut = zero.stage_of(zero.read(config.zero)) == 3
    if config.adapt != "lora" or cut or not file.is_file():
        return None
    found = read_safetensors(file)
    if found.keys() != {n for n, p in student.named_parameters() if p.requires_grad}:
        return None
    try:
        whole = added(base.encoder, found, config.lora)
    except RuntimeError:  # other shapes
        return None
    theirs = taught.encoder
    same = whole.keys() == theirs.keys() and all(
        whole[name].shape == value.shape and torch.allclose(whole[name], value, atol=1e-6)
        for name, value in theirs.items()
    )
    return found if same else None


class Shared:
    """See `training.teacher.Teacher`: the student's own network, with the teacher's updates.

    Args:
        model: the student, whole on each rank.
        updates: the teacher's, by name in the encoder.
        feature: that is distilled.
        names: entries of a batch that make the unmasked view.
        run: the launch.
    """

    mode: Literal["replicated", "sharded", "cached"] = "replicated"

    def __init__(
        self,
        model: Any,
        updates: Mapping[str, Tensor],
        feature: Feature,
        names: tuple[str, ...],
        run: Run,
    ) -> None:
        self.extractor, self.names = _Extractor(model, feature), names
        self.device, self.dtype = run.ranks.device, run.dtype
        whole = torch.float16 if run.dtype == torch.float16 else torch.float32
        modules = self.extractor.named_modules()
        place = next(name for name, module in modules if module is model.encoder)
        self.updates = {f"{place}.{n}": v.to(self.device, whole) for n, v in updates.items()}

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """See `Teacher`."""
        entries, trains = view(batch, self.names, self.device), self.extractor.model.training
        self.extractor.eval()
        with autocast(self.device, self.dtype):
            features: Tensor = functional_call(
                self.extractor, self.updates, kwargs=entries, tie_weights=False
            )
        self.extractor.train(trains)
        return features

    def close(self) -> None:
        """See `Teacher`: the weights are the student's."""


class _Extractor(nn.Module):
    """The unmasked view's feature, fp32, of a network that goes on training."""

    def __init__(self, model: Any, feature: Feature) -> None:
        super().__init__()
        self.model, self.feature = model, feature

    def forward(self, **batch: Tensor) -> Tensor:
        tokens, counts = self.model.encode(cls_only=self.feature == "cls", **batch)
        return pick(tokens, self.feature, counts).float()
