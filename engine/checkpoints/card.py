"""The model card of an export: README.md as the hub has it, from what a stage's result says."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from selfdistill.data import records
from selfdistill.data.errors import UserError, printable
from selfdistill.data.formats import fitting
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints import snippets
from selfdistill.engine.checkpoints.export import TOLD
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.checkpoints.results import RESULT, read_result

if TYPE_CHECKING:
    import jinja2

FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("card.md.jinja")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
#: What hub and people call our figures.
_METRICS = {"accuracy": "accuracy", "macro_f1": "f1", "micro_f1": "f1", "auroc": "roc_auc"}


class Base(NamedTuple):
    """What an export was made from: its name, and as the hub has them its name and licence."""

    name: str
    hub: str | None
    licence: str | None


def write(folder: Path, result: Mapping[str, Any], train: Manifest) -> None:
    """Writes the card of a stage's export.

    Args:
        folder: the export.
        result: what the stage leaves as result.json.
        train: of the samples that it learnt from.
    """
    write_text(folder / FILE, text(folder, result, train))


def text(folder: Path, result: Mapping[str, Any], train: Manifest) -> str:
    """The card of an export, see `write`."""
    found = snippets.look(folder)
    model = result.get("model") or {}
    base, data = base_of(model.get("path")), _name(train)
    labelled = train.classes if result.get("metrics") else []
    metrics = result.get("metrics") or {}
    last = "test" if any(name.startswith("test_") for name in metrics) else "val"
    title = f"{base.name} on {data}: {_TASKS[found.task]}"
    intervals = result.get("intervals") or {}
    values = {
        "yaml": front_matter(title, found, base, data, metrics),
        "title": _inline(title),
        "what": _what(found, result.get("stage") or ""),
        "scores": [_score(name, value, intervals) for name, value in _shown(metrics)],
        "interval": f"Intervals are 95% intervals of resampled {last} samples."
        if intervals
        else "",
        "scored": last,
        "metric": result.get("metric"),
        "snippets": snippets.of(found),
        "pixels": _pixels(folder),
        "base": _inline(base.name),
        "base_hash": model.get("sha256"),
        "licence": _LICENCE.format(base.licence) if base.licence else _NO_LICENCE,
        "stages": [_row(one) for one in chain(folder.parent, result)],
        "data": data,
        "split": train.split,
        "samples": train.samples,
        "classes": [_inline(name) for name in labelled],
        "manifest": train.hash,
        "versions": _versions(result),
    }
    return _template().render(values).rstrip() + "\n"


@functools.cache
def _template() -> jinja2.Template:
    """The card's, compiled once for all exports of a process."""
    import jinja2

    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


_TASKS = {
    "image-classification": "classifier",
    "image-feature-extraction": "image encoder",
    "text-classification": "classifier",
    "fill-mask": "text encoder",
    "sentence-similarity": "sentence encoder",
}
_LICENCE = "`{}`, as its own card says. Whether it binds these weights, its text says."
_NO_LICENCE = (
    "not known: it says none that a program can read. Look it up before you pass these weights on,"
    " and put it into the first lines."
)


def front_matter(
    title: str, found: snippets.Found, base: Base, data: str, metrics: Mapping[str, float]
) -> str:
    """The YAML block that the hub reads, without its ``---`` lines."""
    from huggingface_hub import EvalResult, ModelCardData

    scores = [
        EvalResult(
            task_type=found.task,
            dataset_type=re.sub(r"[^\w.-]+", "-", data),
            dataset_name=data,
            dataset_split=split,
            metric_type=_METRICS[metric],
            metric_name=f"{split} {metric}",
            metric_value=round(value, 6),
        )
        for name, value in _shown(metrics)
        for split, _, metric in [name.partition("_")]
        if metric in _METRICS
    ]
    content = ModelCardData(
        library_name=found.library,
        pipeline_tag=found.task,
        license=base.licence or "unknown",
        base_model=base.hub,
        datasets=[data],
        metrics=sorted({score.metric_type for score in scores}) or None,
        tags=["selfdistill", "self-distillation", "domain-adaptation"],
        model_name=title if scores else None,
        eval_results=scores or None,
    )
    return str(content.to_yaml()).strip()


