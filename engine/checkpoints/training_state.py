"""The state of a DeepSpeed engine as whole fp32 tensors: weights and Adam's moments by name.

Whole tensors fit any number of ranks and any ZeRO stage: what one layout saved another one loads.
DeepSpeed's own universal checkpoint has the same content, but has to be converted from its sharded
one, which unpickles, and which ZeRO stage 0 does not have; here the engine is read and filled
through DeepSpeed's `safe_get_full_...` functions, and every checkpoint is universal as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from selfdistill.data.errors import UserError
from selfdistill.engine.runtime.zero import gathered

WEIGHT = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
#: The weights' average over the steps, where there is one: see `engine.training.optimizer`.
AVERAGE = "average"
#: The weights that measured best so far, where they are kept: see `engine.training.keep`.
BEST = "best"

#: DeepSpeed's loss scaler: the numbers that change while training.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Layout(Protocol):
    """Where an engine keeps the master weight and the moments of a trainable parameter.

    Attributes:
        optimizer: the torch or DeepSpeed optimiser that takes the steps.
    """

    optimizer: Any

    def get(self, parameter: Tensor, key: str) -> Tensor:
        """The whole tensor, fp32. Every rank calls it."""
        ...

    def set(self, parameter: Tensor, key: str, value: Tensor) -> None:
        """Fills this rank's part from the whole tensor (on the CPU)."""
        ...

    def flats(self) -> Iterable[Tensor]:
        """The tensors by which the inner optimiser keeps its state."""
        ...

    def link(self) -> None:
        """Makes the moments in the inner optimiser known to DeepSpeed."""
        ...

    def publish(self) -> None:
        """Gives the forward pass the master weights of now. Every rank calls it."""
        ...


