"""Sections of the configuration: data, models, masks, texts, teacher, LoRA, regularizers."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from selfdistill.data.formats.images import MOST_PIXELS, Size
from selfdistill.data.records import BOUND
from selfdistill.data.shards.joined import parse as parse_mix


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
    mix: str | None = Field(
        None, description="sets mixed in by stages 0 to 2, with their shares: general:0.3"
    )
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

    @model_validator(mode="after")
    def _mixed(self) -> DataSection:
        """`--data target,general:0.3` is short for `--data target --data.mix general:0.3`."""
        short = re.fullmatch(r"([^,]+),((?:[^,]+:[-+.\deE]+,)*[^,]+:[-+.\deE]+)", self.path or "")
        if short:
            if self.mix is not None:
                raise ValueError("path names what is mixed in already: leave mix out")
            self.path, self.mix = short[1], short[2]
        if self.mix is not None:
            parse_mix(self.mix)
        return self


class ShapeSection(Section):
    """Architecture of a model made from scratch (path = "scratch")."""

    image_size: Size = Field(64)
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
    image_size: Size | None = Field(
        None, description="train at another resolution (224, or 224x448: height x width)"
    )
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
    whole_word: bool = Field(False, description="all tokens of a word are masked, or none")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="in stages 1, 2 (none = model's own)"
    )


class TextSection(Section):
    """How texts become token ids."""

    max_length: int | None = Field(None, ge=3, description="tokens (none = the model's limit)")
    split: bool = Field(
        True, description="stages 0 to 2: long texts in windows (false: their beginnings alone)"
    )
    overlap: int = Field(0, ge=0, description="tokens that neighbouring windows share")
    bucket: int = Field(32, ge=1, description="lengths are padded to multiples of this")
    packed: bool | None = Field(
        None, description="several texts in a row in place of padding (left out: on GPUs)"
    )

    @model_validator(mode="after")
    def _overlap_of_windows(self) -> TextSection:
        if self.overlap and not self.split:
            raise ValueError("overlap is that of windows: give split true, or leave it out")
        return self


class TeacherSection(Section):
    """The frozen teacher of the distillation stage."""

    path: str | None = Field(None, description="exported model to distil from (default: own run's)")
    mode: Literal["auto", "replicated", "sharded", "cached"] = Field(
        "auto", description="a copy on each rank, ZeRO-3 shards, or a table of its features"
    )
    table_gb: float = Field(16.0, gt=0, description="auto: largest feature table to cache, GiB")


class ProbeSection(Section):
    """How the encoder does while stages 1 and 2 train it: k-NN and a linear probe on the labels."""

    every: int | Literal["auto"] = Field(
        0,
        description="steps between probes (0 = none; auto: tenths of a stage, in 3% of its time)",
    )
    samples: int = Field(
        2000, ge=2, description="of the train split that are probed by; of val half as many"
    )

    @field_validator("every", mode="before")
    @classmethod
    def _steps_or_auto(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not number and value != "auto":
            raise ValueError("give a number of steps, auto, or 0 for none")
        return value


class LoraSection(Section):
    """Low-rank updates of the encoder's linear layers (Hu et al. 2021), with --adapt lora."""

    rank: int = Field(16, ge=1, description="of the updates")
    alpha: int = Field(16, ge=1, description="updates count alpha / rank times")
    dropout: float = Field(0.0, ge=0, lt=1, description="before an update")


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


class DietSection(Section):
    """Further pre-training by telling samples apart (DIET, arXiv 2302.10260)."""

    smoothing: float = Field(0.8, ge=0, lt=1, description="of the target, over all samples")
    augment: Literal["none", "light", "strong"] = Field(
        "light", description="images: how the view is made, beside flips, as --finetune.augment"
    )
