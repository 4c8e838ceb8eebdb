"""What an experiment is made of: small TOML files, one each for a method, data set, table, profile.

`experiments/methods/NAME.toml` and so on; `--specs FOLDER` adds another folder with the same
folders in it, so that a method or a data set of one's own takes one file. So do claims, which say
what the tables' cells are tested for.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from selfdistill.data import records
from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration

HERE = Path(__file__).resolve().parent

#: Values of engine/run.py's options by their dotted names.
Options = dict[str, bool | int | float | str]
#: Values to choose from, by validation score.
Grid = dict[str, list[bool | int | float | str]]


class Spec(BaseModel):
    """A file of specs. Undeclared fields are refused."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(description="the file's name, without .toml")
    title: str = Field(description="as reports print it")
    note: str = Field("", description="what a reader of the report should know")

    def unsearched(self) -> Self:
        """The same with the options that it says, and nothing to choose."""
        return self


def _known_options(value: dict[str, Any]) -> dict[str, Any]:
    known = configuration.options()
    for option in value:
        if option not in known:
            raise ValueError(f"unknown option {option!r}{configuration.nearest_option(option)}")
    return value


#: Sections that only fine-tuning looks at: what a method may search for itself.
SEARCHED = ("finetune", "recadam", "mars", "r3f")
#: Stages that methods share: searched once for all of them.
STAGES = ("pretrain", "distill")


def _searchable(value: dict[str, Any]) -> dict[str, Any]:
    for option in _known_options(value):
        section = option.partition(".")[0]
        if section in STAGES:
            raise ValueError(
                f"{option!r} is that of a stage which methods share: search it for all of them, in"
                " a profile's [image.search] or [text.search], or make a method of each value"
            )
        if section not in SEARCHED:
            raise ValueError(
                f"{option!r} is not fine-tuning's, and a search would train the stages before it"
                f" anew: search {', '.join(s + '.' for s in SEARCHED)} options, or make a method"
                " of each value"
            )
    return value


def _searchable_by_all(value: dict[str, Any]) -> dict[str, Any]:
    own = {k: v for k, v in value.items() if k.partition(".")[0] not in STAGES}
    _searchable(own)
    return _known_options(value)


Lengthen = dict[Literal["pretrain", "distill", "finetune"], Annotated[float, Field(gt=0)]]


class Method(Spec):
    """How a model is adapted: what fine-tuning starts from, and options that differ."""

    start: Literal["model", "pretrain", "distill"] = Field(
        description="fine-tuning starts from: the model itself, stage 1, or the last round"
    )
    rounds: int = Field(1, ge=1, description="of self-distillation, where it starts from distill")
    paper: str | None = Field(None, description="its row in the paper's tables")
    options: Options = Field(default_factory=dict)
    image: Options = Field(default_factory=dict, description="options for images alone")
    text: Options = Field(default_factory=dict, description="options for texts alone")
    lengthen: Lengthen = Field(default_factory=dict, description="stage -> times its usual length")
    search: Grid = Field(default_factory=dict, description="chosen by validation for this method")
    tables: list[str] = Field(
        default_factory=list, description="tables of which it is a row, beside those in their files"
    )
    tuned_as: str | None = Field(
        None, description="method whose choices are taken over, but for what is searched here"
    )

    _options = field_validator("options", "image", "text")(_known_options)
    _search = field_validator("search")(_searchable)

    @field_validator("name")
    @classmethod
    def _free(cls, value: str) -> str:
        if value in ("decoder", "pretrain", "distill", "search"):
            raise ValueError(f"{value} is the folder of a stage: name the method otherwise")
        return value

    def of(self, kind: str) -> Options:
        """Its options for a kind of data."""
        return self.options | (self.image if kind == "image" else self.text)

    def unsearched(self) -> Self:
        """See `Spec`."""
        return self.model_copy(update={"search": {}})


class Dataset(Spec):
    """A packed data set."""

    kind: Literal["image", "text"]
    folder: str | None = Field(None, description="below --data_root (default: the file's name)")
    pack: str = Field("", description="the command that packs it")
    paper: str | None = Field(None, description="its column in the paper's tables")
    same: bool = Field(False, description="whether it is what the paper used, split and all")
    options: Options = Field(default_factory=dict)

    _options = field_validator("options")(_known_options)

    @property
    def family(self) -> str:
        """Its name without the size: that of sets which differ in their place alone."""
        return re.sub(r"_\d+$", "", self.name)


