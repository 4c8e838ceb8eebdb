"""The one validated configuration of a run: its sections, their defaults and what they exclude."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from selfdistill.data.errors import UserError, redacted
from selfdistill.data.formats.images import MOST_PIXELS
from selfdistill.data.records import BOUND

ROOT = Path(__file__).resolve().parents[2]


class Section(BaseModel):
    """A group of options. Undeclared fields are refused."""

    model_config = ConfigDict(
        extra="forbid", coerce_numbers_to_str=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        if isinstance(value, int) and abs(value) >= BOUND:
            raise ValueError("must be below 2^53")
        return value


class DataSection(Section):
    """Where the samples come from, and how they are read."""

    path: str | None = Field(None, description="folder or URL of a packed data set")
    split: Literal["auto", "train", "unlabelled"] = Field(
        "auto", description="for stages 1 and 2 (auto = unlabelled, if a local folder has it)"
    )
    workers: int | None = Field(
        None, ge=0, description="loader processes per rank (left out: what its cores bear, 0 to 16)"
    )
    partitions: int = Field(1, ge=1, description="partitions of the shards (1 = full shuffle)")
    window: int = Field(0, ge=0, description="shards shuffled together (0 = chosen from the set)")
    cache_dir: str | None = Field(None, description="node-local folder for remote shards")
    cache_gb: float = Field(50.0, gt=0, description="size limit of that folder, GB (1e9 bytes)")
    skip_broken: float = Field(0.0, ge=0, lt=1, description="share of broken samples to skip")
    max_pixels: int = Field(
        MOST_PIXELS, ge=1, description="of an image; beyond, it counts as broken"
    )
    check: Literal["auto", "always", "never"] = Field(
        "auto",
        description="hash shards first (auto = local ones without checksums, to 2 GiB)",
    )


class ShapeSection(Section):
    """Architecture of a model made from scratch (path = "scratch")."""

    image_size: int = Field(64, gt=0)
    patch_size: int = Field(8, gt=0)
    width: int = Field(192, gt=0)
    depth: int = Field(6, gt=0)
    heads: int = Field(3, gt=0)
    decoder_width: int = Field(96, gt=0)
    decoder_depth: int = Field(2, gt=0)
    decoder_heads: int = Field(3, gt=0)


class ModelSection(Section):
    """The pre-trained model, theta_init and phi_init of the paper."""

    path: str | None = Field(
        None, description='hub name, folder, .pth or .safetensors; "scratch" = fresh weights'
    )
    tokenizer: str | None = Field(
        None, description="folder of the tokenizer of a model from scratch"
    )
    image_size: int | None = Field(None, gt=0, description="train at another resolution")
    shape: ShapeSection = Field(default_factory=ShapeSection)


class MaskSection(Section):
    """Masked auto-encoding, the paper's L_MAE."""

    ratio: float = Field(0.75, gt=0, lt=1, description="share of patches that are hidden")
    normalize_pixels: bool = Field(True, description="target pixels normalised per patch")


class TokenSection(Section):
    """Masked language modelling, the paper's L_MAE on text."""

    ratio: float = Field(0.15, gt=0, lt=1, description="probability that a token is masked")
    policy: Literal["mask", "bert"] = Field(
        "mask", description="mask tokens everywhere, or 80% with 10% random, 10% unchanged"
    )
    dropout: float | None = Field(
        None, ge=0, lt=1, description="in stages 1, 2 (none = model's own)"
    )


class TextSection(Section):
    """How texts become token ids."""

    max_length: int | None = Field(None, ge=3, description="tokens (none = the model's limit)")
    bucket: int = Field(32, ge=1, description="lengths are padded to multiples of this")
    packed: bool | None = Field(
        None, description="several texts in a row in place of padding (left out: on GPUs)"
    )


class TeacherSection(Section):
    """The frozen teacher of the distillation stage."""

    path: str | None = Field(None, description="exported model to distil from (default: own run's)")
    mode: Literal["auto", "replicated", "sharded", "cached"] = Field(
        "auto", description="a copy on each rank, ZeRO-3 shards, or a table of its features"
    )
    table_gb: float = Field(16.0, gt=0, description="auto: largest feature table to cache, GiB")