def base_of(path: str | None) -> Base:
    """What is known of a base: of a hub name, a folder with a card, or any file.

    Args:
        path: --model; None or "scratch" where there is none.
    """
    if path in (None, "scratch"):
        return Base("a fresh model", None, None)
    assert path is not None
    name = path.removeprefix("hf-hub:")
    if name.startswith("timm:"):
        name = f"timm/{name.removeprefix('timm:')}"
    here = Path(path).expanduser()
    if here.exists():  # of a place on this disk its last name is enough for others
        told = _told(here / FILE) if here.is_dir() else {}
        hub = told.get("base_model")
        return Base(_plain(here.name), hub if _is_hub(hub) else None, _licence(told))
    if not _is_hub(name):
        return Base(_plain(here.name), None, None)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, FILE)
    told = _told(Path(cached)) if isinstance(cached, str) else {}
    return Base(name, name, _licence(told))


def _is_hub(name: object) -> bool:
    return isinstance(name, str) and _HUB_NAME.fullmatch(name) is not None


def _licence(told: Mapping[str, Any]) -> str | None:
    found = told.get("license")
    return found if isinstance(found, str) and re.fullmatch(r"[\w.+-]{1,60}", found) else None


def _told(path: Path) -> dict[str, Any]:
    """The metadata of a card; none where it has none, or what no hub would read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # YAML of strangers fails in many ways, and nothing depends on it
        return {}


def chain(stage: Path, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The results of the stages that led to one, the first first, itself last.

    Args:
        stage: its folder.
        result: what it left.
    """
    found = [dict(result)]
    seen = {stage.resolve()}
    while True:
        last = found[0]
        source = last.get("start") or (last.get("teacher") or {}).get("path")
        before = Path(source).parent if isinstance(source, str) else None
        if before is None or before.resolve() in seen or not (before / RESULT).is_file():
            break
        try:
            found.insert(0, read_result(before / RESULT))
        except UserError:  # another program's, beside weights that it left
            break
        seen.add(before.resolve())
    return found


def _row(result: Mapping[str, Any]) -> list[str]:
    """A stage's settings, as the table has them."""
    record = result.get("record") or {}
    steps = next((key for key in record if key.endswith(".steps")), "")
    section = steps.partition(".")[0]

    def of(name: str) -> Any:
        return record.get(f"{section}.{name}")

    planned, samples, batch = record.get(steps), result.get("samples"), of("batch")
    taken = result.get("steps") or planned
    length, epochs = "" if taken is None else str(taken), ""
    if result.get("stopped") is not None:
        length += f" of {planned}, stopped early"
    if (kept := (result.get("kept") or {}).get("step")) is not None:
        length += f", weights of step {kept}"
    if samples and batch and taken:
        epochs = f"{taken * batch / samples:.3g}"
    values = [epochs, batch, of("lr"), of("weight_decay"), result.get("seed")]
    stage = _inline(str(result.get("stage")))
    return [stage, length, *("" if v is None else str(v) for v in values)]


def _what(found: snippets.Found, stage: str) -> str:
    kind = "Texts" if found.kind == "text" else "Pictures"
    if found.classes and found.several:
        return f"{kind} to any of {found.classes} classes: each is decided by itself."
    if found.classes:
        return f"{kind} to one of {found.classes} classes."
    if stage.startswith("decoder"):
        return "An encoder as it was, with a decoder that was trained for it."
    return f"An encoder of {kind.lower()} that was adapted to a domain without labels."


def _shown(metrics: Mapping[str, float]) -> list[tuple[str, float]]:
    """Scores, test before val, without counts and what training data give."""
    order = {"test": 0, "val": 1}
    rows = [
        (name, value)
        for name, value in metrics.items()
        if name.partition("_")[0] in order and not name.endswith("_samples")
    ]
    return sorted(rows, key=lambda row: order[row[0].partition("_")[0]])


