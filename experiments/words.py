"""Which options a job has, and the folder that says what it does."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration
from selfdistill.experiments.jobs import LATER, PIPELINE, Stage, typed
from selfdistill.experiments.spec import Dataset, Method, Options, Profile, Row


@dataclass(frozen=True)
class Variant:
    """What is done to a data set.

    Attributes:
        dataset: which.
        method: which.
        row: of a table, with what it changes of the method.
        pipeline: number of its stages 1 and 2; 0: those that searches start from.
    """

    dataset: Dataset
    method: Method
    row: Row
    pipeline: int = 0


class Words:
    """Options and names of jobs.

    Args:
        profile: the size.
        models: folder of models, in which the recipes' are looked for by the last part of the name.
        here: whether a model that `models` lacks is refused.
    """

    def __init__(self, profile: Profile, models: Path | None, *, here: bool) -> None:
        self.profile, self.models, self.here = profile, models, here

    def of(self, variant: Variant, stage: Stage) -> Options:
        """Options of a stage: profile < data set < method < row."""
        options = self.usual(variant.dataset) | self.own(variant)
        found = {k: v for k, v in options.items() if k.partition(".")[0] not in LATER[stage]}
        if variant.pipeline and stage != "decoder":
            found["seed"] = int(found.get("seed", 0)) + PIPELINE * variant.pipeline
        return found

    def usual(self, dataset: Dataset) -> Options:
        """The profile's and the data set's options.

        Raises:
            UserError: `models` does not hold the model that they name.
        """
        scale = self.profile.of(dataset.kind)
        options: Options = {"recipe": scale.recipe, **scale.options, **dataset.options}
        named = configuration.load(options).model.path
        if self.models is None or named is None or Path(named).is_dir():
            return options
        place = self.models / named.rpartition("/")[2]
        if self.here and not place.is_dir():
            raise UserError(
                f"--models {self.models}: it holds no folder {place.name}, for {named} of recipe"
                f" {scale.recipe}: put the model's files there"
            )
        return options | {"model.path": str(place)}

    def own(self, variant: Variant) -> Options:
        """What tells a row from the profile's defaults."""
        dataset, method, row = variant.dataset, variant.method, variant.row
        scale = self.profile.of(dataset.kind)
        own = scale.tuning(method.name).options | method.of(dataset.kind) | row.options
        usual = configuration.load({"recipe": scale.recipe, **scale.options, **dataset.options})
        for stage, factor in (method.lengthen | row.lengthen).items():
            plan = getattr(usual, stage)
            if plan.steps is not None:
                own[f"{stage}.steps"] = max(1, round(factor * plan.steps))
            else:
                own[f"{stage}.epochs"] = factor * plan.epochs
        return own

    def name(self, variant: Variant, stage: Stage) -> str:
        """A job's folder: data set, stage, and what is not as usual."""
        dataset, method, row, own = variant.dataset, variant.method, variant.row, self.own(variant)
        mine = {k: v for k, v in own.items() if k.partition(".")[0] not in LATER[stage]}
        if stage == "finetune":
            # What a method stands for need not be told again.
            usual = self.own(Variant(dataset, method, Row(method=method.name)))
            mine = {k: v for k, v in mine.items() if usual.get(k) != v}
            rounds = row.rounds or method.rounds
            head = method.name + (f",rounds={rounds}" if rounds != method.rounds else "")
        else:
            head = stage
        parts = [head, *(f"{k.removeprefix(stage + '.')}={typed(v)}" for k, v in mine.items())]
        if variant.pipeline and stage != "decoder":
            parts.append(f"pipeline={variant.pipeline}")
        whole = ",".join(parts)
        slug = re.sub(r"[^A-Za-z0-9_.,=+-]", "_", whole)[:120]
        if slug != whole:  # two that differ in such signs alone are two
            slug += "-" + hashlib.sha256(whole.encode()).hexdigest()[:8]
        return f"{dataset.name}/{slug}"