class StageSection(Section):
    """What every stage has: length, batch, optimiser (AdamW, linear decay to 0)."""

    steps: int | None = Field(None, ge=1, description="optimiser steps")
    epochs: float | None = Field(None, gt=0, description="length in passes over the train split")
    batch: int = Field(64, ge=1, description="global batch")
    accumulation: int = Field(1, ge=1, description="micro-batches per step and rank")
    lr: float = Field(1.5e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW, such as 0.9,0.95")
    eps: float = Field(1e-8, gt=0)
    warmup: int = Field(0, ge=0, description="steps of linear warm-up")
    clip: float = Field(0.0, ge=0, description="gradient norm limit (0 = none)")

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("betas")
    @classmethod
    def _below_one(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("both must be at least 0 and below 1")
        return value

    @model_validator(mode="after")
    def _one_length(self) -> StageSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give steps or epochs, one of the two")
        return self

    def length(self, samples: int) -> int:
        """Number of optimiser steps for a train split of `samples`."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * samples / self.batch))

    def check_warmup(self, stage: str, steps: int) -> None:
        """Refuses a warm-up that is as long as the stage.

        Raises:
            UserError: names the option, and a value that fits.
        """
        if self.warmup >= steps:
            raise UserError(
                f"--{stage}.warmup {self.warmup}: the stage has {steps} steps, and the rate would"
                f" never be reached: give fewer, such as {steps // 10}"
            )


class DecoderSection(StageSection):
    """Stage 0: a decoder, on the frozen encoder, for models that come without."""

    steps: int | None = Field(1000, ge=1, description="optimiser steps")
    lr: float = Field(1e-3, gt=0)
    data: str | None = Field(
        None, description="packed data set to learn from (left out: the target's own)"
    )
    auto: bool = Field(True, description="with --stage all, where the model has no decoder")


class PretrainSection(StageSection):
    """Stage 1: further pre-training (Algorithm 2)."""

    steps: int | None = Field(20_000, ge=1, description="optimiser steps")
    objective: Literal["mae", "supcon"] = Field(
        "mae", description="masked auto-encoding, or the supervised contrastive loss on labels"
    )


class DistillSection(StageSection):
    """Stage 2: self-distillation (Algorithm 1, Eq. 3)."""

    steps: int | None = Field(20_000, ge=1, description="optimiser steps")
    feature: Literal["cls", "mean", "tokens"] = Field("cls", description="distilled feature")
    weight: float = Field(1.0, ge=0, description="weight of L_Distill")
    mae_weight: float = Field(1.0, ge=0, description="weight of L_MAE (0 freezes the decoder)")
    match: Literal["feature", "prediction", "weights_l2", "weights_mars"] = Field(
        "feature", description="what L_Distill compares; all but feature are ablations"
    )

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillSection:
        if not self.weight and not self.mae_weight:
            raise ValueError("weight and mae_weight are both 0: give one of them more")
        return self


class FinetuneSection(StageSection):
    """Stage 3: supervised fine-tuning with a fresh head."""

    steps: int | None = Field(10_000, ge=1, description="optimiser steps")
    batch: int = Field(32, ge=1, description="global batch")
    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = Field((0.9, 0.999), description="of AdamW, such as 0.9,0.999")
    warmup: int = Field(500, ge=0, description="steps of linear warm-up")
    clip: float = Field(1.0, ge=0, description="gradient norm limit (0 = none)")
    dropout: float = Field(0.1, ge=0, lt=1)
    flip: bool = Field(True, description="random horizontal flips")
    pool: Literal["cls", "mean"] = Field("cls", description="feature under the classifier")
    start: str = Field(
        "auto",
        description="auto (the last round) | distill | distill-N (a round) | pretrain | model",
    )
    weights: str | None = Field(None, description="exported model to start from, not the run's own")
    seeds: int = Field(1, ge=1, description="repetitions, seeds seed, seed+1, ...")
    eval_every: int = Field(0, ge=0, description="validation interval in steps (0 = at the end)")
    metric: Literal["auto", "accuracy", "macro_f1", "micro_f1"] = Field(
        "auto", description="in tables (auto = the data set's own, or accuracy); all are kept"
    )
    test: bool = Field(True, description="score the test split at the end (false in searches)")
    train_scored: int = Field(
        10_000, ge=0, description="samples of the train split scored at the end (0 = none)"
    )
    regularizer: Literal["none", "recadam", "mars", "r3f"] = "none"

    @field_validator("start")
    @classmethod
    def _known_start(cls, value: str) -> str:
        if not re.fullmatch("auto|model|pretrain|distill(-[1-9][0-9]*)?", value):
            raise ValueError("must be auto, model, pretrain, distill, or distill-N (a round)")
        return value


class RecAdamSection(Section):
    """RecAdam (Chen et al. 2020): Adam with an annealed pull to the pre-trained weights."""

    c: float = Field(5000.0, ge=0, description="strength of the pull")
    k: float = Field(0.1, gt=0, description="lambda(t) = 1 / (1 + exp(-k (t - t0)))")
    t0: float = Field(250.0, ge=0, description="step at which Adam and the pull have equal shares")


class MarsSection(Section):
    """MARS (Gouk et al. 2021): a limit on each row of a weight matrix's way from its start."""

    radius: float = Field(
        4.0, gt=0, allow_inf_nan=True, description="largest absolute row sum of W - W_init"
    )
    head_radius: float = Field(
        20.0, gt=0, allow_inf_nan=True, description="the same of the fresh head, around 0"
    )


class R3FSection(Section):
    """R3F (Aghajanyan et al. 2021): predictions that noise on the embeddings does not change."""

    weight: float = Field(1.0, ge=0, description="of the symmetric KL divergence")
    noise: Literal["uniform", "normal"] = "uniform"
    eps: float = Field(1e-5, ge=0, description="half-width, or standard deviation, of the noise")


class SupConSection(Section):
    """Supervised contrastive further pre-training (Khosla et al. 2020, L_out)."""

    temperature: float = Field(0.1, gt=0)
    projection: int = Field(128, ge=1, description="width of the projection")
    dropout: float = Field(0.1, ge=0, lt=1, description="in the encoder; it makes views differ")


class Config(Section):
    """All settings of a run."""

    stage: Literal["decoder", "pretrain", "distill", "finetune", "all"] = "all"
    recipe: str | None = Field(None, description="name in recipes/, or a TOML file")
    kind: Literal["auto", "image", "text"] = Field(
        "auto", description="what a recipe is for; other data are refused"
    )
    output: str | None = Field(None, description="run folder")
    data: DataSection = Field(default_factory=DataSection)
    model: ModelSection = Field(default_factory=ModelSection)
    mae: MaskSection = Field(default_factory=MaskSection)
    mlm: TokenSection = Field(default_factory=TokenSection)
    text: TextSection = Field(default_factory=TextSection)
    teacher: TeacherSection = Field(default_factory=TeacherSection)
    decoder: DecoderSection = Field(default_factory=DecoderSection)
    pretrain: PretrainSection = Field(default_factory=PretrainSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    finetune: FinetuneSection = Field(default_factory=FinetuneSection)
    supcon: SupConSection = Field(default_factory=SupConSection)
    recadam: RecAdamSection = Field(default_factory=RecAdamSection)
    mars: MarsSection = Field(default_factory=MarsSection)
    r3f: R3FSection = Field(default_factory=R3FSection)
    rounds: int = Field(1, ge=1, description="rounds of self-distillation (T' in the paper)")
    compare: bool = Field(
        False,
        description="also fine-tune model, pretrain and each round (with --stage all)",
    )
    seed: int = Field(0, ge=0, lt=2**31)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto = as the run began, else bf16 where the device has units for it"
    )
    tf32: bool = Field(True, description="on GPUs: fp32 matrix products in TF32")
    deterministic: bool = Field(
        False, description="on GPUs: the same run gives the same bits again (slower)"
    )
    compile: bool = Field(False, description="torch.compile (a first step of a minute or more)")
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        "default", description="of torch.compile (reduce-overhead = CUDA graphs, for small batches)"
    )
    zero: str = Field(
        "auto",
        description="name in ds_configs/, or a JSON file (auto = zero1; zero0 for one process)",
    )
    resume: str = Field("auto", description="auto | never")
    overwrite: bool = Field(False, description="delete what the stage left before")
    save_every: int = Field(1000, ge=0, description="checkpoint interval in steps (0 = none)")
    keep: int = Field(2, ge=1, description="checkpoints kept")
    keep_finished: bool = Field(True, description="also those of stages that are complete")
    log_every: int = Field(50, ge=1, description="steps between log lines")
    log_samples: bool = Field(False, description="write each step's sample ids, for audits")
    watchdog: float = Field(
        900, ge=0, description="seconds without progress after which a hung rank is ended (0 = off)"
    )
    picture_every: int = Field(1000, ge=0, description="steps between pictures (0 = none)")
    local_rank: int = Field(-1, description="set by the launcher")
    _given: frozenset[str] = PrivateAttr(frozenset())

    def given(self, section: str) -> bool:
        """Whether the command line, and not a recipe, names a section's path (--model PATH)."""
        return bool({section, f"{section}.path"} & self._given)

    @model_validator(mode="after")
    def _compared(self) -> Config:
        if self.compare and self.stage != "all":
            raise ValueError("compare is for --stage all: leave it out, or run all stages")
        return self

    @field_validator("resume")
    @classmethod
    def _resume(cls, value: str) -> str:
        if value not in ("auto", "never"):
            raise ValueError("must be auto or never")
        return value

    def check_warmups(self) -> None:
        """Refuses a warm-up that is as long as its stage, before the first of several is trained.

        What is given in epochs is known with the data, at the stage's own start.

        Raises:
            UserError: see `StageSection.check_warmup`.
        """
        sections = {"pretrain": self.pretrain, "distill": self.distill, "finetune": self.finetune}
        for stage, section in sections.items():
            if self.stage in (stage, "all") and section.steps is not None:
                section.check_warmup(stage, section.steps)

    def toml(self) -> str:
        """This configuration as TOML, which `--recipe` reads back; without secrets of addresses."""
        return redacted(tomli_w.dumps(self.model_dump(exclude_none=True, exclude={"local_rank"})))
