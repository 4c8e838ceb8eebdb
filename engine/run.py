"""The command line: `deepspeed engine/run.py --stage distill ...`.

Resolves the configuration, joins the process group, runs the stages in order.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if not __package__:  # run as a script, sys.path[0] is engine/: the package lies one folder up
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import logging
import time
import traceback
import warnings
from typing import TYPE_CHECKING, NoReturn

from selfdistill.engine.runtime import preemption, terminal

if __name__ == "__main__":
    preemption.listen()  # before anything slow: until here a signal kills

from selfdistill.data.cli import format_error
from selfdistill.data.errors import PeerLost, TryAgain, UserError, commands_as_typed
from selfdistill.engine.config import options as configuration
from selfdistill.engine.config.idle import idle

if TYPE_CHECKING:
    from selfdistill.engine.checkpoints.folder import Run


def main(argv: list[str] | None = None) -> int:
    """Runs the stages.

    Returns:
        Exit code: 0 done; 2 a mistake of the user's; `preemption.AGAIN` interrupted, or another
        rank or a worker is gone: launching again goes on.
    """
    argv = sys.argv[1:] if argv is None else argv
    main_rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    try:
        if {"--help", "-h"} & set(argv):
            if main_rank:
                print(commands_as_typed(configuration.help_text(argv)))
            return 0
        _run(argv)
    except preemption.Preempted as error:
        if main_rank:
            signal = preemption.asked() or "a signal to another rank"
            terminal.say(f"interrupted ({signal}) at {error}: launch again to go on from there")
        return preemption.AGAIN
    except PeerLost as error:
        # The rank that failed says why, and its launcher, which goes by the exit code that came
        # first, then ends this one.
        if _patient(5):
            terminal.say(f"error: {format_error(error)}", sys.stderr)
        return preemption.AGAIN
    except UserError as error:
        # Most mistakes are every rank's: rank 0 says it, then the launcher ends the others.
        if main_rank or _patient(6):
            terminal.say(f"error: {format_error(error)}", sys.stderr)
        return preemption.AGAIN if isinstance(error, TryAgain) else 2
    except KeyboardInterrupt:
        return 130
    return 0


def _run(argv: list[str]) -> None:
    """The launch itself; whatever the user or the machine did wrong becomes a UserError."""
    settings = configuration.load(configuration.parse(argv))
    settings.check_warmups()
    settings.check_judges()
    settings.place()  # before seconds of imports
    terminal.divert()
    _quiet()
    from selfdistill.engine.runtime import precision
    from selfdistill.engine.runtime.allocator import keep_memory
    from selfdistill.engine.runtime.distributed import initialize
    from selfdistill.engine.runtime.failures import explain, refused

    precision.before_cuda(settings)
    ranks = initialize()
    if ranks.device.type == "cpu":
        keep_memory()
    from selfdistill.engine.checkpoints.folder import open_run

    try:
        run = open_run(settings, ranks)
        try:
            terminal.keep(run.folder if ranks.main else None)
            run.info(_resolved(run))
            for line in idle(settings):
                run.info(f"note: {line}")
            run_stages(run)
        finally:
            run.close()
    except OSError as error:
        raise refused(error) from error
    except preemption.Preempted as error:
        if settings.overwrite:
            raise preemption.Preempted(f"{error} (launch without --overwrite)") from None
        raise
    except RuntimeError as error:
        explained = explain(error, ranks.world, ranks.device)
        if explained is None:
            raise
        raise explained from error
    except FloatingPointError as error:
        raise UserError(
            f"the loss is not finite at {error}: lower the learning rate, or use bf16 or fp32"
        ) from error


def run_stages(run: Run) -> None:
    """Runs what `--stage` names, in order; complete stages are skipped."""
    from selfdistill.engine.models import adapters
    from selfdistill.engine.stages import ahead
    from selfdistill.engine.stages.decoder import train_decoder
    from selfdistill.engine.stages.distill import Distill
    from selfdistill.engine.stages.finetune import finetune, starts
    from selfdistill.engine.stages.pretrain import pretraining
    from selfdistill.engine.stages.splits import labelled_splits
    from selfdistill.engine.training.loop import run_stage

    config = run.config
    if config.stage in ("pretrain", "distill", "all"):
        adapters.check(config)
    if config.stage == "all":
        ahead.check(run, labelled_splits(run))
    if config.stage in ("decoder", "all"):
        run.boundary("decoder", wait=True)
        train_decoder(run)
    if config.stage in ("pretrain", "all"):
        run.boundary("pretrain", wait=True)
        run_stage(pretraining(run))
    if config.stage in ("distill", "all"):
        for number in range(1, config.rounds + 1):
            run.boundary(f"distill-{number}", wait=True)
            run_stage(Distill(run, number))
    if config.stage in ("finetune", "all"):
        for start in starts(config):
            finetune(run, start)


def _resolved(run: Run) -> str:
    """A line that says what this launch is about."""
    config, ranks = run.config, run.ranks
    named = {"recipe": config.recipe, "model": config.model.path, "data": config.data.path}
    parts = [f"stage {config.stage}", *(f"{k} {v}" for k, v in named.items() if v is not None)]
    processes = f"{ranks.world} process{'es' if ranks.world > 1 else ''} on {ranks.device.type}"
    parts += [processes, config.precision, config.zero]
    return f"{run.folder}: {', '.join(parts)}; libraries' messages: {terminal.LOG}"


def _patient(seconds: float) -> bool:
    """Waits; False as soon as the launcher, having ended another rank, asks this one to leave."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if preemption.asked():
            return False
        time.sleep(0.05)
    return True


def _quiet() -> None:
    """Leaves the terminal to the run's own lines."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not terminal.diverted():
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
    import deepspeed

    for logger in (deepspeed.utils.logger, logging.getLogger("DeepSpeed")):
        logger.setLevel(logging.WARNING)
        terminal.listen(logger)


def launch(argv: list[str]) -> int:
    """`main`, with the last of its exit codes: 1, a fault of this program, whose stack is told."""
    try:
        return main(argv)
    except Exception:
        traceback.print_exc()
        return 1


def leave(code: int) -> NoReturn:
    """Ends the process at once.

    After a fault Python's own way out may wait in NCCL for the others, whose watchdogs would take
    that for a hang, and ask to be put back.
    """
    if code == 0 and "torch" in sys.modules:  # not after a page of help: importing takes seconds
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # Ranks waiting in a collective would keep a failed process's threads alive: leave at once.
    os._exit(code)


if __name__ == "__main__":
    leave(launch(sys.argv[1:]))
