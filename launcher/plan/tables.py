"""The tables of `python -m launcher.plan`: memory, disk, time, input; scale: scaling_tables.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from selfdistill.data.shards.manifest import is_remote
from selfdistill.engine.runtime import zero
from selfdistill.engine.training import teacher
from selfdistill.launcher.plan import memory
from selfdistill.launcher.plan.forecast import Job, Plan
from selfdistill.launcher.plan.scaling import SHORT_STEP
from selfdistill.launcher.plan.scaling_tables import feed_table, rows, scaling_table

GIB, MIB = 2**30, 2**20

#: ZeRO settings that are set side by side; the one that is asked for comes in addition.
SETTINGS = ("zero0", "zero1", "zero2", "zero3", "zero3_offload")


def show(plan: Plan, console: Console) -> None:
    """Prints all tables, with their arithmetic."""
    options, config, device = plan.options, plan.config, plan.device
    console.print(
        f"{plan.work.origin}\n{options.devices} x {device.name} ({device.memory / 1e9:g} GB,"
        f" {device.peak / 1e12:g} TFLOP/s in {config.precision}) on {plan.nodes} node(s), teacher"
        f" {plan.mode}",
        markup=False,
        highlight=False,
    )
    parts = [memory_table(plan, job) for job in plan.jobs]
    parts[-1][1].extend(["* as asked for", *memory.notes(plan.size, plan.product, options.devices)])
    more = [disk_table(plan), time_table(plan), input_table(plan)]
    scaled = rows(plan)
    more += [scaling_table(plan, scaled), feed_table(plan, scaled)]
    for table, notes in [*parts, *more]:
        console.print()
        console.print(table)
        for note in notes:
            console.print(note, style="dim", markup=False, highlight=False)


def need(plan: Plan, job: Job, content: dict[str, Any]) -> memory.Need:
    """Memory of one device in a stage under a DeepSpeed configuration."""
    parameters, world = plan.work.parameters(job.stage, plan.classes), plan.options.devices
    taught = plan.work.teacher() if job.stage == "distill" else 0
    copies = plan.product * parameters.all if plan.product < plan.size else 0
    return memory.need(
        content,
        parameters,
        size=plan.size,
        world=world,
        accumulation=job.section.accumulation,
        teacher=memory.teacher_bytes(
            plan.mode, taught, world, product=plan.product, size=plan.size
        ),
        activations=copies + job.micro * plan.work.activations(job.stage, plan.product),
    )


def memory_table(plan: Plan, job: Job) -> tuple[Table, list[str]]:
    """Memory of one device in a stage, by ZeRO setting."""
    parameters = plan.work.parameters(job.stage, plan.classes)
    table = Table(
        title=f"memory per GPU, GiB: {job.name}, {job.micro} {plan.work.samples} a micro-batch",
        title_justify="left",
        box=box.SIMPLE,
        padding=0,
    )
    table.add_column("--zero", no_wrap=True)
    columns = ("weights", "grad.", "optim.", "buff.", "teach.", "activ.", "total", "fits")
    for name in (*columns, "theirs"):
        table.add_column(name, justify="right")
    options, asked = plan.options, plan.config.zero
    notes = [
        f"P = {parameters.trained:,} trained + {parameters.frozen:,} frozen parameters"
        f" (the largest module has {parameters.largest:,})"
    ]
    for name in [*SETTINGS, *([] if asked in SETTINGS else [asked])]:
        content = zero.read(name)
        found = need(plan, job, content)
        theirs = memory.deepspeed_estimate(
            content, parameters, min(options.devices, options.per_node), plan.nodes
        )
        parts = (
            *(found.weights, found.gradients, found.optimizer, found.buffers),
            *(found.teacher, found.activations, found.total),
        )
        table.add_row(
            f"{Path(name).stem}{' *' if name == asked else ''}",
            *(f"{part / GIB:.2f}" for part in parts),
            "yes" if found.total <= plan.device.memory else "NO",
            "-" if theirs is None else f"{theirs / GIB:.2f}",
            style="bold" if name == asked else "",
        )
        if found.host:
            notes.append(f"{Path(name).stem}: {found.host / GIB:.2f} GiB of host memory a rank")
    return table, notes


def disk_table(plan: Plan) -> tuple[Table, list[str]]:
    """What the run leaves, and what it needs while it runs."""
    table = Table(title="disk, GiB")
    table.add_column("what")
    table.add_column("arithmetic")
    table.add_column("GiB", justify="right")
    config, total = plan.config, 0.0

    def row(what: str, arithmetic: str, size: float) -> None:
        nonlocal total
        total += size
        table.add_row(what, arithmetic, f"{size / GIB:.2f}")

    for job in plan.jobs:
        parameters = plan.work.parameters(job.stage, plan.classes)
        times = f" x {job.repeats}" if job.repeats > 1 else ""
        if config.save_every:
            one = memory.checkpoint_bytes(parameters)
            row(
                f"{job.name}: checkpoints",
                f"12 B x {parameters.trained:,} x (keep {config.keep} + 1 being written){times}",
                one * (config.keep + 1) * job.repeats,
            )
        copies = 2 if _twice(plan, job) else 1
        row(
            f"{job.name}: export",
            f"4 B x {parameters.all:,}{' x 2 (transformers, timm)' if copies == 2 else ''}{times}",
            4 * parameters.all * copies * job.repeats,
        )
        shape = plan.work.feature(config.distill.feature)
        if job.stage == "distill" and plan.mode == "cached" and shape is not None:
            size = teacher.table_bytes(job.samples, shape)
            values = " x ".join(map(str, shape))
            row(
                f"{job.name}: teacher's table",
                f"4 B x {job.samples:,} x {values}{times} (twice that while it is joined)",
                size * job.repeats,
            )
    for name, manifest in plan.manifests.items():
        size = sum(s.bytes for s in manifest.shards)
        if is_remote(manifest.root):
            limit = config.data.cache_gb * 1e9
            row(
                f"cache of {name} on each node",
                f"{size / GIB:.2f} GiB of shards, at most --data.cache_gb {config.data.cache_gb:g}",
                min(size, limit),
            )
        else:
            row(f"shards of {name}", f"{len(manifest.shards)} files", size)
    table.add_section()
    table.add_row("together", "", f"{total / GIB:.2f}")
    return table, []


def _twice(plan: Plan, job: Job) -> bool:
    """Whether an image classifier is written for transformers and for timm."""
    images = plan.work.samples == "images"
    return images and job.stage == "finetune" and plan.config.finetune.pool == "cls"


def time_table(plan: Plan) -> tuple[Table, list[str]]:
    """FLOPs and time of each stage."""
    options, work = plan.options, plan.work
    table = Table(title=f"time at {100 * options.mfu:g}% MFU")
    table.add_column("stage")
    columns = ("steps", "batch", "GFLOP each", "PFLOP", f"{work.samples}/s")
    for name in (*columns, "ms/step", "time"):
        table.add_column(name, justify="right")
    notes, total = [], 0.0
    rate = options.devices * plan.device.peak * options.mfu
    for job in plan.jobs:
        one = work.flops(job.stage, plan.mode, plan.classes)
        flops, batch = plan.flops(job), job.section.batch
        name, steps = job.name, f"{job.steps:,}"
        if job.stage == "distill" and plan.mode == "cached":
            once = job.samples * work.encode_flops() * job.repeats
            total += plan.seconds(once)
            table.add_row(
                "teacher's table" + _times(job),
                *("", "", f"{work.encode_flops() / 1e9:.1f}", f"{once / 1e15:.2f}"),
                *(f"{rate / work.encode_flops():,.0f}", "", duration(plan.seconds(once))),
            )
        spent = plan.seconds(flops) * job.repeats
        total += spent
        table.add_row(
            name + _times(job),
            *(steps, f"{batch}", f"{one / 1e9:.1f}", f"{flops * job.repeats / 1e15:.2f}"),
            *(f"{rate / one:,.0f}", f"{1000 * batch * one / rate:.1f}", duration(spent)),
        )
        length = ""
        if job.section.steps is None:
            epochs = job.section.epochs
            length = f" ({epochs:g} epochs x {job.samples:,} / {batch})"
        notes.append(
            f"{name}: {steps} steps{length} x {batch} x {one / 1e9:.1f} GFLOP"
            f"{_times(job)} / ({options.devices} x {plan.device.peak / 1e12:g} TFLOP/s x"
            f" {options.mfu:g}) = {spent:,.0f} s"
        )
        if batch * one / rate < SHORT_STEP:
            notes.append(
                f"{name}: a step of {1000 * batch * one / rate:.1f} ms is bound by launching"
                f" kernels and by communication, not by FLOPs: with {job.micro} {work.samples} a"
                " device expect a far lower MFU, or take fewer devices"
            )
    table.add_section()
    table.add_row("together", "", "", "", "", "", "", duration(total))
    notes.append(
        "FLOPs: matrix products, a backward twice its forward (engine/monitoring/flops.py). Not in"
        " the time: starting, evaluation, checkpoints, waiting for data. The MFU is your"
        " assumption: a run shows its own in TensorBoard."
    )
    return table, notes


def input_table(plan: Plan) -> tuple[Table, list[str]]:
    """The rate at which each node must read, decode and copy samples to keep that MFU."""
    work, options = plan.work, plan.options
    table = Table(title="input that keeps the devices busy, a node")
    table.add_column("stage")
    for name in (f"{work.samples}/s", "bytes each", "from shards, MB/s", "to devices, MB/s"):
        table.add_column(name, justify="right")
    for job in plan.jobs:
        one = work.flops(job.stage, plan.mode, plan.classes)
        rate = options.devices * plan.device.peak * options.mfu / one / plan.nodes
        stored = job.sample_bytes
        table.add_row(
            job.name,
            f"{rate:,.0f}",
            "no data" if stored is None else f"{stored:,.0f}",
            "no data" if stored is None else f"{rate * stored / 1e6:,.1f}",
            f"{rate * work.input_bytes() / 1e6:,.1f}",
        )
    notes = ["bytes each: of the tar, labels and headers included; MB = 1e6 bytes"]
    remote = [m for m in plan.manifests.values() if is_remote(m.root)]
    if remote and plan.config.data.partitions < plan.nodes:
        notes.append(
            f"every node fetches all shards ({plan.config.data.partitions} partition(s) for"
            f" {plan.nodes} nodes): --data.partitions {plan.nodes} lets each fetch its own part"
        )
    return table, notes


def _times(job: Job) -> str:
    return f" x {job.repeats}" if job.repeats > 1 else ""


def duration(seconds: float) -> str:
    """Seconds as 12.3 s, 4:05 min or 3:10:00 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"
