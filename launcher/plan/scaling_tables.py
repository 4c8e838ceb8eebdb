"""The tables of `python -m launcher.plan` on scale: a step, its input, its checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from selfdistill.engine.runtime import preemption, zero
from selfdistill.launcher.plan import memory, scaling
from selfdistill.launcher.plan.forecast import Job, Plan
from selfdistill.launcher.plan.sheet import Sheet, duration
from selfdistill.launcher.plan.workload import ImageWork

#: Numbers of devices that are set beside the one that is asked for.
DEVICES = (8, 64, 1024)
#: Bytes a second of a rank's copy to its host's memory, assumed: half of what PCIe 4 carries.
COPY = 12e9
#: Seconds of a core for a pixel: 4,688 images of 64 x 64 a core-second (docs/performance.md).
DECODE = 1 / (4688 * 64 * 64)


@dataclass(frozen=True)
class Row:
    """A stage on so many devices.

    Attributes:
        job: the stage.
        devices: their number.
        strong: whether the global batch is the recipe's; else the micro-batch is.
        micro: samples of a device's micro-batch.
        batch: samples of a step on all devices.
        sent: bytes that a rank sends in a step.
        between: of these, the bytes that go to another node.
        step: its times.
        checkpoint: seconds that the ranks wait for one checkpoint; 0 where none are saved.
        written: seconds that the storage writes it.
        rate: samples a second, checkpoints included.
        efficiency: that, over as many times the rate of one device with the same work.
        saving: share of the time that goes into checkpoints.
    """

    job: Job
    devices: int
    strong: bool
    micro: int
    batch: int
    sent: float
    between: float
    step: scaling.Step
    checkpoint: float
    written: float
    rate: float
    efficiency: float
    saving: float


def links(plan: Plan) -> scaling.Links:
    """What joins the devices, by the options."""
    options = plan.options
    return scaling.Links(options.link_gbs * 1e9, options.network_gbs * 1e9, options.per_node)


def in_background(plan: Plan) -> bool:
    """Whether steps go on while a checkpoint is written: by default, devices being GPUs."""
    return plan.config.save_async is not False


def rows(plan: Plan) -> list[Row]:
    """Every stage on 8, 64, 1,024 and the asked number of devices."""
    return [found for job in plan.jobs for found in stage_rows(plan, job)]


def stage_rows(plan: Plan, job: Job) -> list[Row]:
    """A stage by number of devices: the recipe's batch where it can be cut, else its micro-batch.

    One device with the same work does the step's batch alone (strong), or one device's part of it
    (weak): at the same MFU both make as many samples a second, but for checkpoints.
    """
    config, options = plan.config, plan.options
    content, accumulation = zero.read(config.zero), job.section.accumulation
    parameters = plan.work.parameters(job.stage, plan.classes)
    shared = job.stage == "distill" and plan.mode == "sharded"
    collectives = scaling.asked(
        content,
        parameters,
        size=plan.size,
        accumulation=accumulation,
        sharded=plan.work.teacher() if shared else 0,
        twice=plan.work.teacher() if job.stage == "distill" else 0,
        node=options.per_node,
    )
    # Seconds of a sample on a device; bytes of a checkpoint.
    one = plan.work.flops(job.stage, plan.mode, plan.classes) / (plan.device.peak * options.mfu)
    every = config.save_every
    size = memory.checkpoint_bytes(parameters, job.saved) if every else 0.0
    written = size / (options.storage_gbs * 1e9)
    found = []
    for devices in sorted({*DEVICES, options.devices}):
        micro, rest = divmod(job.section.batch, devices * accumulation)
        micro = job.micro if rest else micro
        batch = micro * devices * accumulation
        step = scaling.step(
            collectives,
            links(plan),
            devices,
            micro * accumulation * one,
            overlap=scaling.overlaps(content),
            backwards=1 / accumulation if zero.stage_of(content) == 1 else 1.0,
        )
        saved = size / devices / COPY if in_background(plan) else written
        share = scaling.share_of_saving(saved, step.seconds, every)
        alone = (micro * accumulation if rest else batch) * one
        by_itself = size / COPY if in_background(plan) else written
        single = (1 - scaling.share_of_saving(by_itself, alone, every)) / one
        rate = batch / step.seconds * (1 - share)
        efficiency = rate / (devices * single)
        sent = scaling.volume(collectives, devices)
        between = scaling.between(collectives, devices, options.per_node)
        found.append(
            Row(
                *(job, devices, not rest, micro, batch, sent, between, step),
                *(saved, written, rate, efficiency, share),
            )
        )
    return found


def scaling_sheet(plan: Plan, shown: list[Row]) -> Sheet:
    """Time of a step by the number of devices, from `rows`."""
    options, setting = plan.options, Path(plan.config.zero).stem
    names = ("devices", "batch", "each", "compute", "comm.", "exposed", "step")
    sheet = Sheet(
        f"a step at scale, ms: {setting}, {100 * options.mfu:g}% MFU",
        ("stage", *names, f"{plan.work.samples}/s", "effic."),
        notes=["* as asked for; each: of a device's micro-batch"],
    )
    for row in shown:
        step, asked = row.step, row.devices == options.devices
        sheet.add(
            row.job.name,
            f"{row.devices:,}{' *' if asked else ''}",
            f"{row.batch:,}{'' if row.strong else ' w'}",
            f"{row.micro:,}",
            *(f"{1000 * t:.2f}" for t in (step.compute, step.communication, step.exposed)),
            f"{1000 * step.seconds:.2f}",
            f"{row.rate:,.0f}",
            f"{100 * row.efficiency:.0f}%",
            bold=asked,
        )
    weak = {row.job.name: row.micro for row in shown if not row.strong}
    if weak:
        listed = ", ".join(f"{name} {micro} {plan.work.samples}" for name, micro in weak.items())
        sheet.notes.append(
            "w: the recipe's batch cannot be cut over so many devices: weak scaling, with the"
            f" micro-batch that a device has on {options.devices} ({listed}), and so a larger batch"
            " than the recipe's, which trains otherwise. All other rows keep the recipe's batch:"
            " strong scaling"
        )
    if any(row.step.compute < scaling.SHORT_STEP for row in shown):
        sheet.notes.append(
            f"compute below {1000 * scaling.SHORT_STEP:g} ms is bound by launching kernels, and its"
            " real MFU is far lower"
        )
    sheet.notes += _formulas(plan, shown)
    return sheet


def _formulas(plan: Plan, shown: list[Row]) -> list[str]:
    """What is behind the figures, in words."""
    options, content = plan.options, zero.read(plan.config.zero)
    stage, size = zero.stage_of(content), plan.size
    found = memory.settings(content, node=options.per_node)
    sums = {
        0: f"all-reduce {size} P",
        1: f"all-reduce {size} P + all-gather {size} P",
        2: f"A x all-reduce {size} P + all-gather {size} P",
        3: f"A x (all-gather {size} (P + frozen) + reduce-scatter {size} P)",
    }
    most = max(row.devices for row in shown)
    lines = [
        f"comm.: {sums[stage]}, A micro-batches a step, as DeepSpeed 0.19.8 asks for it",
        f"comm. = bytes / bandwidth + calls x latency: {options.link_gbs:g} GB/s a GPU in its node"
        f" (--link_gbs), min({options.link_gbs:g}, {options.network_gbs:g}) GB/s across nodes"
        " (--network_gbs); latencies of NCCL's tuning model. Defaults: a DGX H100",
        f"on {most:,} devices the ranks agree every {preemption.interval(most)} step(s) whether one"
        " was asked to leave: a sum on their processors,"
        f" {1000 * preemption.seconds(most):.0f} ms beside the steps",
        "exposed: what hides behind neither forward nor backward. step = compute + exposed. All"
        " formulas: docs/planning.md",
    ]
    if stage == 3 and found.param_persistence_threshold:
        lines.append(
            "S: in parameters up to stage3_param_persistence_threshold, gathered after a step one"
            " by one, each with its own latency; 0 on many nodes"
        )
    if stage == 3 and found.zero_hpz_partition_size > 1:
        lines.append(
            f"nodes of {found.zero_hpz_partition_size} keep the weights from the first forward to"
            " the step: later gathers, of backwards and of further micro-batches, stay in a node"
        )
    return lines


def traffic_sheet(plan: Plan, shown: list[Row]) -> Sheet:
    """What a rank sends in a step, inside its node and out of it, from `rows`."""
    names = ("devices", "nodes", "a rank sends", "in its node", "to others", "a node to others")
    sheet = Sheet(f"MB sent in a step: {Path(plan.config.zero).stem}", ("stage", *names))
    for row in shown:
        nodes, asked = links(plan).nodes(row.devices), row.devices == plan.options.devices
        ranks = min(row.devices, plan.options.per_node)
        sizes = (row.sent, row.sent - row.between, row.between, ranks * row.between)
        sheet.add(
            row.job.name,
            *(f"{row.devices:,}{' *' if asked else ''}", f"{nodes:,}"),
            *(f"{size / 1e6:,.1f}" for size in sizes),
            bold=asked,
        )
    sheet.notes.append(
        "a ring over all ranks, which are numbered node by node, leaves each node once: of what its"
        " ranks send in it, one rank's share goes to others"
    )
    return sheet


def feed_sheet(plan: Plan, shown: list[Row]) -> Sheet:
    """What the nodes read and save at scale, from `rows`."""
    options, every = plan.options, plan.config.save_every
    names = ("devices", "nodes", "MB/s a node", "MB/s in all", "checkpoint, s", "of the time")
    sheet = Sheet("input and checkpoints at scale", ("stage", *names))
    for row in shown:
        size = row.job.sample_bytes
        flow = row.rate * (plan.work.input_bytes() if size is None else size) / 1e6
        nodes, asked = links(plan).nodes(row.devices), row.devices == options.devices
        saving = (f"{row.checkpoint:.2f}", f"{100 * row.saving:.1f}%") if every else ("none",) * 2
        sheet.add(
            row.job.name,
            *(f"{row.devices:,}{' *' if asked else ''}", f"{nodes:,}"),
            *(f"{flow / nodes:,.1f}", f"{flow:,.1f}", *saving),
            bold=asked,
        )
    stored = all(row.job.sample_bytes is not None for row in shown)
    place = "in the shards" if stored else "on the device (no data given)"
    sheet.notes.append(f"MB/s = {plan.work.samples}/s x bytes each {place}")
    if every and in_background(plan):
        sheet.notes.append(
            f"checkpoint = (12 B x P + 4 B x F) / devices / {COPY / 1e9:g} GB/s, the copy to the"
            " hosts' memory that a step waits for (assumed, not measured; --save_async false waits"
            f" for the disk); of the time: checkpoint / ({every} steps + checkpoint)"
        )
    elif every:
        sheet.notes.append(
            f"checkpoint = (12 B x P + 4 B x F) / {options.storage_gbs:g} GB/s that the shared"
            " storage writes for all nodes together (--storage_gbs), all ranks waiting; of the"
            f" time: checkpoint / ({every} steps + checkpoint)"
        )
    return sheet


def limits_sheet(plan: Plan, shown: list[Row]) -> Sheet:
    """What bounds the devices that are asked for: what goes on side by side, for one step each."""
    options, every = plan.options, plan.config.save_every
    read_gbs = options.read_gbs or options.storage_gbs
    names = ("compute", "ranks wait", "storage reads", "cores decode", "storage writes", "limit")
    sheet = Sheet(f"what limits a step on {options.devices:,} device(s), ms", ("stage", *names))
    spent = 0.0
    for row in (row for row in shown if row.devices == options.devices):
        stored = row.job.sample_bytes
        cores = options.cores * links(plan).nodes(row.devices)
        images = isinstance(plan.work, ImageWork)
        pixels = math.prod(plan.work.shape.sides) if isinstance(plan.work, ImageWork) else 0
        beside = {
            "storage reads": None if stored is None else row.batch * stored / (read_gbs * 1e9),
            "cores decode": row.batch * pixels * DECODE / cores if images else None,
            "storage writes": row.written / every if every else None,
        }
        most, longest = "compute", row.step.compute
        if row.step.exposed > longest:
            most, longest = "ranks wait", row.step.exposed
        for name, seconds in beside.items():
            if seconds is not None and seconds > max(longest, row.step.seconds):
                most, longest = name, seconds
        sheet.add(
            row.job.name,
            *(f"{1000 * t:.2f}" for t in (row.step.compute, row.step.exposed)),
            *("-" if t is None else f"{1000 * t:.2f}" for t in beside.values()),
            most,
        )
        if longest > row.step.seconds:
            sheet.notes.append(
                f"{row.job.name}: {most}: {longest / row.step.seconds:.1f} times as long as the"
                " step, which waits for it"
            )
        spent += row.job.repeats * row.job.steps * max(longest, row.step.seconds) / (1 - row.saving)
    hours = options.devices * spent / 3600
    cost = f", {options.price * hours:,.2f} at {options.price:g} an hour" if options.price else ""
    sheet.notes.append(
        f"with all that: {options.devices:,} device(s) x {duration(spent)} = {hours:,.1f} device"
        f" hours{cost}; not in it: the start, scores, the teacher's table, restarts"
    )
    sheet.notes.append(
        f"reads: bytes of the shards / {read_gbs:g} GB/s (--read_gbs), as in the first epoch,"
        f" before a node's cache has them; decode: {1e9 * DECODE:.0f} ns a pixel of a PNG, measured"
        f" at 64 pixels, on {options.cores} cores a node (--cores); writes: a checkpoint in the"
        " steps between two"
    )
    return sheet
