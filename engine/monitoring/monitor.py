"""What a run shows while it goes on: TensorBoard, `metrics.jsonl`, one live line on the terminal.

Rank 0 writes; on every other rank a `Monitor` does nothing. `Meter` measures the speed of the loop.
"""

import contextlib
import json
import math
import os
import resource
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, SupportsFloat

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from selfdistill.data import records
from selfdistill.data.errors import redacted
from selfdistill.data.files import fresh, nofollow
from selfdistill.engine.monitoring import pictures
from selfdistill.engine.monitoring.loggers import open_all
from selfdistill.engine.monitoring.loggers.base import Place
from selfdistill.engine.runtime import terminal

METRICS = "metrics.jsonl"
GIB = 2**30


class Monitor:
    """Writes one stage's scalars, pictures and texts, and keeps its line on the terminal.

    Steps count finished optimiser steps: the first step of a run is 1, and 0 is "before training".
    A resumed run (`start` > 0) continues the files of the folder: what they hold of later steps,
    from a launch that died after its last checkpoint, is cut, so that each step stands there once.

    Attributes:
        first: The first step that belongs to this launch; texts stand at it.

    Args:
        folder: The stage's folder, made if missing; gets TensorBoard's events and `metrics.jsonl`.
        enabled: True on rank 0 only.
        stage: Shown on the terminal: "pretrain", "distill-1", "finetune".
        steps: Steps in the whole stage.
        start: Steps already done by earlier launches, as the checkpoint says.
        scored: The step after which the last evaluation was logged; one of a later step is done
            again, and its line is cut.
        samples_per_step: Global batch, for the rate on the terminal.
        log_every: A plain line every so many steps where stdout is no terminal.
        quiet: Nothing on the terminal; the files are written as ever.
        unit: What a sample is called on the terminal.
        loggers: Where all goes beside `metrics.jsonl`, see `engine.monitoring.loggers`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool,
        stage: str,
        steps: int,
        start: int = 0,
        scored: int | None = None,
        samples_per_step: int,
        log_every: int,
        quiet: bool = False,
        unit: str = "images",
        loggers: Sequence[str] = ("tensorboard",),
    ) -> None:
        self.enabled = enabled
        self.first = start + 1 if start else 0
        self.steps = steps
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        cut_metrics(folder / METRICS, self.first, scored)
        self._metrics = open(folder / METRICS, "a", opener=nofollow)  # noqa: SIM115
        self._loggers = open_all(loggers, Place(folder, stage, self.first))
        self._line = (
            None if quiet else _Line(stage, steps, start, samples_per_step, log_every, unit)
        )

    def log(self, step: int, scalars: Mapping[str, SupportsFloat]) -> None:
        """Write scalars to the loggers and as one line of `metrics.jsonl`.

        Args:
            step: Finished optimiser steps.
            scalars: Tag -> value, "loss/mae" say. NaN and infinity are null in the (strict) JSON.
        """
        if not self.enabled:
            return
        values = {tag: float(value) for tag, value in scalars.items()}
        for logger in self._loggers:
            logger.scalars(step, values)
        finite = {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **finite}
        self._metrics.write(json.dumps(record, allow_nan=False) + "\n")
        # Into the files now: a run killed the next second has lost nothing that a resume needs.
        self._metrics.flush()

    def image(self, step: int, tag: str, picture: np.ndarray | torch.Tensor) -> None:
        """Write a picture to the loggers.

        Args:
            step: Finished optimiser steps.
            tag: Its name, "reconstruction" say.
            picture: uint8 [3, H, W].
        """
        for logger in self._loggers if self.enabled else ():
            logger.image(step, tag, picture)

    def text(self, tag: str, markdown: str, step: int | None = None) -> None:
        """Write a text to the loggers.

        Args:
            tag: Its name, "config" say.
            markdown: What they show.
            step: Finished optimiser steps; by default the first step of this launch.
        """
        for logger in self._loggers if self.enabled else ():
            logger.text(self.first if step is None else step, tag, markdown)

    def confusion(self, step: int, matrix: np.ndarray | None, classes: Sequence[str]) -> None:
        """Draw a confusion matrix and write it to the loggers.

        Args:
            step: Finished optimiser steps.
            matrix: int64 [C, C], rows true, columns predicted; None, and nothing is drawn, where
                samples have several labels.
            classes: The C names.
        """
        if self.enabled and matrix is not None:
            self.image(step, "confusion", pictures.confusion(matrix, classes))

    def hparams(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Tell the loggers of all settings, and of the final figures: TensorBoard's HParams tab.

        Args:
            config: The resolved config; nested tables become dotted names.
            metrics: Final figures, "test/accuracy" say; they stand at the stage's last step.
        """
        # A figure that is not known, as after a resume with no step left, is left out.
        metrics = {tag: value for tag, value in metrics.items() if math.isfinite(value)}
        for logger in self._loggers if self.enabled else ():
            logger.hparams(self.steps, _flat(config), metrics)

    def progress(self, step: int, losses: Mapping[str, float] | None = None) -> None:
        """Move the line on the terminal.

        Args:
            step: Finished optimiser steps.
            losses: Name -> value; None keeps those shown last, so that a step which logs nothing
                need not read losses back from the device.
        """
        if self.enabled and self._line is not None:
            self._line.update(step, losses)

    def sync(self) -> None:
        """Force `metrics.jsonl` to the disk: a newer checkpoint would lose lines."""
        if self.enabled:
            os.fsync(self._metrics.fileno())

    def close(self) -> None:
        """Finish the line and the files. More calls do nothing."""
        if not self.enabled:
            return
        self.enabled = False
        if self._line is not None:
            self._line.close()
        for logger in self._loggers:
            logger.close()
        self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Meter:
    """Measures the training loop: step time, rate, time spent waiting for data, MFU, memory.

    Steps on a GPU are queued, not awaited: read `rates` only after the losses were read back
    (`.item()`), which waits for the device, or the interval ends too early.

    Args:
        unit: What is counted, in the rate's tag: images, tokens.
        peak_flops: FLOP/s of all devices of the run together; None where not known: no MFU.
    """

    def __init__(self, *, unit: str = "images", peak_flops: float | None = None) -> None:
        self.unit = unit
        self.peak_flops = peak_flops
        self.reset()

    def reset(self) -> None:
        """Begin a new interval now."""
        self.steps = 0
        self._units = self._flops = 0.0
        self._waited = 0.0
        self._paused = 0.0
        self._began = time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count this block as waiting for data: `with meter.waiting(): batch = next(it)`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of this block out: an evaluation, a checkpoint."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def step(self, units: float, flops: float = 0.0) -> None:
        """Count one finished optimiser step.

        Args:
            units: Images or tokens of all ranks.
            flops: FLOPs of all ranks, forward and backward (`engine.monitoring.flops`).
        """
        self.steps += 1
        self._units += units
        self._flops += flops

    def rates(self) -> dict[str, float]:
        """Figures of the interval since the last call; begins a new one.

        Returns:
            `speed/step_seconds`, `speed/images_per_second` (all ranks together; or tokens),
            `speed/data_wait_percent`, `speed/mfu_percent` (where the peak is known), and
            `memory/cuda_peak_gib` or, without CUDA, `memory/rss_gib`, both of this rank. Without a
            finished step only the memory.
        """
        figures = memory()
        elapsed = time.perf_counter() - self._began - self._paused
        if self.steps and elapsed > 0:
            figures["speed/step_seconds"] = elapsed / self.steps
            figures[f"speed/{self.unit}_per_second"] = self._units / elapsed
            figures["speed/data_wait_percent"] = 100 * self._waited / elapsed
            if self._flops and self.peak_flops:
                figures["speed/mfu_percent"] = 100 * self._flops / elapsed / self.peak_flops
        self.reset()
        return figures


