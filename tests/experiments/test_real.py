"""Profile real: encoders without a decoder, folders of models, lengths in passes."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from selfdistill.data.errors import UserError
from selfdistill.engine.config import options as configuration
from selfdistill.experiments import run as experiments_run
from selfdistill.experiments import state
from selfdistill.experiments.plan import Plan
from selfdistill.experiments.report import __main__ as report
from selfdistill.experiments.report import sweep as report_sweep
from selfdistill.experiments.spec import Profile, Specs
from selfdistill.experiments.state import Asked, Sweep
from tests.experiments.test_in_process import CHANCE, Jobs, weights
from tests.kit.experiments import command, make_specs, make_table
from tests.kit.launches import ROOT, environment
from tests.kit.report import grids, pack, section
from tests.kit.texts import make_language, make_texts, make_tokenizer

SHORT = CHANCE | {"decoder.steps": 3, "decoder.batch": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image and a text set, and encoders without a decoder: models/NAME."""
    root = tmp_path_factory.mktemp("real")
    my = make_specs(root)
    make_texts(root / "shards" / "words")
    (my / "datasets" / "words.toml").write_text('title = "words"\nkind = "text"\n')
    models = root / "models"
    shutil.copytree(root / "world" / "base", models / "eye")
    file = models / "eye" / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not k.startswith("decoder.")}
    save_file(tensors, file, metadata={"format": "pt"})
    whole = make_language(root / "language")
    reader = AutoModel.from_pretrained(whole, add_pooling_layer=False)
    reader.save_pretrained(models / "reader")
    make_tokenizer().save_pretrained(models / "reader")
    parts = ['title = "bare"']
    for kind, recipe, model in (("image", "vit_small", "eye"), ("text", "roberta_small", "reader")):
        options = SHORT | {"model.path": f"somebody/{model}"}
        lines = [f'"{k}" = {json.dumps(v)}' for k, v in options.items()]
        parts += [f'[{kind}]\nrecipe = "{recipe}"\ndecoder = true', f"[{kind}.options]", *lines]
    (my / "profiles" / "bare.toml").write_text("\n".join(parts) + "\n")
    make_table(my, "both", ["self_distillation"], ["colours", "words"])
    return root


def words_of(root: Path, output: Path, *more: str) -> list[str]:
    words = command(root, "both", "--jobs", "1", "--models", str(root / "models"), *more)
    for name, value in (("--profile", "bare"), ("--output", str(output))):
        words[words.index(name) + 1] = value
    return words