class Row(BaseModel):
    """A line of a table: a method, perhaps with other options."""

    model_config = ConfigDict(extra="forbid")

    method: str
    title: str | None = None
    rounds: int | None = Field(None, ge=1)
    options: Options = Field(default_factory=dict)
    lengthen: Lengthen = Field(default_factory=dict)
    x: float | None = Field(None, description="where it stands on a figure's axis")
    paper: str | None = Field(None, description="key of the paper's figure (default: the method's)")

    _options = field_validator("options")(_known_options)


class Quantity(BaseModel):
    """What is shown of each cell: the test score, or an entry of its analysis."""

    model_config = ConfigDict(extra="forbid")

    key: str = Field("score", description="score, seconds, or analysis.NAME of result.json")
    title: str = ""
    log: bool = False


class Table(Spec):
    """A table or figure of the paper: methods x data sets x seeds."""

    shape: Literal["table", "curve"] = "table"
    datasets: list[str] = Field(min_length=1)
    rows: list[Row] = Field(min_length=1)
    seeds: int = Field(5, ge=2, description="fine-tunings of each cell")
    pipelines: int = Field(
        1, ge=1, lt=10, description="stages 1 and 2 of each cell, each with so many fine-tunings"
    )
    x: str = Field("", description="what a figure's horizontal axis is")
    log_x: bool = False
    at: dict[str, float] = Field(default_factory=dict, description="data set -> place on the axis")
    shows: list[Quantity] = Field(default_factory=lambda: [Quantity()])
    paper: str | None = Field(None, description="section of paper.toml (default: the file's name)")

    @model_validator(mode="after")
    def _axis(self) -> Table:
        placed = [row.x is not None for row in self.rows]
        if self.shape == "curve" and not all(placed) and not self.at:
            raise ValueError("a curve needs x in each of its rows, or places of its data sets (at)")
        return self


class Tuning(BaseModel):
    """What a method needs at a profile's size, beside its own file."""

    model_config = ConfigDict(extra="forbid")

    options: Options = Field(default_factory=dict)
    search: Grid = Field(default_factory=dict)

    _options = field_validator("options")(_known_options)
    _search = field_validator("search")(_searchable)


class Scale(BaseModel):
    """Recipe and options of one kind of data in a profile."""

    model_config = ConfigDict(extra="forbid")

    recipe: str
    decoder: bool = Field(
        False, description="whether the encoder comes without a decoder, which stage 0 then trains"
    )
    options: Options = Field(default_factory=dict)
    search: Grid = Field(default_factory=dict, description="chosen by validation, method by method")
    methods: dict[str, Tuning] = Field(
        default_factory=dict, description="method -> its options and search at this size"
    )

    _options = field_validator("options")(_known_options)
    _search = field_validator("search")(_searchable_by_all)

    def tuning(self, method: str) -> Tuning:
        """What a method needs at this size."""
        return self.methods.get(method, Tuning())

    def unsearched(self) -> Self:
        """See `Spec`."""
        methods = {k: v.model_copy(update={"search": {}}) for k, v in self.methods.items()}
        return self.model_copy(update={"search": {}, "methods": methods})


class Profile(Spec):
    """The size at which experiments are run."""

    image: Scale
    text: Scale

    def of(self, kind: str) -> Scale:
        """For a kind of data."""
        return self.image if kind == "image" else self.text

    def computed_in(self, precision: str) -> Self:
        """The same in another precision, whatever its options say."""
        said = {"precision": precision}
        scales = {"image": self.image, "text": self.text}
        return self.model_copy(
            update={
                k: s.model_copy(update={"options": s.options | said}) for k, s in scales.items()
            }
        )

    def unsearched(self) -> Self:
        """See `Spec`."""
        return self.model_copy(
            update={"image": self.image.unsearched(), "text": self.text.unsearched()}
        )


