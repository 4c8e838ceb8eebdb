"""The folder of a run: who uses it, which stages it holds, what each left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import pydantic
import tomli_w
import torch

from selfdistill.data import records
from selfdistill.data.errors import TryAgain, UserError
from selfdistill.data.files import nofollow
from selfdistill.data.formats import images
from selfdistill.data.loading.batches import Options
from selfdistill.data.loading.codec import Codec
from selfdistill.data.loading.loader import warn_once
from selfdistill.data.loading.windows import Windows
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints import card
from selfdistill.engine.checkpoints.files import write_text
from selfdistill.engine.checkpoints.provenance import process
from selfdistill.engine.checkpoints.results import RESULT, read_result
from selfdistill.engine.checkpoints.state import differing, in_words
from selfdistill.engine.config.schema import Config
from selfdistill.engine.runtime import precision, terminal, zero
from selfdistill.engine.runtime.distributed import Ranks, few_cores, main_only
from selfdistill.engine.runtime.preemption import Agreement, Preempted, asked, job_of, restarted
from selfdistill.engine.runtime.watchdog import Watchdog

CONFIG = "config.toml"

#: Loader processes of a rank on a GPU at most, by themselves: twice what an H100 can eat.
_WORKERS = 16


class _Model(records.Record):
    path: str | None = None


class _Written(records.Record):
    """What is used of the configuration that an earlier launch left."""

    model: _Model = _Model()
    precision: str | None = None
    decoder: dict[str, Any] = pydantic.Field({})
    pretrain: dict[str, Any] = pydantic.Field({})
    distill: dict[str, Any] = pydantic.Field({})
    finetune: dict[str, Any] = pydantic.Field({})


#: Sections of the configuration that belong to one stage.
STAGES = ("decoder", "pretrain", "distill", "finetune")


@dataclass
class Run:
    """One launch: its configuration, its processes, its folder."""

    config: Config
    ranks: Ranks
    folder: Path
    lock: IO[str] | None = None
    agreement: Agreement = field(init=False)
    watchdog: Watchdog = field(init=False)
    _said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        ranks = self.ranks
        self.agreement = Agreement(ranks.world)
        self.watchdog = Watchdog(self.folder, ranks.rank, ranks.world, self.config.watchdog)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the matrix products."""
        return zero.DTYPES[self.config.precision]

    @property
    def workers(self) -> int:
        """Loader processes of this rank: as asked for, or what its cores bear beside a step."""
        if self.config.data.workers is not None:
            return self.config.data.workers
        if self.ranks.device.type == "cuda":
            cores = self.ranks.cores
            return min(_WORKERS, max(min(1, cores - 1), cores - 2))
        return min(1, torch.get_num_threads() - 1)

    @property
    def background(self) -> bool:
        """Whether steps go on while a checkpoint is written: as asked for, or on GPUs."""
        asked = self.config.save_async
        return self.ranks.device.type != "cpu" if asked is None else asked

    def reading(
        self, codec: Codec, windows: Windows | None = None, *, require_labels: bool = False
    ) -> Options:
        """How every loader of this rank reads, with a codec of its samples and what they are."""
        config = self.config.data
        return {
            "codec": codec,
            "windows": windows,
            "require_labels": require_labels,
            "workers": self.workers,
            "cache_dir": config.cache_dir,
            "cache_gb": config.cache_gb,
            "verify": config.check == "always",
            "skip_broken": config.skip_broken,
            "report": warn_once,
            "pin": self.ranks.device.type == "cuda",
        }

    def info(self, line: str) -> None:
        """Prints a line on rank 0."""
        if self.ranks.main:
            terminal.say(line)

    def info_once(self, line: str) -> None:
        """Prints a line on rank 0, however many stages have it to say."""
        if line not in self._said:
            self._said.add(line)
            self.info(line)

    def boundary(self, where: str, *, wait: bool = False) -> None:
        """Between two units of work: a sign of life, and the place to leave. Every rank calls it.

        Args:
            where: what comes next.
            wait: for all ranks' answer of now; else it is that of the call before, which came while
                they worked.

        Raises:
            Preempted: a rank was asked to leave.
        """
        self.watchdog.beat(where)
        if self.agreement.ask() if wait else self.agreement.poll():
            raise Preempted(where)

    def close(self) -> None:
        """Lets another launch use the folder."""
        self.watchdog.stop()
        if self.lock:
            # Said outright: a loader's worker, forked meanwhile, has a copy that keeps the lock.
            with suppress(OSError):  # a file system without locks
                fcntl.flock(self.lock, fcntl.LOCK_UN)
            self.lock.close()

    def shared_result(self, stage: str) -> dict[str, Any] | None:
        """`result` as rank 0 reads it: other hosts' file systems may be behind. All call it."""
        found: dict[str, Any] | None = main_only(self.ranks, lambda: self.result(stage))
        return found

    def result(self, stage: str) -> dict[str, Any] | None:
        """What a complete stage left as result.json, or None."""
        try:
            return read_result(self.folder / stage / RESULT)
        except FileNotFoundError:
            return None


