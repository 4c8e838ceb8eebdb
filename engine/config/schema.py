"""The one validated configuration of a run: its sections, and what they exclude."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import Field, PrivateAttr, field_validator, model_validator

from selfdistill.data.errors import UserError, redacted
from selfdistill.engine.config.sections import (
    DataSection,
    DietSection,
    LoraSection,
    MarsSection,
    MaskSection,
    ModelSection,
    ProbeSection,
    R3FSection,
    RecAdamSection,
    Section,
    SupConSection,
    TeacherSection,
    TextSection,
    TokenSection,
)
from selfdistill.engine.config.stages import (
    DecoderSection,
    DistillSection,
    FinetuneSection,
    PretrainSection,
)

#: Programs that get a stage's figures (`engine.monitoring.loggers`).
LOGGERS = ("tensorboard", "trackio", "wandb", "mlflow")
ROOT = Path(__file__).resolve().parents[2]


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
    probe: ProbeSection = Field(default_factory=ProbeSection)
    adapt: Literal["full", "attention", "lora"] = Field(
        "full",
        description="what stages 1 and 2 train of the encoder: all, attention, low-rank updates",
    )
    lora: LoraSection = Field(default_factory=LoraSection)
    supcon: SupConSection = Field(default_factory=SupConSection)
    diet: DietSection = Field(default_factory=DietSection)
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
    checkpoint_activations: bool = Field(
        False, description="keep the layers' inputs alone, compute the rest anew: less memory"
    )
    zero: str = Field(
        "auto",
        description="name in ds_configs/, or a JSON file (auto = zero1; zero0 for one process)",
    )
    resume: str = Field("auto", description="auto | never")
    overwrite: bool = Field(False, description="delete what the stage left before")
    save_every: int = Field(1000, ge=0, description="checkpoint interval in steps (0 = none)")
    save_async: bool | None = Field(
        None, description="write checkpoints while the steps go on (left out: on GPUs)"
    )
    save_local: str | None = Field(
        None, description="folder on each node's own disk, for more frequent checkpoints"
    )
    save_local_every: int | None = Field(
        None, ge=1, description="interval in steps of those, below save_every"
    )
    keep: int = Field(2, ge=1, description="checkpoints kept")
    keep_finished: bool = Field(True, description="also those of stages that are complete")
    log_every: int = Field(50, ge=1, description="steps between log lines")
    logger: str = Field(
        "tensorboard", description="programs that get the figures: tensorboard,trackio,wandb,mlflow"
    )
    log_samples: bool = Field(False, description="write each step's sample ids, for audits")
    watchdog: float = Field(
        900, ge=0, description="seconds without progress after which a hung rank is ended (0 = off)"
    )
    picture_every: int = Field(1000, ge=0, description="steps between pictures (0 = none)")
    local_rank: int = Field(-1, description="set by the launcher")
    _given: frozenset[str] = PrivateAttr(frozenset())

    @property
    def typed(self) -> frozenset[str]:
        """The options that the command line gives, and not a recipe."""
        return self._given

    def given(self, section: str) -> bool:
        """Whether the command line, and not a recipe, names a section's path (--model PATH)."""
        return bool({section, f"{section}.path"} & self._given)

    @model_validator(mode="after")
    def _compared(self) -> Config:
        if self.compare and self.stage != "all":
            raise ValueError("compare is for --stage all: leave it out, or run all stages")
        if self.compare and self.finetune.start != "auto":
            raise ValueError(
                f"compare fine-tunes from all starts: leave out finetune.start"
                f" {self.finetune.start}, or compare"
            )
        if self.finetune.weights is not None:
            if self.stage == "all":
                raise ValueError(
                    "finetune.weights is where fine-tuning starts, and the stages before would be"
                    " for nothing: take --stage finetune, or leave it out"
                )
            if self.finetune.start != "auto":
                raise ValueError(
                    f"finetune.weights and finetune.start {self.finetune.start} name two starts:"
                    " leave out one"
                )
        return self

    @model_validator(mode="after")
    def _graphs(self) -> Config:
        for stage in ("decoder", "pretrain", "distill", "finetune"):
            parts = getattr(self, stage).accumulation
            if self.compile and self.compile_mode != "default" and parts > 1:
                raise ValueError(
                    f"compile_mode {self.compile_mode}: not with {stage}.accumulation {parts}: its"
                    " CUDA graphs write each micro-batch's gradients over those before"
                )
        return self

    @model_validator(mode="after")
    def _saved_locally(self) -> Config:
        every = self.save_local_every
        if (self.save_local is None) != (every is None):
            raise ValueError("save_local and save_local_every go together: give both, or neither")
        if every is not None and every >= self.save_every:
            raise ValueError(
                f"save_local_every {every} must be below save_every, which is {self.save_every}:"
                " a node's own disk is lost with the node"
            )
        return self

    @property
    def loggers(self) -> list[str]:
        """The programs that `logger` names."""
        return self.logger.split(",")

    @field_validator("logger", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("logger")
    @classmethod
    def _known_loggers(cls, value: str) -> str:
        names = [name.strip() for name in value.split(",")]
        if len(set(names)) < len(names) or not set(names) <= set(LOGGERS):
            raise ValueError(f"must be of {', '.join(LOGGERS)}, each once, with commas between")
        for name in names:
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:  # a folder of that name is no package
                raise ValueError(f"{name} is not installed: pip install {name}, or leave it out")
        return ",".join(names)

    @field_validator("resume")
    @classmethod
    def _resume(cls, value: str) -> str:
        if value not in ("auto", "never"):
            raise ValueError("must be auto or never")
        return value

    def place(self) -> Path:
        """The run's folder.

        Raises:
            UserError: none is named.
        """
        if not self.output:
            raise UserError(
                "--output is missing: name the run folder, such as --output runs/first; --help"
                " lists all options"
            )
        return Path(self.output).expanduser()

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

    def check_judges(self) -> None:
        """Refuses weights that are kept, or a stage that ends, by what is never measured.

        Raises:
            UserError: names the option that measures.
        """
        sections = {"pretrain": self.pretrain, "distill": self.distill, "finetune": self.finetune}
        for stage, section in sections.items():
            if self.stage not in (stage, "all") or not section.judged:
                continue
            asked = "keep best" if section.keep == "best" else f"patience {section.patience}"
            if stage == "finetune" and not self.finetune.eval_every:
                raise UserError(
                    f"--finetune.{asked} goes by the scores of val, which are taken at the end"
                    " alone: give --finetune.eval_every, a number of steps"
                )
            if stage != "finetune" and not self.probe.every:
                raise UserError(
                    f"--{stage}.{asked} goes by the linear probe, which is off: give --probe.every,"
                    " auto or a number of steps"
                )

    def toml(self) -> str:
        """This configuration as TOML, which `--recipe` reads back; without secrets of addresses."""
        return redacted(tomli_w.dumps(self.model_dump(exclude_none=True, exclude={"local_rank"})))
