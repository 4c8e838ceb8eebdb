"""Time of a training step against its peers: `python -m benchmarks.step`.

Peers (benchmarks/peers/): the plain loop, structured as the paper's authors' code is, and
transformers' `Trainer` with DeepSpeed. Each contestant is a process of its own with the same
weights, batches and masks; rounds of a few steps alternate between them, so that what the machine
does beside meets all alike. Data are in memory: the loader has its own benchmark.
"""

import json
import subprocess
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from rich.progress import Progress

from benchmarks import record
from benchmarks.contestant import MARK
from benchmarks.sizes import SIZES, Stage
from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.monitoring.flops import peak_flops
from selfdistill.engine.runtime.zero import DTYPES

STAGES: tuple[Stage, ...] = ("pretrain", "distill", "finetune")


@dataclass
class Contestant:
    """A process and what it answered.

    Attributes:
        title: for the table.
        process: that runs rounds.
        rates: samples/s of each round.
        losses: of all steps.
        precision: of its matrix products.
        peak: bytes of memory in use at most in a timed round; on a CPU since it began.
        flops: of a sample, by PyTorch's counter.
        operations: that take longest: name, share of all time, calls; if they were asked for.
        failed: its last words, if it could not run.
    """

    title: str
    process: subprocess.Popen[str]
    precision: str
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    peak: int = 0
    flops: float = 0.0
    operations: list[tuple[str, float, int]] = field(default_factory=list)
    failed: str = ""
    _words: deque[str] = field(default_factory=lambda: deque(maxlen=20))

    def __post_init__(self) -> None:
        threading.Thread(target=self._listen, args=(self.process.stderr,), daemon=True).start()

    def _listen(self, stream: IO[str] | None) -> None:
        for line in stream or ():
            self._words.append(line.rstrip())

    def ask(self, word: str, steps: int) -> dict[str, Any]:
        """Has it run some steps."""
        if self.failed:
            return {}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):  # its last words say why
            self.process.stdin.write(f"{word} {steps}\n")
            self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line[len(MARK) :])
                self.losses += answer["losses"]
                return answer
        self.process.wait()
        self.failed = next((w for w in reversed(self._words) if w.strip()), "it died")
        return {}

    def close(self) -> None:
        """Ends it."""
        with suppress(BrokenPipeError):
            if self.process.stdin:
                self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(title: str, who: str, **options: Any) -> Contestant:
    """A contestant's process.

    Args:
        title: for the table.
        who: plain, trainer or ours.
        options: those of `benchmarks.contestant`.
    """
    words = [f"--{k}={v}" for k, v in options.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.contestant", f"--who={who}", *words],
        cwd=Path(__file__).resolve().parent.parent,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    return Contestant(title, process, options.get("precision", "fp32"))


def field_of(
    size: str, stage: Stage, batch: int, precision: str, variants: list[str], threads: int
) -> list[Contestant]:
    """Both peers, ours, and ours in other ways."""
    common = {"size": size, "stage": stage, "batch": batch, "threads": threads}
    found = [
        start("plain loop", "plain", **common),
        start(f"Trainer + DeepSpeed, {precision}", "trainer", precision=precision, **common),
        start(f"ours, {precision}", "ours", precision=precision, **common),
    ]
    for variant in variants:
        options = dict(part.partition("=")[::2] for part in variant.split("+"))
        title = "ours, " + ", ".join(f"{k} {v}" for k, v in options.items())
        found.append(start(title, "ours", **({"precision": precision} | common | options)))
    return found


def race(
    contestants: list[Contestant], batch: int, rounds: int, steps: int, profile: bool = False
) -> None:
    """Runs the rounds; the first, in which memory and kernels find their place, is not timed."""
    cuda = torch.cuda.is_available()
    with Progress(transient=True) as progress:
        task = progress.add_task("rounds", total=(rounds + 1) * len(contestants))
        for number in range(rounds + 1):
            for contestant in contestants:
                if cuda:  # whose memory the others filled: it takes its own again
                    contestant.ask("run", 1)
                answer = contestant.ask("run", steps)
                if number and answer:
                    contestant.rates.append(batch * steps / answer["seconds"])
                    contestant.peak = max(contestant.peak, answer["peak_bytes"])
                if cuda:
                    contestant.ask("rest", 0)
                progress.advance(task)
        for contestant in contestants:
            contestant.flops = contestant.ask("count", 1).get("flops", 0.0)
            if profile:
                contestant.operations = contestant.ask("profile", steps).get("operations", [])
            if cuda:
                contestant.ask("rest", 0)


def row(contestant: Contestant, base: Contestant, device: str) -> dict[str, Any]:
    """Figures of a contestant; `ratio` and `loss_difference` are against `base`."""
    peak = peak_flops(device, DTYPES[contestant.precision])
    if not contestant.rates or not base.rates:
        return {"name": contestant.title, "failed": contestant.failed}
    rate = record.spread(contestant.rates)
    both = list(zip(contestant.losses, base.losses, strict=False))
    # Rounds alternate: a pair of them met the same machine.
    ratios = [a / b for a, b in zip(contestant.rates, base.rates, strict=False)]
    return {
        "name": contestant.title,
        "samples_per_second": rate,
        "ratio": record.spread(ratios),
        "flops_per_sample": contestant.flops,
        "flops_per_second": contestant.flops * rate["median"],
        "mfu": None if peak is None else contestant.flops * rate["median"] / peak,
        "peak_bytes": contestant.peak,
        "first_loss": contestant.losses[0],
        "loss_difference": max((abs(a - b) / abs(b) for a, b in both), default=None),
    }


def table(rows: list[dict[str, Any]], base: str) -> str:
    """The rows as Markdown."""
    columns = ["", "samples/s, median (min to max)", "n", f"ratio to {base}", "GFLOP a sample"]
    columns += ["GFLOP/s", "MFU", "peak GiB", "loss differs by"]
    lines = []
    for one in rows:
        if "failed" in one:
            lines.append([one["name"], f"failed: {one['failed'][:100]}", *[""] * 7])
            continue
        rate, ratio = one["samples_per_second"], one["ratio"]
        against = f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})"
        lines.append(
            [
                one["name"],
                f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})",
                str(rate["n"]),
                against,
                f"{one['flops_per_sample'] / 1e9:.3f}",
                f"{one['flops_per_second'] / 1e9:.0f}",
                "" if one["mfu"] is None else f"{100 * one['mfu']:.1f}%",
                f"{one['peak_bytes'] / 2**30:.2f}",
                f"{one['loss_difference']:.1e}",
            ]
        )
    return record.markdown(columns, lines)


