"""Stage 0: a decoder for an encoder that has none.

Most pre-trained encoders come without the decoder that masked auto-encoding needs (phi_init). A
random one sends random gradients into the encoder in stage 1's first steps, and what that was
pre-trained for is lost. Here the encoder is frozen, and the decoder learns alone. It is kept, and
found again by what it was made of: one decoder serves all data sets.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from selfdistill.data.files import refuse_open
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.checkpoints.results import RESULT, read_result
from selfdistill.engine.checkpoints.state import BEFORE, FREE
from selfdistill.engine.runtime.distributed import main_only
from selfdistill.engine.stages.pretrain import DECODER as NAME
from selfdistill.engine.stages.pretrain import Masked
from selfdistill.engine.stages.splits import split_of, unlabelled_split
from selfdistill.engine.training.loop import run_stage
from selfdistill.engine.training.modalities import modality_of
from selfdistill.engine.training.modalities.base import Modality
from selfdistill.engine.training.objectives import MaskedObjective
from selfdistill.engine.training.stage import Stage


class Decoder(Masked):
    """L_MAE of the decoder alone, on a frozen encoder.

    Args:
        run: the launch.
        base: weights without a decoder.
        modality: of the inputs.
    """

    section = "decoder"

    def __init__(self, run: Run, base: Any, modality: Modality) -> None:
        train = _source(run)
        record = {"model": base.sha256} | modality.record(base)
        seed = run.config.seed
        super().__init__(run, NAME, train, modality, base, seed=seed, record=record)

    def build(self) -> nn.Module:
        """See `Stage`. Nothing of the encoder's forward is kept for a backward: it has none."""
        self.model = self.modality.autoencoder(self.base, dropout=0.0)
        self.model.encoder.requires_grad_(False)
        return MaskedObjective(self.model)


def _source(run: Run) -> Manifest:
    """What the decoder learns from: general data, or the target's own."""
    config = run.config
    if config.decoder.data is None:
        return unlabelled_split(run)
    return split_of(run, config.decoder.data)


def train_decoder(run: Run) -> None:
    """Stage 0, where the model has no decoder; where it has one, --stage decoder says so."""
    config = run.config
    if config.stage == "all" and (
        not config.decoder.auto
        or config.model.path == "scratch"  # made with a decoder; making it counts words
    ):
        return
    if main_only(run.ranks, lambda: _begun_without(run)):
        if config.stage == NAME:
            run.info(
                f"{NAME}: {run.folder / 'pretrain'} began without: it goes on so; to begin again"
                " with one, delete that folder first"
            )
        return
    modality = modality_of(run, unlabelled_split(run) if config.data.path else _source(run))
    base = modality.load()
    if base.decoder is not None:
        if config.stage == NAME:
            run.info(f"{NAME}: {base.origin} has one: nothing to do; go on with --stage pretrain")
        return
    stage = Decoder(run, base, modality)
    kept = _shelf() / _key(stage)
    if main_only(run.ranks, lambda: _take(run, kept)):
        run.info(f"{NAME}: found again ({kept}): made of the same encoder, data and settings")
        return  # `--resume never` would take it for one that this run had left
    run_stage(stage)
    main_only(run.ranks, lambda: _keep(run, kept))


def _begun_without(run: Run) -> bool:
    """Whether stage 1 began with another decoder: it goes on with that."""
    if run.config.overwrite and run.config.stage == "all":  # it is done again, too
        return False
    left = (RESULT, "checkpoints", "metrics.jsonl")  # of a stage that took a step
    begun = any((run.folder / "pretrain" / name).exists() for name in left)
    return begun and not (run.folder / NAME).exists()


def _shelf() -> Path:
    """Where decoders are kept: $SELFDISTILL_DECODERS, or in the user's cache folder."""
    own = os.environ.get("SELFDISTILL_DECODERS")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(own) if own else Path(base) / "selfdistill" / "decoders"


def _key(stage: Stage) -> str:
    """Hash of all that a decoder depends on: encoder, data, settings; not the layout."""
    record = {
        k: v
        for k, v in stage.record.items()
        # Decoders of before there was an option are found again.
        if k.rsplit(".", 1)[-1] not in FREE and (k not in BEFORE or v != BEFORE[k])
    }
    content = json.dumps(record | {"data": stage.train.hash}, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def _take(run: Run, kept: Path) -> bool:
    """Copies a decoder that was made before into a run that has not begun one."""
    target = run.folder / NAME
    refuse_open(kept.parent, "the folder of decoders")
    if target.exists() or not (kept / RESULT).is_file() or run.config.overwrite:
        return False
    read_result(kept / RESULT)
    _copy(kept, target)
    return True


def _keep(run: Run, kept: Path) -> None:
    """Keeps the run's decoder for other runs; a full disk costs no run."""
    if kept.exists():
        return
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        _copy(run.folder / NAME, kept)
    except OSError as error:
        run.info(f"note: the decoder is not kept for other runs ({error.strerror}): {kept}")


def _copy(source: Path, target: Path) -> None:
    """Copies export and result, whole or not at all."""
    draft = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=target.parent))
    try:
        shutil.copytree(source / "export", draft / "export")
        shutil.copyfile(source / RESULT, draft / RESULT)
        draft.chmod(0o755)
        draft.rename(target)
    except OSError:
        shutil.rmtree(draft, ignore_errors=True)
        if not target.exists():  # else another run was first
            raise