class Contrast(BaseModel):
    """One test of a claim, on each data set of its tables: a number, and where it should lie.

    The number is a - b; a sum of rows by `weights`; the slope of a (minus b) `along` the rows' x or
    the data sets' places; or the slope of `key` against another measured quantity over the rows.
    A row is named by its method, its title, or METHOD@X.
    """

    model_config = ConfigDict(extra="forbid")

    says: str = Field(description="in words, as if it were so")
    expect: Literal["above", "below", "within", "not_below"] = Field(
        description="0; within and not_below: of what matters, on either side or the lower one"
    )
    matters: float = Field(gt=0, description="the smallest difference that matters, in its unit")
    key: str = Field("score", description="score, seconds, or analysis.NAME")
    log: bool = Field(False, description="differences in % (of logarithms), not in the unit")
    a: str = ""
    b: str = ""
    weights: dict[str, float] = Field(default_factory=dict, description="row -> weight; sum 0")
    along: Literal["rows", "datasets"] | None = None
    per: Literal["unit", "doubling", "tenfold"] = Field("unit", description="of x, for a slope")
    against: str = Field("", description="the quantity that `key` is set against, row by row")

    @model_validator(mode="after")
    def _one_form(self) -> Contrast:
        if bool(self.weights) + bool(self.a) + bool(self.against) != 1:
            raise ValueError("give one of a (with b, or along), weights, against")
        if self.a and not self.b and not self.along:
            raise ValueError(f"{self.a} is compared with nothing: give b, or along")
        if self.weights and self.along:
            raise ValueError("along goes with a (and b), not with weights")
        if self.weights and abs(sum(self.weights.values())) > 1e-9:
            raise ValueError("weights do not sum up to 0")
        return self

    @property
    def named(self) -> list[str]:
        """The rows that it names."""
        return [*self.weights, *(name for name in (self.a, self.b) if name)]


class Claim(Spec):
    """A sentence of the paper, or about the method, and what decides it; the title says it."""

    order: float = Field(100, description="its place in the report")
    paper: str = Field(description="the paper's evidence, in words")
    tables: list[str] = Field(min_length=1, description="whose cells decide it")
    tests: list[Contrast] = Field(min_length=1)


AnySpec = TypeVar("AnySpec", bound=Spec)


class Specs:
    """All specs that there are.

    Args:
        more: a folder with methods/, datasets/, tables/, profiles/ or claims/ of one's own; its
            files come before ours of the same name.
        searched: whether profiles and methods come with what is chosen by validation.
    """

    def __init__(self, more: Path | None = None, *, searched: bool = True) -> None:
        self.searched = searched
        self.folders = [HERE] if more is None else [more, HERE]
        if more is not None and not any((more / part).is_dir() for part in PARTS.values()):
            raise UserError(f"--specs {more}: it holds none of {', '.join(PARTS.values())}")

    def names(self, kind: type[Spec]) -> list[str]:
        """Names of the specs of a kind."""
        part = PARTS[kind]
        return sorted({p.stem for f in self.folders for p in (f / part).glob("*.toml")})

    def load(self, kind: type[AnySpec], name: str) -> AnySpec:
        """Reads a spec.

        Raises:
            UserError: there is none of this name, or its file is wrong.
        """
        part = PARTS[kind]
        path = next((p for f in self.folders if (p := f / part / f"{name}.toml").is_file()), None)
        if path is None:
            known = self.names(kind)
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"no {part[:-1]} {name!r}: there are {', '.join(known)}{hint}")
        try:
            content = records.read_toml(path, "correct it")
            made = kind(**{"name": name} | content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(p) for p in first["loc"]) or "the file"
            message = first["msg"].removeprefix("Value error, ")
            raise UserError(f"{path}: {place}: {message}") from error
        return made if self.searched else made.unsearched()

    def table(self, name: str) -> Table:
        """A table, with the methods that name it in files of their own as its last rows.

        Raises:
            UserError: a spec is wrong, or a method names a figure along an axis.
        """
        table = self.load(Table, name)
        there = {row.method for row in table.rows}
        more = [m for m in self.names(Method) if m not in there]
        rows = [Row(method=m) for m in more if name in self.load(Method, m).tables]
        if rows and any(row.x is not None for row in table.rows):
            raise UserError(
                f"method {rows[0].method}: {name} is a figure with an axis, on which a row needs a"
                " place x: write a table of your own"
            )
        return table.model_copy(update={"rows": [*table.rows, *rows]})


PARTS: dict[type[Spec], str] = {
    Method: "methods",
    Dataset: "datasets",
    Table: "tables",
    Profile: "profiles",
    Claim: "claims",
}


def paper_figures() -> dict[str, Any]:
    """The paper's own figures (paper.toml): table -> row -> column -> "mean±std"."""
    return tomllib.loads((HERE / "paper.toml").read_text(encoding="utf-8"))
