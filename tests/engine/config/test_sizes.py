"""Sizes of images as they are typed, in recipes, and in the file that a run leaves."""

import tomllib
from pathlib import Path

import pytest

from selfdistill.data.errors import UserError
from selfdistill.engine.config.options import help_text, load, parse


@pytest.mark.parametrize(
    ("typed", "size"), [("224", 224), ("224x448", (224, 448)), ("32x32", 32), ("(3,4)", (3, 4))]
)
def test_a_size_survives_the_runs_file(tmp_path: Path, typed: str, size: object) -> None:
    for option in ("model.image_size", "model.shape.image_size"):
        config = load(parse([f"--{option}", typed]))
        left = config.model if option == "model.image_size" else config.model.shape
        assert left.image_size == size
        recipe = tmp_path / "again.toml"
        recipe.write_text(config.toml())
        told = tomllib.loads(recipe.read_text())["model"]
        kept = told if option == "model.image_size" else told["shape"]
        assert kept["image_size"] == (list(size) if isinstance(size, tuple) else size)
        assert load({"recipe": str(recipe)}).model == config.model
        recipe.write_text(f'[model]\nimage_size = "{typed}"\n')
        if "(" not in typed:
            assert load({"recipe": str(recipe)}).model.image_size == size


@pytest.mark.parametrize("typed", ["224x", "0x30", "16.5", "many", "1,2,3", "true", "0", "-8"])
def test_what_is_none_is_refused(typed: str) -> None:
    for option in ("model.image_size", "model.shape.image_size"):
        with pytest.raises(UserError, match=rf"command line: --{option} .*: give ") as caught:
            load(parse([f"--{option}={typed}"]))
        assert "\n" not in str(caught.value)


def test_help_shows_the_values_of_a_recipe() -> None:
    def steps(*words: str) -> str:
        page = help_text(words).splitlines()
        assert "defaults: those of " in page[-2]
        return next(line.split()[-1] for line in page if line.startswith("  --pretrain.steps "))

    own = load({"recipe": "vit_small"}).pretrain.steps
    assert steps("--help") == "[20000]"
    assert steps("--recipe", "vit_small") == steps("--recipe=vit_small") == f"[{own}]"


def test_help_says_both() -> None:
    lines = [line for line in help_text().splitlines() if "image_size" in line]
    assert len(lines) == 2
    assert all("int|HEIGHTxWIDTH" in line for line in lines)


def test_cuda_graphs_over_several_micro_batches_are_refused() -> None:
    asked = {"compile": True, "compile_mode": "reduce-overhead", "pretrain.accumulation": 2}
    with pytest.raises(UserError, match=r"reduce-overhead: not with pretrain\.accumulation 2"):
        load(asked)
    load(asked | {"compile_mode": "default"})
    load(asked | {"pretrain.accumulation": 1})


@pytest.mark.parametrize(
    "typed", ["run#2", "1.10", "2024_11_30", "1e3", "(run)", "5.", "a,b", "007"]
)
def test_a_path_stays_as_it_is_typed(typed: str) -> None:
    config = load(parse(["--output", typed, "--data", typed, "--model", typed]))
    assert config.output == config.data.path == config.model.path == typed


def test_two_starts_of_one_fine_tuning_are_refused() -> None:
    for asked, told in (
        ({"stage": "all", "finetune.weights": "x"}, "take --stage finetune"),
        ({"stage": "finetune", "finetune.weights": "x", "finetune.start": "model"}, "two starts"),
        ({"stage": "all", "compare": True, "finetune.start": "pretrain"}, "from all starts"),
    ):
        with pytest.raises(UserError, match=told):
            load(asked)
    load({"stage": "finetune", "finetune.weights": "x"})