class _Plain:
    """Without ZeRO: the torch optimiser itself, one state a parameter."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def get(self, parameter: Tensor, key: str) -> Tensor:
        value: Tensor = parameter.data if key == WEIGHT else self.optimizer.state[parameter][key]
        return value

    def set(self, parameter: Tensor, key: str, value: Tensor) -> None:
        self.get(parameter, key).copy_(value)

    def flats(self) -> Iterable[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def link(self) -> None:
        pass

    def publish(self) -> None:
        pass


class _Partitioned:
    """ZeRO 1 and 2: flat fp32 partitions."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper, self.optimizer = wrapper, wrapper.optimizer

    def get(self, parameter: Tensor, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        value: Tensor = (
            safe_get_full_fp32_param(parameter)
            if key == WEIGHT
            else safe_get_full_optimizer_state(parameter, key)
        )
        return value

    def set(self, parameter: Tensor, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key == WEIGHT:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def flats(self) -> Iterable[Tensor]:
        return [flat for group in self.optimizer.param_groups for flat in group["params"]]

    def link(self) -> None:
        # DeepSpeed 0.19.8 links after the step of the first parameter group, when the second has no
        # moments yet, and never again.
        self.wrapper._hp_optimizer_states_linked = False
        self.wrapper._lazy_init_hp_params_optimizer_state()

    def publish(self) -> None:
        self.wrapper.update_lp_params()


class _Sharded(_Partitioned):
    """ZeRO 3: each parameter and its state in as many equal parts as there are ranks."""

    def __init__(self, wrapper: Any, rank: int) -> None:
        super().__init__(wrapper)
        self.rank = rank

    def set(self, parameter: Tensor, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        # DeepSpeed hangs the shard onto the parameter, which its type does not know.
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        part = torch.zeros(size)  # the last parts may reach beyond the end
        mine = value.flatten()[self.rank * size : (self.rank + 1) * size]
        part[: mine.numel()] = mine
        if key == WEIGHT:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)

    def flats(self) -> Iterable[Tensor]:
        flats: list[Tensor] = self.wrapper.fp32_partitioned_groups_flat
        return flats

    def link(self) -> None:
        pass

    def publish(self) -> None:
        self.wrapper.checkpoint_event_prologue()  # what is whole now has the weights of before
        for number in range(len(self.wrapper.fp32_partitioned_groups_flat)):
            self.wrapper._reassign_or_swap_out_partitioned_parameters(number)
        self.wrapper.checkpoint_event_epilogue()


def kept(inner: Any, parameter: Tensor) -> tuple[str, ...]:
    """Names of what an optimiser keeps of a parameter: Adam's moments, or what it says itself.

    And the average and the best weights, where its groups say that there are some.
    """
    keeps = getattr(inner, "keeps", None)
    found: tuple[str, ...] = MOMENTS if keeps is None else keeps(parameter)
    group = inner.param_groups[0]
    return found + tuple(copy for copy in (AVERAGE, BEST) if group.get(copy))


def layout(engine: Any, rank: int) -> Layout:
    """How an engine keeps its state."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return _Sharded(wrapper, rank)
    if any(hasattr(p, "_hp_mapping") for p in engine.module.parameters()):
        return _Partitioned(wrapper)
    assert isinstance(wrapper, torch.optim.Optimizer), f"unknown optimiser {type(wrapper)}"
    return _Plain(wrapper)


def owners(module: nn.Module, world: int) -> dict[str, int]:
    """Which rank keeps and writes which parameter: shares of about equal size."""
    sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in module.named_parameters()}
    load, owner = [0] * world, {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += sizes[name]
    return owner


@torch.no_grad()
def collect(
    engine: Any,
    rank: int,
    world: int,
    beat: Callable[[], None] = lambda: None,
    buffers: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """This rank's share of the state. Every rank calls it.

    Args:
        engine: after at least one optimiser step.
        rank: this process.
        world: number of ranks.
        beat: called for every parameter.
        buffers: keeps the memory from one call to the next, which writes over it; None: it is new.

    Returns:
        "fp32/NAME", "exp_avg/NAME", "exp_avg_sq/NAME" and so on (`kept`) -> whole fp32 tensor on
        the CPU; frozen parameters have weights alone.
    """
    share: dict[str, Tensor] = {}
    how, owner = layout(engine, rank), owners(engine.module, world)

    def put(name: str, tensor: Tensor) -> None:
        share[name] = _copy(tensor, name, buffers)

    stepped = _stepped(how)  # not yet where fp16 has only met overflows
    if stepped:
        how.link()
    for name, parameter in engine.module.named_parameters():
        beat()
        mine = owner[name] == rank
        if not parameter.requires_grad:
            with gathered(parameter) as whole:
                if mine:
                    put(f"{WEIGHT}/{name}", whole)
            continue
        weight = how.get(parameter, WEIGHT)  # gathers: every rank takes part
        if mine:
            put(f"{WEIGHT}/{name}", weight)
        for key in kept(how.optimizer, parameter):
            # What is no moment is an anchor or a copy: the weight before the first step.
            first = torch.zeros_like(weight) if key in MOMENTS else weight
            value = how.get(parameter, key) if stepped else first
            if mine:
                put(f"{key}/{name}", value)
    return share


def _stepped(how: Layout) -> bool:
    """Whether the optimiser has moments."""
    return "exp_avg" in how.optimizer.state.get(next(iter(how.flats())), {})


def _copy(tensor: Tensor, name: str, buffers: dict[str, Tensor] | None) -> Tensor:
    """A tensor on the host, in memory that is kept where there are buffers."""
    if buffers is None:
        return torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor)
    if name not in buffers:
        try:
            made = torch.empty(tensor.shape, dtype=torch.float32, pin_memory=tensor.is_cuda)
        except RuntimeError:  # the host has no more memory to lock, which CUDA calls its own
            made = torch.empty(tensor.shape, dtype=torch.float32)
        buffers[name] = made
    return buffers[name].copy_(tensor)


@torch.no_grad()
def load_weights(module: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Fills a module with saved weights, before `deepspeed.initialize` cuts and casts it.

    Args:
        module: whole, on any device.
        read: "fp32/NAME" -> tensor.
    """
    for name, parameter in module.named_parameters():
        parameter.copy_(_fitting(read(f"{WEIGHT}/{name}"), name, parameter.shape))


@torch.no_grad()
def restore(engine: Any, rank: int, read: Callable[[str], Tensor], scalars: dict[str, Any]) -> None:
    """Fills a new engine, whose module had the saved weights, with master weights and moments.

    Args:
        engine: as `deepspeed.initialize` returned it.
        rank: this process.
        read: "KEY/NAME" -> whole tensor.
        scalars: what `numbers` returned.
    """
    how = layout(engine, rank)
    inner = how.optimizer
    counts_in_python = type(inner).__module__.startswith("deepspeed")
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    keys = dict.fromkeys(key for p in trained for key in kept(inner, p))
    for flat in how.flats():
        step = scalars["step"] if counts_in_python else torch.tensor(float(scalars["step"]))
        if not counts_in_python and flat.device.type != "cpu":
            step = step.to(flat.device)  # where the fused AdamW keeps it
        inner.state[flat] = {"step": step, **{key: torch.zeros_like(flat.data) for key in keys}}
    how.link()
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            for key in (WEIGHT, *kept(inner, parameter)):
                shape = getattr(parameter, "ds_shape", parameter.shape)
                how.set(parameter, key, _fitting(read(f"{key}/{name}"), name, shape))
    for name in _SCALER:
        if name in scalars.get("scaler", {}):
            setattr(_scaler(engine), name, scalars["scaler"][name])


def _fitting(saved: Tensor, name: str, shape: torch.Size) -> Tensor:
    """A saved tensor, which must have its parameter's shape: copying would stretch a smaller one.

    Raises:
        UserError: it has not.
    """
    if saved.shape != shape or saved.dtype != torch.float32:
        raise UserError(
            f"the checkpoint's {name} is {saved.dtype} {list(saved.shape)}, the model's is"
            f" {list(shape)}: --overwrite starts the stage again"
        )
    return saved


def numbers(engine: Any, rank: int) -> dict[str, Any]:
    """The numbers of the state: Adam's step, and the loss scaler's where there is one."""
    how = layout(engine, rank)
    inner = how.optimizer
    first = next(iter(how.flats()))
    found: dict[str, Any] = {"step": int(inner.state[first]["step"]) if _stepped(how) else 0}
    if engine.fp16_enabled():
        scaler = _scaler(engine)
        found["scaler"] = {n: getattr(scaler, n) for n in _SCALER if hasattr(scaler, n)}
    return found


def _scaler(engine: Any) -> Any:
    wrapper = engine.optimizer
    for name in ("loss_scaler", "loss_scale_config"):
        if hasattr(wrapper, name):
            return getattr(wrapper, name)
    return wrapper