@pytest.mark.multi
def test_stage_0_is_done_once_and_serves_as_in_one_launch(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle: `--stage all`, which trains a decoder and keeps it in its own run."""
    monkeypatch.setenv("SELFDISTILL_DECODERS", str(tmp_path / "shelf"))
    words = words_of(root, tmp_path / "sweep", "--in_process")
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list((tmp_path / "shelf").iterdir())) == 2
    monkeypatch.setenv("SELFDISTILL_DECODERS", str(tmp_path / "other"))
    oracle = Jobs(tmp_path / "whole", root)
    own = {
        "decoder__steps": 3,
        "decoder__batch": 8,
        "finetune__start": "auto",
        "finetune__seeds": 2,
    }
    for kind, data, model in (("image", "colours", "eye"), ("text", "words", "reader")):
        code = oracle.do(data, "all", kind, model__path=root / "models" / model, **own)
        assert code == 0, (tmp_path / "whole" / f"{data}.log").read_text()[-3000:]
        for job, stage in (
            ("decoder", "decoder"),
            ("pretrain", "pretrain"),
            ("distill", "distill-1"),
            ("self_distillation", "finetune"),
        ):
            found = weights(tmp_path / "sweep" / data / job / stage)
            assert found, job
            assert found == weights(tmp_path / "whole" / data / stage), (data, job)
    assert oracle.worker
    oracle.worker.close()


def planned(root: Path, *asked: Asked, profile: str = "bare", **more: Path) -> Plan:
    made = Sweep(root / "planned", profile, root / "shards", root / "my", [], **more)
    return made.plan(list(asked))


def test_one_decoder_serves_a_data_set(root: Path) -> None:
    asked = [Asked(name, ("colours",)) for name in ("table3", "table5", "figure1")]
    jobs = {job.name: job for job in planned(root, *asked).ordered()}
    assert [name for name in jobs if "decoder" in name] == ["colours/decoder"]
    for job in jobs.values():
        expected = (
            None if job.stage in ("decoder", "finetune") else "colours/decoder/decoder/export"
        )
        assert job.base == expected, job.name
    told = jobs["colours/distill"].command(root, root / "shards")
    assert told[told.index("--model.path") + 1] == f"{root}/colours/decoder/decoder/export"
    told = jobs["colours/self_distillation"].command(root, root / "shards")
    assert told[told.index("--model.path") + 1] == "somebody/eye"


def test_a_folder_of_models_takes_the_hubs_place(root: Path, tmp_path: Path) -> None:
    models = root / "models"
    jobs = planned(root, Asked("both"), models=models).ordered()
    found = {job.words["model.path"] for job in jobs}
    assert found == {str(models / "eye"), str(models / "reader")}
    shutil.copytree(models / "eye", tmp_path / "eye")
    with pytest.raises(UserError, match="holds no folder reader, for somebody/reader"):
        planned(root, Asked("both"), models=tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        experiments_run.main("both", data_root=str(root), models=str(tmp_path / "none"))


def test_a_record_goes_on_where_the_models_lie_elsewhere(root: Path, tmp_path: Path) -> None:
    shards, moved = root / "shards", tmp_path / "moved"
    shutil.copytree(root / "models", moved)
    (moved / "reader").rename(moved / "other")
    shutil.copytree(root / "models" / "reader", moved / "reader")
    asked = Asked("both", only=("words",))
    job = planned(root, asked, models=root / "models").ordered()[0]
    words = job.command(tmp_path, shards)
    state.begin(tmp_path, job, words, shards, root / "models")
    (tmp_path / job.leaves).mkdir(parents=True)
    (tmp_path / job.leaves / "state.json").write_text("{}")
    job = planned(root, asked, models=moved).ordered()[0]
    there = job.command(tmp_path, shards)
    assert there != words
    state.check(tmp_path, job, there, shards, moved)
    there[there.index("--model.path") + 1] = str(moved / "other")
    with pytest.raises(UserError, match=r"made with --model\.path reader, now it is other"):
        state.check(tmp_path, job, there, shards, moved)


def test_the_precision_is_that_of_the_call(root: Path, tmp_path: Path) -> None:
    places: dict[str, Any] = {"data_root": str(root / "shards"), "specs": str(root / "my")}
    places |= {"profile": "bare", "models": str(root / "models"), "output": str(tmp_path / "s")}
    sweep = Sweep(tmp_path / "s", "bare", root / "shards", root / "my", [], precision="bf16")
    sweep.models = root / "models"
    assert {j.words["precision"] for j in sweep.plan([Asked("both")]).ordered()} == {"bf16"}
    sweep.save()
    assert Sweep.open(sweep.root) == sweep
    experiments_run.main("both", precision="bf16", dry_run=True, **places)
    with pytest.raises(UserError, match="holds experiments of --precision bf16: give the same"):
        experiments_run.main("both", precision="fp32", **places)


# --- the shipped profile


def length(options: dict[str, bool | int | float | str], stage: str, samples: int) -> int:
    steps: int = getattr(configuration.load(options), stage).length(samples)
    return steps


def test_its_lengths_are_passes(tmp_path: Path) -> None:
    """So that a part of a set has as much less of all stages, warm-up with it."""
    sets = pack(tmp_path / "shards", "scierc", "xray")
    made = Sweep(tmp_path / "s", "real", sets, None, [Asked("table1", ("xray",))])
    made.save()
    tables = [Asked("table1", ("xray",)), Asked("table2", ("scierc",)), Asked("figure1", ("xray",))]
    jobs = made.plan(tables).ordered()
    seen = set()
    for job in jobs:
        plan = getattr(configuration.load(job.words), job.stage)
        assert plan.steps is None, job.name
        assert plan.warmup < 1, job.name
        many, few = (length(job.words, job.stage, n) for n in (5000, 500))
        assert many == pytest.approx(10 * few, abs=6), job.name
        for samples in (50, 100):  # no warm-up is as long as its stage
            steps = length(job.words, job.stage, samples)
            plan.check_warmup(job.stage, steps)
            seen.add((job.stage, plan.warmup_steps(steps) < steps))
    assert len(seen) == 4
    told = section(report.build(report_sweep.read(made.root)), "settings")
    lengths = grids(told.blocks)[0].lines[0].entries[2].text
    assert "decoder: 30 passes in steps of 64; pretrain: 20 passes in steps of 64" in lengths
    usual, longer = (
        next(job.words for job in jobs if job.name == name)
        for name in ("xray/pretrain", "xray/pretrain,epochs=60.0")
    )
    assert length(longer, "pretrain", 640) == 3 * length(usual, "pretrain", 640)


@pytest.mark.parametrize("kind", ["image", "text"])
def test_rates_of_fine_tuning_are_the_same_for_all_methods(kind: str) -> None:
    scale = Specs().load(Profile, "real").of(kind)
    rates = scale.search["finetune.lr"]
    assert len(rates) > 2
    for name, tuning in scale.methods.items():
        assert not {"finetune.lr", "pretrain.lr", "distill.lr"} & set(tuning.search), name
