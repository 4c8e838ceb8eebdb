"""What a plan rests on: the run's stages, its model at work, its data, the device."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from selfdistill.data.errors import UserError
from selfdistill.data.shards.joined import mixed
from selfdistill.data.shards.manifest import Manifest, is_remote
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.schema import Config
from selfdistill.engine.config.stages import FinetuneSection, KeptSection, StageSection
from selfdistill.engine.monitoring.flops import Stage, TeacherMode
from selfdistill.engine.runtime import zero
from selfdistill.engine.runtime.distributed import Ranks
from selfdistill.engine.training import teacher
from selfdistill.engine.training.modalities.base import settle_pooling
from selfdistill.launcher.doctor.devices import Device, best_precision, find
from selfdistill.launcher.plan import Options
from selfdistill.launcher.plan.known import IMAGES, TEXTS
from selfdistill.launcher.plan.workload import ImageWork, Workload


@dataclass(frozen=True)
class Job:
    """One stage of the run.

    Attributes:
        name: as its folder.
        stage: which.
        section: its settings.
        repeats: rounds of distillation; seeds and starts of fine-tuning.
        samples: of the split that it learns from.
        epoch: samples of a pass, fewer or more than these where sets are mixed.
        sample_bytes: mean bytes of a sample in the shards; None where there are none.
        micro: samples of a device's micro-batch.
        anchored: whether RecAdam keeps the weights that it began with.
    """

    name: str
    stage: Stage
    section: StageSection
    repeats: int
    samples: int
    epoch: int
    sample_bytes: float | None
    micro: int
    anchored: bool = False

    @property
    def steps(self) -> int:
        """Optimiser steps of one repeat, as the engine counts them."""
        return self.section.length(self.epoch)

    @property
    def copies(self) -> int:
        """Copies of the weights that are kept: their average, the best of them."""
        averaged = isinstance(self.section, FinetuneSection) and self.section.ema > 0
        best = isinstance(self.section, KeptSection) and self.section.keep == "best"
        return averaged + best

    @property
    def saved(self) -> int:
        """Copies of the weights in a checkpoint."""
        return self.copies + self.anchored

    @property
    def times(self) -> str:
        """The repeats, as a factor in an arithmetic."""
        return f" x {self.repeats}" if self.repeats > 1 else ""


@dataclass(frozen=True)
class Plan:
    """All that the tables show.

    Attributes:
        options: of plan.
        config: of the run.
        device: that it is planned for.
        work: the model at work.
        jobs: the stages.
        classes: outputs of the classifier.
        mode: of the teacher.
        manifests: of the splits that stages learn from; empty without --data.
    """

    options: Options
    config: Config
    device: Device
    work: Workload
    jobs: list[Job]
    classes: int
    mode: TeacherMode
    manifests: dict[str, Manifest]

    @property
    def nodes(self) -> int:
        """Nodes that the devices fill."""
        return math.ceil(self.options.devices / self.options.per_node)

    @property
    def product(self) -> int:
        """Bytes of a value of a matrix product."""
        return zero.DTYPES[self.config.precision].itemsize

    @property
    def size(self) -> int:
        """Bytes of a weight, of its gradient, and of both on their way between ranks."""
        return 2 if self.config.precision == "fp16" else 4

    def seconds(self, flops: float) -> float:
        """Time of so many FLOPs on all devices at the stated MFU."""
        return flops / (self.options.devices * self.device.peak * self.options.mfu)

    def flops(self, job: Job) -> float:
        """FLOPs of one repeat of a stage."""
        one = self.work.flops(job.stage, self.mode, self.classes)
        return job.steps * job.section.batch * one


def prepare(options: Options, config: Config) -> Plan:
    """Finds out what the tables need.

    Raises:
        UserError: data, model, device or batch that do not fit, or are not named.
    """
    asked = config.precision
    precision = best_precision(options.device) if asked == "auto" else asked
    named = zero.chosen(config.zero, options.devices, precision)
    config = config.model_copy(update={"zero": named, "precision": precision})
    device = find(
        options.device,
        zero.DTYPES[precision],
        tf32=config.tf32,
        memory_gb=options.memory_gb,
        tflops=options.tflops,
    )
    manifests = _manifests(config)
    if not manifests and options.samples is None:
        raise UserError("--data is missing: a packed data set, or --samples N without one")
    work = _work(options, config, manifests)
    settle_pooling(config, work.modality, work.base)
    labelled = manifests.get("train")
    classes = options.classes or (len(labelled.classes) if labelled else 10)
    jobs = [
        _job(name, stage, repeats, options, config, manifests)
        for name, stage, repeats in _stages(config, work)
    ]
    work.rows = next((job.samples for job in jobs if job.stage == "pretrain"), 0)
    if labelled and not classes:
        if config.stage == "finetune":
            raise UserError(
                f"{labelled.root} has no labels: fine-tuning needs a set packed with its classes"
            )
        jobs = [job for job in jobs if job.stage != "finetune"]
    shape = work.feature(config.distill.settled)
    samples = next((job.samples for job in jobs if job.stage == "distill"), 0)
    needed = None if shape is None else teacher.table_bytes(samples, shape)
    folder = Path(config.output or ".").absolute() / "distill-1" / "teacher"
    mode: Any = teacher.choose(config.teacher.mode, needed, config, folder)
    return Plan(options, config, device, work, jobs, classes, mode, manifests)


def _stages(config: Config, work: Workload) -> list[tuple[str, Stage, int]]:
    """Name, stage and repeats of what --stage runs."""
    if config.stage == "decoder" and work.whole:
        raise UserError(
            f"{config.model.path} has a decoder, stage 0 has nothing to do: plan another --stage"
        )
    starts = 2 + config.rounds if config.stage == "all" and config.compare else 1
    found: list[tuple[str, Stage, int]] = [
        ("pretrain", "pretrain", 1),
        ("distill", "distill", config.rounds),
        ("finetune", "finetune", starts * config.finetune.seeds),
    ]
    if not work.whole and (config.decoder.auto or config.stage == "decoder"):
        found.insert(0, ("decoder", "decoder", 1))
    return [entry for entry in found if config.stage in (entry[1], "all")]


def _manifests(config: Config) -> dict[str, Manifest]:
    """The splits that stages learn from: `train`, and `unlabelled` where stages 1 and 2 take it."""
    path, cache, split = config.data.path, config.data.cache_dir, config.data.split
    if path is None:
        return {}
    found = {}
    if split == "unlabelled" or (split == "auto" and _unlabelled(path)):
        found["unlabelled"] = Manifest.load_split(path, "unlabelled", cache)
    if config.stage in ("finetune", "all") or not found:
        found["train"] = Manifest.load_split(path, "train", cache)
    if config.data.mix:

        def load(place: str) -> Manifest:
            there = "unlabelled" if split == "auto" and _unlabelled(place) else split
            return Manifest.load_split(place, "train" if there == "auto" else there, cache)

        first = found.get("unlabelled") or found["train"]
        found["unlabelled"] = mixed(first, config.data.mix, load)
    return found


def _unlabelled(path: str) -> bool:
    return not is_remote(path) and (Path(path) / "unlabelled").is_dir()


def _work(options: Options, config: Config, manifests: dict[str, Manifest]) -> Workload:
    manifest = manifests.get("unlabelled") or manifests.get("train")
    kind = manifest.kind if manifest else config.kind
    if kind == "auto":
        kind = "text" if config.model.path in TEXTS else "image"
        if config.model.path not in (*TEXTS, *IMAGES):
            raise UserError("--kind is missing: image or text, or give --data")
    if config.kind not in ("auto", kind):
        raise UserError(
            f"{config.recipe or 'this configuration'} is a recipe for {config.kind}s,"
            f" {config.data.path} holds {kind}s: take another --recipe, or other --data"
        )
    run = Run(config, Ranks(0, 0, 1, torch.device("cpu")), Path(config.output or "."))
    if kind == "text":
        from selfdistill.launcher.plan.workload_text import TextWork

        return TextWork(run, options.tokens, manifest)
    work = ImageWork(run)
    if manifest:
        work.modality.check(manifest, work.base)
    return work


def _job(
    name: str,
    stage: Stage,
    repeats: int,
    options: Options,
    config: Config,
    manifests: dict[str, Manifest],
) -> Job:
    section: StageSection = getattr(config, stage)
    # The check of the batch alone: another device than this machine's has the precision.
    plain = config.model_copy(update={"precision": "fp32"})
    content = zero.training_config(plain, section, options.devices)
    train = manifests.get("train")
    manifest = train if stage == "finetune" else manifests.get("unlabelled", train)
    general = config.decoder.data if stage == "decoder" else None
    if general is not None:
        split = config.data.split
        if split == "auto":
            split = "unlabelled" if _unlabelled(general) else "train"
        manifest = Manifest.load_split(general, split, config.data.cache_dir)
    samples, size = options.samples, None
    if manifest:
        samples = manifest.samples
        size = sum(s.bytes for s in manifest.shards) / max(1, samples)
    assert samples is not None
    epoch = manifest.epoch(manifest.counts) if manifest else samples
    micro = content["train_micro_batch_size_per_gpu"]
    pulled = config.finetune.regularizer == "recadam" and config.recadam.c > 0
    anchored = stage == "finetune" and pulled
    return Job(name, stage, section, repeats, samples, epoch, size, micro, anchored)
