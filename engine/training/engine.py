"""The DeepSpeed engine of a stage: new, or with the state of its newest whole checkpoint."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from selfdistill.data.cli import format_error
from selfdistill.data.errors import UserError
from selfdistill.engine.checkpoints import training_state
from selfdistill.engine.checkpoints.checkpoint import Checkpoints
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.checkpoints.local import open_checkpoints
from selfdistill.engine.checkpoints.state import State
from selfdistill.engine.config.stages import StageSection
from selfdistill.engine.runtime import zero
from selfdistill.engine.runtime.distributed import gather
from selfdistill.engine.training import optimizer as optim
from selfdistill.engine.training.modalities.base import Section
from selfdistill.engine.training.stage import Stage


def start(stage: Stage) -> tuple[Any, State, Checkpoints]:
    """A stage's engine, state and checkpoints: from the newest whole one of these, or new.

    The weights go into the module before DeepSpeed cuts and casts it, the rest after.
    """
    run, objective = stage.run, stage.build()
    if run.config.checkpoint_activations:
        stage.modality.recompute(stage.model)
    place, beat = run.folder / stage.name, run.watchdog.beat
    checkpoints = open_checkpoints(run.config, place, run.ranks, beat)
    found = checkpoints.find(stage.record, stage.train.hash)
    read = None if found is None else checkpoints.reader(found)
    if read is not None:
        training_state.load_weights(objective, read)
    engine = build_engine(run, objective, stage.section, stage.plan, stage.optimizer(objective))
    if found is None or read is None:
        state = State(0, 0, stage.record, stage.train.hash, run.ranks.world)
        return engine, state, checkpoints
    _, state = found
    training_state.restore(engine, run.ranks.rank, read, state.optimizer)
    state.config = stage.record  # the layout of this launch
    return engine, state, checkpoints


def build_engine(
    run: Run,
    objective: nn.Module,
    section: Section,
    plan: StageSection,
    optimizer: Any | None = None,
) -> Any:
    """The DeepSpeed engine of an objective.

    Args:
        run: The launch.
        objective: Module whose forward gives the losses.
        section: pretrain | distill | finetune.
        plan: Its settings.
        optimizer: Of the objective; None: AdamW.

    Raises:
        UserError: batch, ZeRO setting or precision do not fit.
    """
    import deepspeed

    content = zero.training_config(run.config, plan, run.ranks.world)
    if run.config.compile and zero.stage_of(content) == 3:
        raise UserError(
            f"--compile true: --zero {run.config.zero} gathers parameters in the midst of a"
            " forward, which torch.compile cannot follow: take zero0, zero1 or zero2, or leave it"
            " out"
        )
    content = _fitted(run, objective, content)
    if optimizer is None:
        optimizer = optim.build(objective, section, plan, offload=zero.offloads(content))
    else:
        content["zero_allow_untested_optimizer"] = True  # DeepSpeed knows classes by their names
    try:
        engine, *_ = deepspeed.initialize(
            model=objective, optimizer=optimizer, config=content, dist_init_required=False
        )
    except (AssertionError, TypeError, ValueError) as error:
        if run.config.zero in zero.known():
            raise
        raise UserError(
            f"--zero {run.config.zero}: DeepSpeed refuses it: {format_error(error)[:200]}: correct"
            " the file, or take one of ds_configs/"
        ) from error
    if run.ranks.world == 1 and zero.stage_of(content) == 0:
        # With one rank there is nothing to sum, but DeepSpeed would still copy all gradients twice.
        engine.enable_backward_allreduce = False
    if run.config.compile:
        engine.compile(compile_kwargs={"mode": run.config.compile_mode})
    return engine


def _fitted(run: Run, objective: nn.Module, content: dict[str, Any]) -> dict[str, Any]:
    """A configuration with what follows from the model and the nodes."""
    node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if zero.open_partition(content) and len(nodes := set(gather(node))) > 1:
        raise UserError(
            f"--zero {run.config.zero}: the nodes have {min(nodes)} to {max(nodes)} ranks: start as"
            " many on each, or give zero_hpz_partition_size a number that divides them all"
        )
    parameters = list(objective.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    content = zero.fitted(
        content,
        trained=sum(p.numel() for p in parameters if p.requires_grad),
        every=sum(sizes),
        largest=max(sizes),
        node=node,
    )
    zero.check_topology(content, run.config.zero, run.ranks.world, run.ranks.device.type)
    return content