def _score(name: str, value: float, intervals: Mapping[str, Any]) -> tuple[str, str, str, str]:
    split, _, metric = name.partition("_")
    given = intervals.get(name, intervals.get(metric) if split == "test" else None)
    between = ""
    if isinstance(given, Mapping):
        given = [given.get("low"), given.get("high")]
    if isinstance(given, Sequence) and len(given) == 2 and None not in given:
        between = f"{given[0]:.4f} to {given[1]:.4f}"
    return split, metric.replace("_", " "), f"{value:.4f}", between


def _pixels(folder: Path) -> list[str]:
    """What to know of pictures, a line each; none of texts."""
    path = folder / TOLD
    packed = records.read_object(path).get("image") if path.is_file() else None
    if not isinstance(packed, dict):
        return []
    how, span = fitting.of(packed), packed.get("range")
    lines = [f"Pictures of another ratio than the model's are {_FITS[how]}."]
    lines.append(
        "The processor does the same to RGB and grey pictures. By Pillow"
        ' (`AutoImageProcessor.from_pretrained(".", backend="pil")`) it gives the very pixels that'
        " were scored, by torchvision some are one level of 255 off."
    )
    lines.append(
        "Packing turns pictures as the camera says (EXIF), and so does a pipeline that is given"
        " paths. It lays transparent ones over white, and a pipeline does not."
    )
    deep = f"{span[0]:g} is black, {span[1]:g} white" if span else "16 bits are divided by 257"
    lines.append(
        f"Pictures of more than 8 bits: {deep}. No processor of transformers or timm does that:"
        " `python -m launcher.predict` does, or convert them first."
    )
    if how == "pad":
        lines.append(
            "Borders have ImageNet's mean colour (124, 116, 104); timm's have the mean of this"
            " model's own normalisation."
        )
    return lines


_FITS = {
    "crop": "scaled until they cover it (bicubic), then cut to the centre",
    "pad": "scaled until they lie in it (bicubic), with borders",
    "squash": "each side scaled for itself (bicubic)",
}


def _versions(result: Mapping[str, Any]) -> str:
    found = [f"{name} {version}" for name, version in (result.get("versions") or {}).items()]
    python = [f"Python {result['python']}"] if result.get("python") else []
    commit = (result.get("git") or {}).get("commit")
    ours = [f"selfdistill at {commit[:12]}"] if commit else []
    return ", ".join([*ours, *python, *found, f"precision {result.get('precision')}"]) + "."


def _name(train: Manifest) -> str:
    """What a set is called: the folder above its splits, without where that lies."""
    parts = [part for part in re.split(r"[/?#]+", train.root.rstrip("/")) if part]
    return _plain(parts[-2] if len(parts) > 1 else parts[-1] if parts else "data")


def _plain(name: str) -> str:
    """A name from outside on one line, for YAML and between backticks."""
    return printable(name).replace("\n", " ").replace("`", "'")[:200]


def _inline(name: str) -> str:
    """A name from outside on one line of Markdown, without what would be markup."""
    plain = printable(name).replace("\n", " ")[:200]
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", plain)


def read_card(folder: Path) -> dict[str, Any]:
    """The metadata of an export's card, checked as far as that goes without the hub.

    Raises:
        UserError: there is no card, or it is none that the hub takes.
    """
    from huggingface_hub import ModelCard

    path = folder / FILE
    if not path.is_file():
        raise UserError(
            f"{folder} has no {FILE}, the card that tells others what it is: export it again by"
            " doing its stage anew, or write one"
        )
    try:
        content = ModelCard.load(path).data.to_dict()
    except Exception as error:  # of PyYAML, of huggingface_hub, of encodings
        line = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: the hub could not read its first lines ({line})") from error
    for name in ("license", "library_name", "pipeline_tag"):
        value = content.get(name)
        if not isinstance(value, str):
            raise UserError(f"{path}: its first lines say no {name}: add it")
    return dict(content)
