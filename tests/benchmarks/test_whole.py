"""The benchmarks of a whole run and of the start: real processes, a few steps."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import startup, whole
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.config import options as configuration
from selfdistill.launcher.examples import __main__ as example


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("digits") / "shards"
    example.main("images", str(place))
    return place


@pytest.mark.parametrize("stage", ["pretrain", "distill"])
def test_the_parts_of_a_start_make_up_the_whole(stage: str, shards: Path, tmp_path: Path) -> None:
    parts = startup.once([sys.executable], stage, shards, tmp_path / "run")
    total = parts.pop("in all")
    assert sum(parts.values()) == pytest.approx(total)
    assert min(parts.values()) > 0
    assert list(parts)[-1] == "workers, first step"
    assert ("teacher's pass" in parts) == (stage == "distill")
    (result,) = (tmp_path / "run").glob("*/result.json")
    assert result.parent.name.startswith(stage)


def test_the_plain_loop_does_all_stages_on_the_same_images(shards: Path, tmp_path: Path) -> None:
    whole.lay_out(shards, tmp_path / "raw")
    for name in ("train", "val", "test", "pool"):
        split = Manifest.load_split(str(shards), "train" if name == "pool" else name)
        images = sorted((tmp_path / "raw" / name).glob("*/*.png"))
        assert len(images) == split.samples
        for folder in (tmp_path / "raw" / name).iterdir():
            for image in sorted(folder.iterdir())[4:]:  # enough for a few steps
                image.unlink()
    told = configuration.load({"recipe": "quickstart"})
    settings = {s: getattr(told, s).model_dump(mode="json") for s in whole.STAGES}
    settings = {s: v | {"steps": 2, "warmup": 1} for s, v in settings.items()}
    for section in settings.values():
        section["batch"] = 8
    settings["finetune"]["seeds"] = 1
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(settings))
    model = str(whole.ROOT / "recipes" / "vit_small")
    found = whole.plain(tmp_path / "raw", tmp_path / "out", file, model, 32)
    assert 0 < sum(found[s] for s in whole.STAGES) < found["total"]
    for stage in ("pretrain", "distill", "finetune-0"):
        assert (tmp_path / "out" / stage / "model.safetensors").exists()
    said = json.loads((tmp_path / "out.log").read_text().splitlines()[-1])
    assert len(said["scores"]) == 1