def profiled(contestant: Contestant) -> str:
    """Where a contestant's time goes, as Markdown."""
    lines = [[f"`{n}`", f"{100 * s:.1f}%", str(c)] for n, s, c in contestant.operations]
    return f"{contestant.title}:\n\n" + record.markdown(
        ["operation", "of the time", "calls"], lines
    )


def main(
    size: str = "small",
    stages: str = "pretrain,distill,finetune",
    batch: int | None = None,
    rounds: int = 7,
    steps: int = 3,
    precision: str | None = None,
    variants: str = "",
    threads: int = 0,
    profile: bool = False,
    out: str | None = None,
) -> None:
    """Times the stages' steps.

    Args:
        size: tiny, small, vit_base, dinov2_small, tiny_text, small_text, roberta_base or minilm.
        stages: of these, separated by commas.
        batch: samples of a step (fine-tuning: half of it); the size's own if missing.
        rounds: that are timed, of each contestant.
        steps: of a round.
        precision: of ours and the Trainer's: fp32 or bf16; bf16 on a GPU if missing.
        variants: more of ours, separated by commas, such as teacher=replicated,compiled=true;
            several options of one are joined by +.
        threads: of a CPU; 0: all cores.
        profile: also say which operations take longest, by PyTorch's profiler.
        out: folder for step-SIZE.json and step-SIZE.md.
    """
    if size not in SIZES:
        raise UserError(f"--size {size}: there are {', '.join(SIZES)}")
    wanted = stages.split(",")
    wrong = [s for s in wanted if s not in STAGES]
    if wrong or rounds < 1 or steps < 1:
        raise UserError(
            f"--stages {wrong[0]}: there are {', '.join(STAGES)}"
            if wrong
            else "--rounds and --steps: give 1 or more"
        )
    cuda = torch.cuda.is_available()
    told = precision or ("bf16" if cuda else "fp32")
    if told not in DTYPES:
        raise UserError(f"--precision {told}: there are {', '.join(DTYPES)}")
    shown = SIZES[size]
    where = torch.cuda.get_device_name() if cuda else "cpu"
    figures: dict[str, Any] = {}
    texts = []
    for stage in STAGES:
        if stage not in wanted:
            continue
        number = (batch or shown.batch) // (2 if stage == "finetune" else 1)
        contestants = field_of(
            size, stage, number, told, [v for v in variants.split(",") if v], threads
        )
        try:
            race(contestants, number, rounds, steps, profile)
        finally:
            for contestant in contestants:
                contestant.close()
        shown_before = len(texts)
        rows = [row(one, contestants[0], where) for one in contestants]
        figures[stage] = {"batch": number, "steps": steps, "rows": rows}
        if profile:
            figures[stage]["operations"] = {c.title: c.operations for c in contestants}
        head = f"**{stage}**, {shown.title}, batch {number}"
        texts.append(f"{head}\n\n{table(rows, 'plain loop')}")
        texts += [profiled(one) for one in contestants if one.operations]
        print("\n" + "\n\n".join(texts[shown_before:]), flush=True)
    whose = record.machine()
    sets = f" ({', '.join(record.instructions())})" if not cuda else ""
    head = f"{whose['date']}, {whose['device']}, {whose['processor']}, {whose['cores']} cores{sets}"
    text = f"`{whose['command']}`\n\n{head}\n\n" + "\n\n".join(texts)
    record.write(Path(out) if out else None, f"step-{size}", figures, text)


if __name__ == "__main__":
    cli.run(main)
