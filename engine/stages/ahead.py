"""What `--stage all` refuses before its first stage: else it would come after hours of others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.regularizers import REGULARIZERS, matching
from selfdistill.engine.runtime import zero
from selfdistill.engine.stages.finetune import check_judge, check_seeds, stage_name, starts
from selfdistill.engine.stages.labels import check_labels, check_pairs


def check(run: Run, splits: Mapping[str, Manifest]) -> None:
    """Refuses what a later stage would refuse. Every rank calls it.

    Args:
        run: of all stages.
        splits: those of fine-tuning.

    Raises:
        UserError: says what, and the cure.
    """
    config, train = run.config, splits["train"]
    plan = config.finetune
    matching.check(config)
    check_judge(config, splits)
    check_labels(train, config)
    check_pairs(config, run.ranks.world)
    for start in starts(config):
        check_seeds(run, stage_name(config, start))
    _check_rounds(run)
    tuned = stage_name(config, plan.start)
    stages = {
        "pretrain": ["pretrain"],
        "distill": [f"distill-{number}" for number in range(1, config.rounds + 1)],
        "finetune": [tuned],
    }
    for section, names in stages.items():  # what is complete fits any number of ranks
        if config.overwrite or any(run.shared_result(name) is None for name in names):
            zero.micro_batch(getattr(config, section), run.ranks.world, f"--{section}.batch")
    if run.shared_result(tuned) is not None and not config.overwrite:
        return
    steps = plan.length(train.epoch(train.counts))
    plan.check_warmup("finetune", steps)
    REGULARIZERS[plan.regularizer](run, None).check(steps)
    _, _, number = plan.start.partition("distill-")
    if number and int(number) > config.rounds and run.shared_result(plan.start) is None:
        raise UserError(
            f"--finetune.start {plan.start}: --stage all makes {config.rounds} round(s): give"
            f" --rounds {number}, or an earlier start"
        )


def _check_rounds(run: Run) -> None:
    """Refuses more rounds than those whose last student was fine-tuned."""
    config, folder = run.config, run.folder / "finetune"
    done = run.shared_result("finetune") or {}
    made, last = Path(str(done.get("start", ""))).parent.name, f"distill-{config.rounds}"
    again = config.overwrite or config.finetune.weights is not None
    if "auto" in starts(config) and made.startswith("distill-") and made != last and not again:
        raise UserError(
            f"{folder} is complete, made from {made}, now it would be from {last}: take another"
            " --output, or delete that folder, which is then done anew"
        )
