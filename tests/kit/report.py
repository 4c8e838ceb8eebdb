"""Sweeps whose results are made up, and ways to look into a report."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from selfdistill.experiments import state
from selfdistill.experiments.jobs import Job
from selfdistill.experiments.report.blocks import (
    Block,
    Code,
    Entry,
    Fold,
    Grid,
    Report,
    Section,
    Text,
)
from selfdistill.experiments.state import Asked, Sweep

#: Began at this second of 2025.
BEGAN = 1_750_000_000.0


def pack(root: Path, *names: str) -> Path:
    """A data_root that plan takes for one with these sets."""
    for name in names:
        for split in ("train", "val"):
            (root / name / split).mkdir(parents=True, exist_ok=True)
            (root / name / split / "manifest.json").write_text("{}")
    return root


def sweep_of(root: Path, data: Iterable[str], *asked: Asked, profile: str = "small") -> Sweep:
    """A sweep of which nothing has been run."""
    made = Sweep(root / "sweep", profile, pack(root / "shards", *data), None, list(asked))
    made.save()
    return made


def figure(job: Job, seed: int, classes: int = 12) -> dict[str, Any]:
    """A fine-tuning's result.json: every number follows from the job's name and the seed."""
    told = np.random.default_rng([seed, *job.name.encode()])
    shift = {"self_distillation": 0.05, "further_pretraining": 0.02}
    name = job.name.partition("/")[2].partition(",")[0].removeprefix("search/").partition("/")[0]
    score = 0.7 + shift.get(name, 0.0) + 0.01 * told.standard_normal()
    metric = "macro_f1" if job.dataset.kind == "text" else "accuracy"
    val = {"val_accuracy": score - 0.01, "val_macro_f1": score - 0.02, "val_samples": 200}
    test = {"test_accuracy": score, "test_macro_f1": score - 0.005, "test_samples": 400}
    each = np.clip(score + 0.15 * told.standard_normal(classes), 0, 1)
    return {
        "stage": job.leaves.rpartition("/")[2],
        "seed": seed,
        "seconds": 60 + 5 * told.random(),
        "metric": metric,
        "metrics": val | ({} if "/search/" in job.name else test),
        "analysis": {
            "train_loss": 1e-4 * (1 + told.random()),
            "test_loss": 1.5 - score + 0.05 * told.random(),
            "gap": 1.4 - score,
            "distance_from_init": 3.0 + told.random(),
            "feature_drift": 40 + told.random(),
            "feature_cosine": 0.8 + 0.01 * told.random(),
            "per_class_accuracy": {
                "test": {f"class {i}": float(v) for i, v in enumerate(each)} | {"empty": None}
            },
        },
        "device": "cpu",
        "world": 1,
        "precision": "fp32",
        "zero": "zero1",
        "versions": {"torch": "2.11.0", "deepspeed": "0.19.8", "timm": "1.0.20"},
    }


def finish(root: Path, job: Job, seeds: int | None = None) -> None:
    """Writes what a job leaves when it is complete, or only some of its seeds."""
    leaves = root / job.leaves
    whole = seeds is None or seeds >= job.seeds
    if job.stage != "finetune":
        seconds = {"decoder": 20.0, "pretrain": 100.0, "distill": 350.0}[job.stage]
        result: dict[str, Any] = {"stage": job.stage, "seed": 0, "seconds": seconds}
        write(leaves / "result.json", result | {"device": "cpu", "versions": {"torch": "2.11.0"}})
    elif job.seeds == 1:
        seed = int(job.words.get("seed", 0))
        write(leaves / "result.json", figure(job, seed))
    else:
        count = job.seeds if seeds is None else seeds
        first = int(job.words.get("seed", 0))
        results = [figure(job, seed) for seed in range(first, first + count)]
        for one in results:
            write(leaves / f"seed-{one['seed']}" / "result.json", one)
        if whole:
            means = {
                k: float(np.mean([r["metrics"][k] for r in results])) for k in results[0]["metrics"]
            }
            told = {"n": count, "metric": results[0]["metric"], "metrics": means}
            write(leaves / "result.json", told | {"seconds": sum(r["seconds"] for r in results)})
    if whole:
        note(root, job, "done")


def note(root: Path, job: Job, status: str, message: str = "") -> None:
    """Writes a job's record."""
    told = {"command": ["--stage", job.stage], "began": BEGAN, "status": status}
    write(state.record(root, job), told | {"message": message, "seconds": 90.0})