def open_run(config: Config, ranks: Ranks) -> Run:
    """Makes or enters a run folder and locks it against a second launch.

    Raises:
        UserError: no --output, no permission, or another launch is using it.
    """
    place = config.place()
    precision.set_switches(config, ranks.device)
    images.allow(config.data.max_pixels)
    warn_once.cache_clear()  # a process may do several launches, and each tells all
    run = Run(config, ranks, place)

    def enter() -> tuple[str | None, tuple[str, str]]:
        run.folder.mkdir(parents=True, exist_ok=True)
        process()  # now, as the code that runs was read now
        run.lock = _lock(run.folder / ".lock", _patience(config.watchdog))
        before = read_config(run.folder / CONFIG)
        known, path = before.get("model", {}).get("path"), config.model.path
        if known is not None and not config.given("model"):
            path = known  # the run's own model, whatever the recipe's is
        began = before.get("precision")
        return path, precision.choose(config.precision, began, ranks.device)

    try:
        config.model.path, (config.precision, why) = main_only(ranks, enter)
    except UserError:
        run.close()
        raise
    if warning := few_cores():
        run.info(warning)
    if why:
        run.info(f"precision {config.precision}: {why} (--precision)")
    config.zero = zero.chosen(config.zero, ranks.world, config.precision)
    run.watchdog.start()
    return run


def _patience(watchdog: float) -> float:
    """Seconds to wait for a folder that is in use.

    A job that SLURM put back after a host was cut off may start while that host's ranks still wait
    for the others, until their watchdog ends them.
    """
    return min(watchdog + 120, 1500) if restarted() else 0  # the other ranks wait 30 minutes


def _lock(path: Path, patience: float) -> IO[str]:
    """Holds a file until the process ends; in it stands who does.

    Raises:
        UserError: another process holds it, and still does after `patience` seconds; TryAgain,
            where this one was asked to end before.
    """
    # Held till exit.
    file = open(path, "a+", encoding="utf-8", opener=nofollow)  # noqa: SIM115
    end, reported = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            who = file.read().strip()
            by = f" ({who})" if who else ""
            if time.monotonic() > end or asked():
                file.close()
                raise (TryAgain if asked() else UserError)(
                    f"{path.parent} is in use by another launch{by}: wait for it, or take another"
                    " --output"
                ) from None
            if not reported:
                reported = True
                terminal.say(f"{path.parent} is still in use{by}: waiting at most {patience:.0f} s")
            time.sleep(1)
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            terminal.say(
                f"warning: {path.parent}: its file system has no locks: see to it that no second"
                " launch uses this folder"
            )
            break
    file.truncate(0)
    job = os.environ.get("SLURM_JOB_ID")
    file.write(f"{socket.gethostname()}, pid {os.getpid()}{f', job {job}' if job else ''}\n")
    file.flush()
    return file


def read_config(path: Path) -> dict[str, Any]:
    """A configuration that an earlier launch left; empty if there is none.

    Raises:
        UserError: It is not as a launch writes it.
    """
    cure = "mend it, or delete it"
    try:
        content = records.read_toml(path, cure)
    except FileNotFoundError:
        return {}
    records.checked(_Written, content, path, cure)
    return content


