"""What users get wrong: each gives one line with the cure and exit code 2, never a traceback."""

import fcntl
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selfdistill.data import pack
from tests.kit.launches import COMMON, ROOT, environment, launch, make_base, make_images

pytestmark = pytest.mark.multi


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    make_images(root / "images")
    shards = root / "shards"
    pack.pack(str(root / "images"), str(shards))
    make_base(root / "base")
    make_base(root / "wide", width=32)
    make_base(root / "large", size=32)

    def broken(name: str) -> Path:
        return shutil.copytree(shards, root / name)

    next((broken("missing") / "train").glob("*.tar")).unlink()
    tar = next((broken("truncated") / "train").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    tar = next((broken("flipped") / "train").glob("*.tar"))
    content = bytearray(tar.read_bytes())
    offset, length = np.load(tar.parent / "members.npy")[0, :2]
    content[offset + length // 2] ^= 0xFF  # inside the first image
    tar.write_bytes(content)
    manifest = broken("foreign") / "train" / "members.npy"
    manifest.write_bytes((shards / "val" / "members.npy").read_bytes())
    other = broken("classes") / "val" / "manifest.json"
    other.write_text(other.read_text().replace('"red"', '"reddish"'))

    flat = root / "flat"
    flat.mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(flat / f"{i}.png")
    pack.pack(str(flat), str(root / "unlabelled"), unlabelled=True)

    (root / "bad.toml").write_text("steps = = 3")
    (root / "odd.toml").write_text("[pretrain]\nstep = 3\n")
    (root / "command.toml").write_text(f"[data]\npath = 'pipe:touch {root}/ran; cat'\n")
    (root / "zero.json").write_text('{"optimizer": {"type": "Adam"}}')
    (root / "broken.json").write_text("{")
    (root / "nine.json").write_text('{"zero_optimization": {"stage": 9}}')
    (root / "flat.json").write_text(
        '{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}'
    )
    (root / "strange.json").write_text('{"zero_optimization": {"stage": 1, "no_such_key": 1}}')
    (root / "bert").mkdir()
    (root / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (root / "evil.pth").write_bytes(pickle.dumps({"model": print}))
    (root / "file").write_text("not a folder")
    (root / "empty-class" / "a").mkdir(parents=True)
    (root / "empty-class" / "b").mkdir()
    (root / "empty-class" / "b" / "1.heic").touch()
    Image.new("RGB", (9, 9)).save(root / "empty-class" / "a" / "1.png")
    (root / "text" / "a").mkdir(parents=True)
    (root / "text" / "a" / "1.png").write_text("no image")
    (root / "wrong.csv").write_text("file,class\nx.png,a\n")
    return root


def engine(root: Path, stage: str = "pretrain", **more: object) -> tuple[str, list[str]]:
    table = {
        "stage": stage,
        "data": root / "shards",
        "model": root / "base",
        "output": root / "runs" / "x",
        "overwrite": True,
    }
    table = COMMON | table | more
    words = [w for k, v in table.items() if v is not None for w in (f"--{k}", str(v))]
    return "engine", words


def table(root: Path) -> list[tuple[str, tuple[str, list[str]], str]]:
    """(name, call, a piece of the line that must come)."""
    r = root
    distill = {"stage": "distill", "teacher": r / "base"}
    tune = {"stage": "finetune", "finetune.start": "model"}
    supcon = {"pretrain.objective": "supcon"}
    return [
        (
            "unknown option",
            engine(r, **{"distil.feature": "cls"}),
            "did you mean --distill.feature",
        ),
        ("option without its section", engine(r, steps=3), "--pretrain.steps"),
        ("unknown option of a recipe", engine(r, recipe=r / "odd.toml"), "pretrain.step"),
        ("a length of none", engine(r, **{"finetune.steps": 0}), "finetune.steps 0: Input should"),
        ("a comparison of one", engine(r, stage="finetune", compare=True), "for --stage all"),
        ("no labels", engine(r, stage="all", data=r / "unlabelled"), "has no labels: fine-tuning"),
        ("a recipe's command", engine(r, recipe=r / "command.toml"), "the command line alone"),
        ("wrong type", engine(r, **{"pretrain.steps": "many"}), "valid integer"),
        ("fraction for a whole number", engine(r, **{"pretrain.steps": 2.5}), "valid integer"),
        ("negative rate", engine(r, **{"pretrain.lr": -1}), "greater than 0"),
        ("updates of no rank", engine(r, adapt="lora", **{"lora.rank": 0}), "lora.rank 0: Input"),
        (
            "updates as wide as the model",
            engine(r, adapt="lora", **{"lora.rank": 24}),
            "--lora.rank 24: the encoder's layers are 24 wide",
        ),
        ("no such way to adapt", engine(r, adapt="qlora"), "'full', 'attention' or 'lora'"),
        ("wrong choice", engine(r, "pretain"), "'pretrain', 'distill'"),
        ("two lengths", engine(r, **{"pretrain.epochs": 2}), "give steps or epochs"),
        ("a word too much", ("engine", ["pretrain", "--stage", "all"]), "belongs to no option"),
        ("one dash", ("engine", ["-stage", "all"]), "two dashes"),
        (
            "option without a value",
            ("engine", ["--pretrain.lr", "--seed", "3"]),
            "--pretrain.lr has no value",
        ),
        ("last option without one", ("engine", ["--seed", "3", "--output"]), "--output has no"),
        ("option given twice", ("engine", ["--seed", "3", "--seed=4"]), "--seed is given twice"),
        ("beta of 2", engine(r, **{"pretrain.betas": "0.9,2.0"}), "at least 0 and below 1"),
        ("warm-up as long as the stage", engine(r, **{"pretrain.warmup": 5}), "has 5 steps"),
        (
            "warm-up as long as a later stage: told before any data are looked for",
            engine(r, "all", **{"finetune.steps": 7, "finetune.warmup": 7, "data": r / "nowhere"}),
            "--finetune.warmup 7: the stage has 7 steps",
        ),
        ("recipe for texts, data of images", engine(r, recipe="roberta_base"), "recipe for texts"),
        ("unknown recipe", engine(r, recipe="vit_bas"), "did you mean vit_base"),
        ("recipe is not TOML", engine(r, recipe=r / "bad.toml"), "not valid TOML"),
        ("no output", engine(r, output=None), "--output is missing"),
        ("no data", engine(r, data=None), "--data is missing"),
        ("no such data", engine(r, data=r / "nowhere"), "nowhere"),
        ("a name of two lines", engine(r, data=r / "no\nwhere"), "no where"),
        ("images that are not packed", engine(r, data=r / "images"), "data.pack"),
        ("missing shard", engine(r, data=r / "missing"), ".tar"),
        ("truncated shard", engine(r, data=r / "truncated"), ".tar"),
        ("flipped byte", engine(r, data=r / "flipped"), ".tar"),
        ("foreign index", engine(r, data=r / "foreign"), "members.npy"),
        ("no model", engine(r, model=None, output=r / "runs/none"), "--model is missing"),
        ("no such model", engine(r, model=r / "nowhere"), "nowhere"),
        (
            "hub cannot be reached",
            engine(r, model="facebook/vit-mae-none"),
            "facebook/vit-mae-none",
        ),
        ("a model of another kind", engine(r, model=r / "bert"), "bert"),
        ("weights that are a program", engine(r, model=r / "evil.pth"), "evil.pth"),
        ("uneven batch", engine(r, **{"pretrain.accumulation": 3}), "multiple of 3, such as 9"),
        ("uneven partitions", engine(r, **{"data.partitions": 3}), "partitions"),
        ("no such ZeRO setting", engine(r, zero="zero5"), "zero"),
        ("ZeRO file sets the optimiser", engine(r, zero=r / "zero.json"), "remove 'optimizer'"),
        ("no such ZeRO stage", engine(r, zero=r / "nine.json"), "give 0, 1, 2 or 3"),
        ("ZeRO section of a wrong type", engine(r, zero=r / "flat.json"), "must be an object"),
        ("unknown key of DeepSpeed's", engine(r, zero=r / "strange.json"), "DeepSpeed refuses it"),
        ("ZeRO file is not JSON", engine(r, zero=r / "broken.json"), "not valid JSON"),
        *(
            [("no fp16 on a CPU", engine(r, precision="fp16"), "take bf16 or fp32")]
            if not torch.cuda.is_available()
            else []
        ),
        ("images of another size", engine(r, model=r / "large"), "--size 32"),
        (
            "images of another height",
            engine(r, **{"model.image_size": "16x24"}),
            "holds 16x16 images, the model takes 16x24: pack with --size 16x24, or give",
        ),
        (
            "sides that patches do not fill",
            engine(r, **{"model.image_size": "30x48"}),
            "image size 30x48 is not a multiple of patch size 4: take 32x48",
        ),
        ("a height alone", engine(r, **{"model.image_size": "224x"}), "such as 224x448"),
        ("no height", engine(r, **{"model.image_size": "0x3"}), "0x3: give sides of 1 to 32768"),
        (
            "distil without a teacher",
            engine(r, "distill", output=r / "runs/new"),
            "--stage pretrain",
        ),
        ("no such teacher", engine(r, **(distill | {"teacher": r / "nowhere"})), "nowhere"),
        ("teacher of another shape", engine(r, **(distill | {"teacher": r / "wide"})), "width 32"),
        ("nothing to fine-tune", engine(r, "finetune", output=r / "runs/new"), "--stage distill"),
        (
            "fine-tuning without labels",
            engine(r, "finetune", data=r / "unlabelled", **{"finetune.start": "model"}),
            "no labels",
        ),
        ("kept by no probe", engine(r, **{"pretrain.keep": "best"}), "give --probe.every, auto or"),
        (
            "stopped by no scores",
            engine(r, "finetune", **{"finetune.patience": 3}),
            "--finetune.patience 3 goes by the scores of val",
        ),
        ("probed never", engine(r, **{"probe.every": "soon"}), "--probe.every soon: give a number"),
        ("no such start", engine(r, **{"finetune.start": "distil-1"}), "or distill-N (a round)"),
        (
            "a round that is not there",
            engine(r, "finetune", output=r / "runs/new", **{"finetune.start": "distill-2"}),
            "--stage distill --rounds 2 first",
        ),
        (
            "no such regularizer",
            engine(r, **(tune | {"finetune.regularizer": "marz"})),
            "'recadam', 'mars'",
        ),
        (
            "compiled under ZeRO-3",
            engine(r, **{"compile": True, "zero": "zero3"}),
            "take zero0, zero1 or zero2",
        ),
        (
            "rows under ZeRO-3",
            engine(r, **(tune | {"finetune.regularizer": "mars", "zero": "zero3"})),
            "take zero0, zero1 or zero2",
        ),
        (
            "rows under offload",
            engine(r, **(tune | {"finetune.regularizer": "mars", "zero": "zero3_offload"})),
            "take zero0, zero1 or zero2",
        ),
        (
            "a pull that overshoots",
            engine(r, **(tune | {"finetune.regularizer": "recadam", "recadam.c": 1e6})),
            "give at most --recadam.c 19880",
        ),
        ("contrasts without labels", engine(r, data=r / "unlabelled", **supcon), "has no labels"),
        (
            "contrasts of unlabelled samples",
            engine(r, **(supcon | {"data.split": "unlabelled"})),
            "--data.split unlabelled has no labels",
        ),
        (
            "contrasts of several sets",
            engine(r, **(supcon | {"data.mix": f"{r / 'shards'}:0.3"})),
            "other sets mixed in (--data.mix)",
        ),
        (
            "contrasts in parts",
            engine(r, **(supcon | {"pretrain.accumulation": 2})),
            "cuts into parts: take 1",
        ),
        (
            "a table of predictions",
            engine(r, **(distill | {"distill.match": "prediction", "teacher.mode": "cached"})),
            "take --teacher.mode replicated",
        ),
        (
            "shards of a teacher of predictions",
            engine(r, **(distill | {"distill.match": "prediction", "teacher.mode": "sharded"})),
            "take --teacher.mode replicated",
        ),
        (
            "weights that are cut",
            engine(r, **(distill | {"distill.match": "weights_mars", "zero": "zero3"})),
            "take zero0, zero1 or zero2",
        ),
        (
            "neither term",
            engine(r, **(distill | {"distill.weight": 0, "distill.mae_weight": 0})),
            "both 0",
        ),
        (
            "splits with other classes",
            engine(r, "finetune", data=r / "classes", **{"finetune.start": "model"}),
            "classes",
        ),
        ("output is a file", engine(r, output=r / "file"), "file"),
        ("output below a file", engine(r, output=r / "file" / "x"), "choose another folder"),
        ("no permission", engine(r, output="/sys/selfdistill"), "choose another folder"),
        ("run folder in use", engine(r, output=r / "runs" / "busy"), "in use by another launch"),
        (
            "a loss that is not finite",
            engine(r, **{"pretrain.lr": 1e30}),
            "lower the learning rate",
        ),
        ("pack: no source", ("data.pack", [str(r / "nowhere"), str(r / "o")]), "nowhere"),
        (
            "pack: output exists",
            ("data.pack", [str(r / "images"), str(r / "shards")]),
            "--overwrite",
        ),
        (
            "pack: a class without images",
            ("data.pack", [str(r / "empty-class"), str(r / "o")]),
            "b",
        ),
        ("pack: not an image", ("data.pack", [str(r / "text"), str(r / "o")]), "1.png"),
        ("pack: wrong columns", ("data.pack", [str(r / "wrong.csv"), str(r / "o")]), "path"),
        ("pack: unknown option", ("data.pack", ["a", "b", "--sise", "3"]), "--size"),
        (
            "verify: truncated",
            ("data.verify", [str(r / "truncated")]),
            "named above, with the cure",
        ),
        (
            "compare: nothing there",
            ("launcher.compare", [str(r / "file")]),
            "no complete fine-tuning",
        ),
    ]


def test_each_mistake_gives_one_line_and_exit_code_2(root: Path) -> None:
    cases = table(root)
    file = root / "table.json"
    file.write_text(json.dumps([call for _, call, _ in cases]))
    busy = root / "runs" / "busy"
    busy.mkdir(parents=True)
    with open(busy / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "tests/kit/run_table.py", str(file)],
            cwd=ROOT,
            # Newer CPUs can do fp16: here none can.
            env=environment(HF_HUB_OFFLINE="1", ONEDNN_MAX_CPU_ISA="AVX2"),
            capture_output=True,
            text=True,
            timeout=600,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    wrong = []
    for (name, _, piece), (code, text) in zip(
        cases, json.loads(file.with_suffix(".out").read_text()), strict=True
    ):
        # The last line, too: what a message goes on to say below its first line is seen here.
        last = (text.splitlines() or [""])[-1]
        errors = [x for x in text.splitlines() if x.startswith("error: ")]
        if code != 2 or errors != [last] or piece not in last or "Traceback" in text:
            wrong.append(f"{name}: exit {code}, wanted {piece!r}, got:\n{text[-1500:]}")
    assert not wrong, "\n\n".join(wrong)


def test_every_rank_fails_but_the_line_comes_once(root: Path) -> None:
    _, words = engine(root, **{"pretrain.accumulation": 3})
    done = launch("engine/run.py", *words, ranks=2)
    assert done.returncode == 2
    assert (done.stdout + done.stderr).count("error: batch 8 cannot be cut evenly") == 1
    assert "Traceback" not in done.stdout + done.stderr


def test_one_rank_meets_broken_data_and_the_others_say_nothing(root: Path) -> None:
    _, words = engine(root, data=root / "flipped", output=root / "runs" / "one")
    done = launch("engine/run.py", *words, ranks=2)
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed[-3000:]
    assert "Traceback" not in printed, printed[-3000:]
    assert sum(line.startswith("error: ") for line in printed.splitlines()) == 1, printed[-3000:]
    assert "error: shard " in printed


def test_a_full_disk_leaves_the_old_checkpoint(root: Path) -> None:
    """On a real file system of one megabyte, in a mount namespace of its own."""
    disk = root / "disk"
    disk.mkdir()
    _, words = engine(
        root, output=disk / "run", overwrite=False, save_every=1, keep=50, **{"pretrain.steps": 50}
    )
    inner = f"mount -t tmpfs -o size=1m tmpfs {disk} && {sys.executable} engine/run.py "
    inner += " ".join(words)
    inner += f"; code=$?; ls {disk}/run/pretrain/checkpoints; exit $code"
    flags = ["-m"] if os.geteuid() == 0 else ["-rm"]
    done = subprocess.run(
        ["unshare", *flags, "sh", "-c", inner],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.count("error: ") == 1
    assert "free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert "step-00000001" in done.stdout
    assert "draft" not in done.stdout