def write(path: Path, told: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))


def run_all(sweep: Sweep, but: Callable[[Job], bool] = lambda _: False) -> None:
    """Completes every job but some."""
    for job in sweep.plan().ordered():
        if not but(job):
            finish(sweep.root, job)


def example(root: Path) -> Sweep:
    """A sweep with everything in it: complete, failed, blocked, under way, missing, curves."""
    data = ["flowers_64", "dtd10_64", "xray_64", "scierc", "acl_arc"]
    data += ["cifar100_1000", "cifar100_2500", "cifar100_5000", "cifar100"]
    images = ("flowers_64", "dtd10_64", "xray_64", "cub")
    sweep = sweep_of(
        root,
        data,
        Asked("table1", images),
        Asked("table2", ("scierc", "acl_arc")),
        Asked("table4", images[:3]),
        Asked("table3", ("scierc",)),
        Asked("figure4", images[:2]),
        Asked("figure3", ("cifar100_1000", "cifar100_2500", "cifar100_5000", "cifar100")),
        Asked("cost", ("flowers_64",)),
        Asked("figure1", ("flowers_64",)),
    )
    fails = {"xray_64/r3f", "acl_arc/distill"}
    waits = ("acl_arc/search/self_distillation", "acl_arc/self_distillation")

    def left(job: Job) -> bool:
        if job.name in fails:
            finish(sweep.root, job, 2) if job.stage == "finetune" else None
            note(sweep.root, job, "failed", "RuntimeError: loss is <nan> | step 12")
        if job.name == "xray_64/mars":
            finish(sweep.root, job, 3)
            note(sweep.root, job, "running")
        return job.name in fails or job.name == "xray_64/mars" or job.name.startswith(waits)

    run_all(sweep, left)
    return sweep


def section(built: Report, key: str) -> Section:
    every = [s for one in built.sections for s in (one, *one.parts)]
    return next(one for one in every if one.key == key)


def grids(blocks: Iterable[Block]) -> list[Grid]:
    found = []
    for block in blocks:
        if isinstance(block, Grid):
            found.append(block)
        elif isinstance(block, Fold):
            found += grids(block.blocks)
    return found


def said(one: Section) -> str:
    """All that a section says outside of its tables."""
    return "\n".join(
        part for b in one.blocks for part in (b.parts if isinstance(b, Text) else ())
    ) + "\n".join(line for b in one.blocks if isinstance(b, Code) for line in b.lines)


def look(grid: Grid, row: str, column: str, under: int = 0) -> Entry:
    """An entry by the names of its row and column; `under`: lines below that row."""
    at = [e.text for e in grid.head].index(column)
    number = [line.entries[0].text for line in grid.lines].index(row)
    return grid.lines[number + under].entries[at]


def stands(sweep: Sweep) -> Counter[str]:
    """How many jobs stand where."""
    return Counter(state.status(sweep.root, job) for job in sweep.plan().ordered())


def numbers(text: str) -> list[float]:
    return [float(n.replace("−", "-")) for n in re.findall(r"[−+]?\d+\.\d+", text)]


def scores(sweep: Sweep, name: str, key: str = "accuracy") -> list[float]:
    """Test scores of a fine-tuning in %, read from its files."""
    found = {}
    for path in (sweep.root / name).glob("finetune*/seed-*/result.json"):
        told = json.loads(path.read_text())
        found[told["seed"]] = 100 * told["metrics"][f"test_{key}"]
    return [found[seed] for seed in sorted(found)]


class Tags(HTMLParser):
    """Refuses a page whose tags do not match, and collects what it refers to."""

    EMPTY = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.rows: list[int] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        told = dict(attrs)
        self.ids += [v for k, v in attrs if k == "id" and v]
        self.links += [v for k, v in attrs if k in ("href", "src", "xlink:href", "data") and v]
        assert not any(k.startswith("on") for k in told), told
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += 1
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
