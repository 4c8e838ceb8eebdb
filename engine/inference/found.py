"""Which folder holds the weights that a user means: a run, a stage, or an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pydantic

from selfdistill.data import records
from selfdistill.data.cli import nearest
from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints.export import TOLD
from selfdistill.engine.checkpoints.folder import CONFIG
from selfdistill.engine.checkpoints.results import RESULT, numbered, read_result
from selfdistill.engine.runtime.terminal import LOG

#: Files by one of which a model's own folder is known.
_MODEL = ("config.json", "modules.json", "timm/config.json", "adapter_config.json")
#: Fine-tunings in a run, the first that is there being meant.
_CLASSIFIERS = ("finetune", "finetune-model", "finetune-pretrain")


class Place(NamedTuple):
    """Where weights lie, and what the user should know of the choice, a line each."""

    path: str
    notes: tuple[str, ...] = ()


def locate(source: str) -> Place:
    """The export that a run or a stage means; anything else is taken as it is.

    Of a run its classifier is taken, of one without fine-tuning the encoder of its last stage. Of
    several seeds it is the one with the best score on val, which was never trained on: choosing by
    test would make the test score too good.

    Args:
        source: What the user named.

    Raises:
        UserError: A stage is not complete, or a run has none that is.
    """
    folder = Path(source).expanduser()
    beside = folder.parent
    if not folder.exists() and beside.is_dir() and beside != Path():
        raise no_model(source)
    if not folder.is_dir() or any((folder / name).exists() for name in _MODEL):
        return Place(source)
    if (folder / "export").is_dir() or (folder / RESULT).is_file():
        return _stage(folder)
    if list(folder.glob("seed-*")):
        raise UserError(f"{folder} is not complete: launch its run again, or name one of its seeds")
    if not any((folder / name).is_file() for name in (CONFIG, LOG)):
        return Place(source)  # whoever loads it says what is missing
    return _of_run(folder)


def _of_run(folder: Path) -> Place:
    rounds = [path.name for path in numbered(folder, "distill-").values()]
    others = sorted(p.name for p in folder.glob("finetune-*") if p.name not in _CLASSIFIERS)
    encoders = (*reversed(rounds), "pretrain")
    names = (*_CLASSIFIERS, *reversed(others), *encoders)
    done = [name for name in names if (folder / name / RESULT).is_file()]
    if not done:
        begun = [name for name in names if (folder / name).is_dir()]
        where = f", nor is any of its stages ({folder / begun[0]} is begun)" if begun else ""
        raise UserError(
            f"the training of {folder} is not complete{where}: wait for it, or launch it"
            " again with the same command, and it goes on"
        )
    first = done[0]
    own = folder / _CLASSIFIERS[0]
    if first != own.name and own.is_dir():
        raise UserError(
            f"{own} is not complete: launch its run again with the same command, and it goes on, or"
            f" name another stage ({folder / first})"
        )
    place = _stage(folder / first)
    more = f"; there is also {', '.join(done[1:])}" if len(done) > 1 else ""
    if first in encoders:
        more = ", an encoder: the run has no complete fine-tuning"
    named = f"model: {folder / first}{more}"
    if place.notes:  # which of several seeds says it all, but for what else there is
        named = f"{place.notes[0]}{more}"
    return place._replace(notes=(named,))


def _stage(folder: Path) -> Place:
    """A complete stage, or of several seeds the best."""
    try:
        result = read_result(folder / RESULT)
    except FileNotFoundError:
        if (folder / "export").is_dir() and not (folder / CONFIG).is_file():
            return Place(str(folder / "export"))  # copied without the rest
        raise UserError(
            f"{folder} is not complete (it has no {RESULT}): launch its run again with the same"
            " command, and it goes on"
        ) from None
    if (folder / "export").is_dir():
        return Place(str(folder / "export"))
    seeds = numbered(folder, "seed-")
    seeds = {number: path for number, path in seeds.items() if (path / "export").is_dir()}
    if not seeds:
        raise UserError(f"{folder} has no export: it was deleted; do the stage again (--overwrite)")
    metric = f"val_{result.get('metric') or 'accuracy'}"
    scores = {number: _score(path, metric) for number, path in seeds.items()}
    best = max(scores, key=lambda number: (scores[number] or 0.0, -number))
    if any(score is None for score in scores.values()):
        best = min(scores)
        why = f"the first of {len(seeds)}: not all have a {metric}"
    else:
        why = f"of {len(seeds)} seeds the one with the best {metric} ({100 * scores[best]:.2f}%)"
    return Place(str(seeds[best] / "export"), (f"model: {seeds[best]}, {why}",))


def _score(folder: Path, metric: str) -> Any:
    try:
        return read_result(folder / RESULT)["metrics"].get(metric)
    except FileNotFoundError:
        return None


class Told(records.Record):
    """What an export says of itself for us.

    Attributes:
        image: what is known of the images that it was trained on (`Manifest.image`).
        bucket: to whose multiples a batch of texts is padded.
        precision: of the matrix products, when it was scored.
    """

    image: dict[str, Any] = pydantic.Field({})
    bucket: records.Count | None = None
    precision: str | None = None


def told(folder: Path) -> Told:
    """What an export says of itself; nothing where it does not.

    Raises:
        UserError: The file is broken.
    """
    path = folder / TOLD
    if not path.is_file():
        return Told()
    found: Told = records.checked(Told, records.read_object(path), path)
    return found


def no_model(source: str) -> UserError:
    """What to say of a place that is no model at all."""
    path = Path(source).expanduser()
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = "" if path.exists() else nearest(path.name, beside, "")
    what = "holds no model" if path.exists() else "is not there"
    return UserError(
        f"{source} {what}.{hint} Give a run's folder, a stage's, or an export (with config.json)"
    )


def no_classes(source: str) -> UserError:
    """What to say of an encoder where a classifier is wanted."""
    if (Path(source).expanduser() / CONFIG).is_file():
        return UserError(
            f"{source} has no complete fine-tuning yet: wait for it, or launch the training again;"
            " launcher.embed gives the features of what is there"
        )
    return UserError(
        f"{source} is an encoder, which has no classes: launcher.embed gives its features; name a"
        " fine-tuned run or its export for classes"
    )