def memory() -> dict[str, float]:
    """Memory of this process in GiB: peak of CUDA's allocator, or without CUDA the resident set."""
    if torch.cuda.is_available():
        return {"memory/cuda_peak_gib": torch.cuda.max_memory_allocated() / GIB}
    # proc_pid_statm(5): the second figure is the resident set, in pages.
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {"memory/rss_gib": pages * resource.getpagesize() / GIB}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Records of a `metrics.jsonl`, up to a line that a crash cut off or left as zeros."""
    if not path.exists():
        return []
    # A line counts once its newline is there: the writer adds both in one write.
    return records.read_lines(path)


def cut_metrics(path: Path, first: int, scored: int | None = None) -> None:
    """Drop the lines of step `first` and later, and one that a crash left unfinished.

    Args:
        path: A `metrics.jsonl`; may be missing.
        first: The first step that is to be written anew.
        scored: The step of the last evaluation that stays; None for all before `first`.
    """
    if not path.exists():
        return

    def stays(record: dict[str, Any]) -> bool:
        scores = any(tag.startswith(("val/", "test/", "probe/")) for tag in record)
        step = record.get("step")
        if not isinstance(step, int | float):
            return False
        late = scored is not None and step > scored
        return step < first and not (scores and late)

    kept = [record for record in read_metrics(path) if stays(record)]
    temporary = path.with_suffix(".tmp")
    with fresh(temporary) as file:
        file.writelines(json.dumps(r, allow_nan=False) + "\n" for r in kept)
    os.replace(temporary, path)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, int | float | str]:
    """Nested tables as dotted names; truth values, lists and None as words."""
    flat: dict[str, int | float | str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, name + ".")
        elif isinstance(value, (int, float, str)) and not isinstance(value, bool):
            flat[name] = redacted(value) if isinstance(value, str) else value
        else:  # torch's writer would make 1.0 of True
            flat[name] = str(value).lower() if isinstance(value, bool | None) else str(value)
    return flat


class _Line:
    """The live line; plain lines where stdout is no terminal (a log file, sbatch).

    Drawn by the training loop itself, at most five times a second, not by rich's thread: loader
    workers are forked, and a fork while that thread holds its lock leaves it locked in them.
    """

    def __init__(
        self, stage: str, steps: int, start: int, samples_per_step: int, log_every: int, unit: str
    ) -> None:
        self.stage, self.steps, self.unit = stage, steps, unit
        self.samples_per_step, self.log_every = samples_per_step, log_every
        self.losses = ""
        # (time, step) of late, for rate and time left: a slow start is soon forgotten.
        self.window = deque([(time.perf_counter(), start)], maxlen=200)
        self.drawn = 0.0
        self.progress: Progress | None = None
        if terminal.out().isatty():
            self.progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[state]}", markup=False),
                console=Console(file=terminal.out()),
                auto_refresh=False,
            )
            self.task = self.progress.add_task(stage, total=steps, completed=start, state="")
            self.progress.start()

    def update(self, step: int, losses: Mapping[str, float] | None) -> None:
        """Show this step, if it is time to."""
        now = time.perf_counter()
        self.window.append((now, step))
        if losses is not None:
            self.losses = " ".join(f"{name} {value:.4g}" for name, value in losses.items())
        last = step >= self.steps
        if self.progress is None:
            if step % self.log_every == 0 or last or len(self.window) == 2:
                terminal.say(f"{self.stage} {self.state(step)}")
        elif last or now - self.drawn > 0.2:
            self.drawn = now
            self.progress.update(self.task, completed=step, state=self.state(step), refresh=True)

    def state(self, step: int) -> str:
        """Step, percent, losses, rate, time left."""
        (began, first), (now, latest) = self.window[0], self.window[-1]
        parts = [f"{step}/{self.steps}", f"{100 * step / max(self.steps, 1):.1f}%"]
        if self.losses:
            parts.append(self.losses)
        if latest > first and now > began:
            pace = (latest - first) / (now - began)
            remaining = timedelta(seconds=round((self.steps - step) / pace))
            parts += [f"{pace * self.samples_per_step:.4g} {self.unit}/s", f"{remaining} left"]
        return "  ".join(parts)

    def close(self) -> None:
        """Leave the line as it stands and give the terminal back."""
        if self.progress is not None:
            self.progress.stop()
