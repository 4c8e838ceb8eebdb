"""The splits of a packed set: what stages 1 and 2 learn from, and those of fine-tuning."""

from __future__ import annotations

from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.data.remote.cache import NotThere
from selfdistill.data.shards.joined import mixed
from selfdistill.data.shards.manifest import Manifest, is_remote
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.runtime.distributed import main_only


def unlabelled_split(run: Run) -> Manifest:
    """What stages 1 and 2 learn from: the split `unlabelled` where there is one, else train.

    And what is mixed in, as --data.mix says.
    """
    first = split_of(run, _data(run))
    return mixed(first, run.config.data.mix, lambda place: split_of(run, place))


def split_of(run: Run, path: str) -> Manifest:
    """A data set's split `unlabelled` where there is one, else train; or as --data.split says."""
    split, cache = run.config.data.split, run.config.data.cache_dir
    if split == "auto":
        there = not is_remote(path) and (Path(path) / "unlabelled").is_dir()
        split = "unlabelled" if there else "train"
    # One rank looks, or a server that fails for another one would leave this one waiting.
    found: Manifest = main_only(run.ranks, lambda: Manifest.load_split(path, split, cache))
    return found


def train_split(run: Run) -> Manifest:
    """The split `train`."""
    path, cache = _data(run), run.config.data.cache_dir
    found: Manifest = main_only(run.ranks, lambda: Manifest.load_split(path, "train", cache))
    return found


def _data(run: Run) -> str:
    path = run.config.data.path
    if path is None:
        raise UserError("--data is missing: name a folder made by python -m data.pack")
    return path


def labelled_splits(run: Run) -> dict[str, Manifest]:
    """Manifests of the splits that are there; their classes must agree.

    Raises:
        UserError: a split is broken, or its server does not say whether it is there.
    """
    data, cache = _data(run), run.config.data.cache_dir

    def load() -> dict[str, Manifest]:
        there = {"train": Manifest.load_split(data, "train", cache)}
        for split in ("val", "test"):
            if not is_remote(data) and not (Path(data) / split).exists():
                continue
            try:
                there[split] = Manifest.load_split(data, split, cache)
            except NotThere as error:
                run.info_once(
                    f"no {split} split, nothing is scored on it: {str(error).split(': ')[0]}"
                )
        return there

    # One rank decides, or they might disagree on what to score, and wait for each other.
    found: dict[str, Manifest] = main_only(run.ranks, load)
    for manifest in found.values():
        if manifest.classes != found["train"].classes:
            raise UserError(
                f"{manifest.root}: its classes are not those of the train split: pack both together"
            )
        if manifest.several != found["train"].several:
            raise UserError(
                f"{manifest.root}: its samples have {'lists of' if manifest.several else 'single'}"
                " labels, those of the train split not: pack both together"
            )
    if len(found) == 1:
        run.info_once(f"{data}: neither val nor test split: nothing will be scored")
    return found