def _check_complete(
    folder: Path, result: dict[str, Any], record: dict[str, Any], data: str
) -> None:
    """Refuses to take a complete stage for another one than it is."""
    made, record = (
        result.get("record", record) | {"data": result.get("manifest")},
        record | {"data": data},
    )
    for key, old, new in differing(made, record):
        raise UserError(
            f"{folder} is complete, {in_words(key, old, new)}: give the same, take another"
            " --output, or delete that folder, which is then done anew"
        )


def open_stage(run: Run, stage: str, record: dict[str, Any], data: str) -> bool:
    """Prepares the folder of a stage; says whether there is work to do.

    A complete stage is left alone. An incomplete one with checkpoints is continued under
    `--resume auto`. `--overwrite` puts it aside first, see `replacing`.

    Args:
        run: The launch.
        stage: Name of its folder.
        record: What its figures depend on (`engine.training.record.record_of`).
        data: Hash of the manifest that it learns from.

    Raises:
        UserError: something is there and may be neither continued nor deleted, or a complete stage
            was made with other settings, data or weights.
    """
    folder, config = run.folder / stage, run.config

    mark, job = folder / ".job", job_of()

    def prepare() -> bool:
        # What this job began before it was put back into the queue is its own to go on with.
        own = bool(job) and restarted() and mark.exists() and mark.read_text() == job
        overwrite, resume = config.overwrite and not own, "auto" if own else config.resume
        if overwrite and folder.exists():
            terminal.say(f"{stage}: deleting {folder} (--overwrite)")
            shutil.rmtree(_aside(folder), ignore_errors=True)
            os.replace(folder, _aside(folder))
        done = run.result(stage)
        if done is not None:
            if resume == "never":
                raise UserError(
                    f"{folder} is complete: --overwrite does it again, or take another --output"
                )
            _check_complete(folder, done, record, data)
            terminal.say(
                f"{stage}: complete, skipped ({folder / RESULT}; --overwrite does it again)"
            )
            return False
        existing = [p.name for p in folder.iterdir()] if folder.exists() else []
        if existing and resume == "never":
            raise UserError(
                f"{folder} holds an unfinished stage: --resume auto continues it, "
                "--overwrite deletes it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG, config.toml())
        if job:
            write_text(mark, job)
        write_text(run.folder / CONFIG, _joined(run.folder / CONFIG, config, stage))
        return True

    return bool(main_only(run.ranks, prepare))


def _aside(folder: Path) -> Path:
    """Where what --overwrite deletes lies until the stage that takes its place can begin."""
    return folder.with_name(f".{folder.name}.overwritten")


@contextmanager
def replacing(run: Run, stage: str) -> Iterator[None]:
    """Within, a stage begins: what `open_stage` put aside is then deleted, or else put back.

    One that is interrupted on the way has begun: the parts of its teacher's table stay. Rank 0 does
    it, alone: the others may have failed.
    """
    folder, begun = run.folder / stage, False
    try:
        yield
        begun = True
    except Preempted:
        begun = True
        raise
    finally:
        if run.ranks.main and _aside(folder).exists():
            shutil.rmtree(_aside(folder) if begun else folder, ignore_errors=True)
            if begun and folder.parent != run.folder:  # the mean over seeds that were
                (folder.parent / RESULT).unlink(missing_ok=True)
            if not begun:
                os.replace(_aside(folder), folder)
                terminal.say(f"{stage}: put back, since nothing could begin in its place")


def _joined(path: Path, config: Config, stage: str) -> str:
    """The run's configuration: this launch's, with the sections of stages that it did not do."""
    before, now = read_config(path), tomllib.loads(config.toml())  # ours
    for section in STAGES:
        if section in before and not stage.startswith(section):
            now[section] = before[section]
    return tomli_w.dumps(now)


def write_result(
    run: Run, stage: str, content: dict[str, Any], train: Manifest | None = None
) -> None:
    """Marks a stage complete, and writes its export's card; `train` is what it learnt from."""

    def write() -> None:
        if train is not None and "export" in content:
            card.write(Path(content["export"]), content, train)
        (run.folder / stage).mkdir(parents=True, exist_ok=True)
        write_text(run.folder / stage / RESULT, json.dumps(content, indent=1) + "\n")
        if not run.config.keep_finished:  # the export is what is used from here on
            shutil.rmtree(run.folder / stage / "checkpoints", ignore_errors=True)

    main_only(run.ranks, write)
