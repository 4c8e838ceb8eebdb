"""The tables of `python -m launcher.plan`: memory, disk, time, input; scale: scaling_tables.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from selfdistill.data.shards.manifest import is_remote
from selfdistill.engine.config.schema import Config
from selfdistill.engine.runtime import zero
from selfdistill.engine.training import teacher
from selfdistill.launcher.plan import memory
from selfdistill.launcher.plan.forecast import Job, Plan
from selfdistill.launcher.plan.scaling import SHORT_STEP
from selfdistill.launcher.plan.scaling_tables import (
    feed_sheet,
    limits_sheet,
    rows,
    scaling_sheet,
    traffic_sheet,
)
from selfdistill.launcher.plan.sheet import Sheet, duration

GIB = 2**30
#: Of the plan's `rows`.
SCALE = (scaling_sheet, traffic_sheet, feed_sheet, limits_sheet)

#: ZeRO settings that are set side by side; the one that is asked for comes in addition.
SETTINGS = ("zero0", "zero1", "zero2", "zero3", "zero3_hpz", "zero3_offload")


def _uncounted(config: Config) -> list[str]:
    """A note on what a launch needs beside the memory that is planned."""
    more = {
        f"--distill.match {config.distill.match} (another model's weights)": (
            config.distill.match != "feature"
        ),
    }
    told = [name for name, asked in more.items() if asked]
    return [f"not counted: {'; '.join(told)}"] if told else []


def show(plan: Plan, console: Console) -> None:
    """Prints all tables, with their arithmetic."""
    options, device = plan.options, plan.device
    if "device" not in options.model_fields_set:
        console.print(
            f"note: planned for {device.name}; --device names another GPU. For processors give"
            " --device cpu --precision fp32 --mfu 0.6, --tflops (of two cores 0.3) and --memory_gb",
            markup=False,
            highlight=False,
        )
    console.print(
        f"{plan.work.origin}\n{options.devices} x {device.name} ({device.memory / 1e9:g} GB,"
        f" {device.peak / 1e12:g} TFLOP/s in {plan.config.precision}) on {plan.nodes} node(s),"
        f" teacher {plan.mode}",
        markup=False,
        highlight=False,
    )
    sheets = [memory_sheet(plan, job) for job in plan.jobs]
    sheets[-1].notes += [
        "* as asked for",
        *memory.notes(plan.size, plan.product, options.devices),
        *_uncounted(plan.config),
    ]
    scaled = rows(plan)
    sheets += [disk_sheet(plan), time_sheet(plan), input_sheet(plan)]
    sheets += [sheet(plan, scaled) for sheet in SCALE]
    for sheet in sheets:
        sheet.show(console)


def need(plan: Plan, job: Job, content: dict[str, Any]) -> memory.Need:
    """Memory of one device in a stage under a DeepSpeed configuration."""
    parameters, world = plan.work.parameters(job.stage, plan.classes), plan.options.devices
    teacher = _teacher(plan, content) if job.stage == "distill" else 0.0
    # Autocast keeps no copies of what has no gradient, or takes no part.
    whole = job.stage != "decoder" and plan.work.reconstructs(job.stage)
    copied = parameters.all if whole else parameters.trained
    copies = plan.product * copied if plan.product < plan.size else 0
    if copies and job.stage == "distill" and plan.config.adapt != "full":
        copies += plan.product * parameters.frozen  # autocast keeps copies of trained ones alone
    return memory.need(
        content,
        parameters,
        size=plan.size,
        world=world,
        accumulation=job.section.accumulation,
        copies=job.copies,
        anchored=job.anchored,
        start=plan.work.start(job.stage, plan.classes),
        teacher=teacher,
        activations=copies + job.micro * plan.work.activations(job.stage, plan.product),
        node=plan.options.per_node,
    )


def _teacher(plan: Plan, content: dict[str, Any]) -> float:
    """Bytes of the teacher on one device: of its updates alone where it shares what is frozen."""
    if plan.config.adapt == "lora" and plan.mode == "replicated" and zero.stage_of(content) < 3:
        return plan.size * plan.work.updates()
    return memory.teacher_bytes(
        plan.mode,
        plan.work.teacher(),
        plan.options.devices,
        product=plan.product,
        size=plan.size,
    )


def memory_sheet(plan: Plan, job: Job) -> Sheet:
    """Memory of one device in a stage, by ZeRO setting."""
    parameters = plan.work.parameters(job.stage, plan.classes)
    options, asked = plan.options, plan.config.zero
    names = ("weights", "grad.", "optim.", "buff.", "teach.", "activ.", "total", "fits", "theirs")
    sheet = Sheet(
        f"memory per GPU, GiB: {job.name}, {job.micro} {plan.work.samples} a micro-batch",
        ("--zero", *names),
    )
    sheet.notes.append(
        f"P = {parameters.trained:,} trained + {parameters.frozen:,} frozen parameters"
        f" (the largest module has {parameters.largest:,})"
    )
    for name in [*SETTINGS, *([] if asked in SETTINGS else [asked])]:
        content, label = zero.read(name), Path(name).stem
        found = need(plan, job, content)
        theirs = memory.deepspeed_estimate(
            content, parameters, min(options.devices, options.per_node), plan.nodes
        )
        parts = (found.weights, found.gradients, found.optimizer, found.buffers, found.teacher)
        sheet.add(
            f"{label}{' *' if name == asked else ''}",
            *(f"{part / GIB:.2f}" for part in (*parts, found.activations, found.total)),
            "yes" if found.total <= plan.device.memory else "NO",
            "-" if theirs is None else f"{theirs / GIB:.2f}",
            bold=name == asked,
        )
        if found.host:
            sheet.notes.append(f"{label}: {found.host / GIB:.2f} GiB of host memory a rank")
    return sheet


def disk_sheet(plan: Plan) -> Sheet:
    """What the run leaves, and what it needs while it runs."""
    config, sizes = plan.config, dict[tuple[str, str], float]()
    largest = 0.0, ""
    for job in plan.jobs:
        parameters = plan.work.parameters(job.stage, plan.classes)
        if config.save_every:
            each = 12 + 4 * job.saved
            one = f"({each} B x {parameters.trained:,} + 4 B x {parameters.frozen:,})"
            size = memory.checkpoint_bytes(parameters, job.saved)
            if config.keep_finished:
                name = f"{job.name}: checkpoints"
                sizes[name, f"{one} x keep {config.keep}{job.times}"] = (
                    size * config.keep * job.repeats
                )
            largest = max(largest, (size, one))
        images = plan.work.samples == "images"
        twice = images and job.stage == "finetune" and config.finetune.settled == "cls"
        written = plan.work.exported(job.stage, plan.classes)
        arithmetic = f"4 B x {written:,}{' x 2 (transformers, timm)' if twice else ''}"
        size = 4 * written * (1 + twice) * job.repeats
        sizes[f"{job.name}: export", arithmetic + job.times] = size
        shape = plan.work.feature(config.distill.settled)
        if job.stage == "distill" and plan.mode == "cached" and shape is not None:
            values = " x ".join(map(str, shape))
            arithmetic = (
                f"4 B x {job.samples:,} x {values}{job.times} (twice that while it is joined)"
            )
            size = teacher.table_bytes(job.samples, shape) * job.repeats
            sizes[f"{job.name}: teacher's table", arithmetic] = size
    if config.save_every:  # of one stage at a time
        most, one = largest
        if config.keep_finished:
            sizes["the largest checkpoint, being written", one] = most
        else:
            arithmetic = f"{one} x (keep {config.keep} + 1 being written)"
            sizes["checkpoints of the stage that runs", arithmetic] = most * (config.keep + 1)
    for name, manifest in plan.manifests.items():
        size = sum(shard.bytes for shard in manifest.shards)
        if is_remote(manifest.root):
            limit = config.data.cache_gb
            arithmetic = f"{size / GIB:.2f} GiB of shards, at most --data.cache_gb {limit:g}"
            sizes[f"cache of {name} on each node", arithmetic] = min(size, limit * 1e9)
        else:
            sizes[f"shards of {name}", f"{len(manifest.shards)} files"] = size
    lines = [(*what, f"{size / GIB:.2f}") for what, size in sizes.items()]
    together = ("together", "", f"{sum(sizes.values()) / GIB:.2f}")
    return Sheet("disk, GiB", ("what", "arithmetic", "GiB"), [*lines, (), together])


def time_sheet(plan: Plan) -> Sheet:
    """FLOPs and time of each stage."""
    options, work, total = plan.options, plan.work, 0.0
    names = ("steps", "batch", "GFLOP each", "PFLOP", f"{work.samples}/s", "ms/step", "time")
    sheet = Sheet(f"time at {100 * options.mfu:g}% MFU", ("stage", *names))
    rate = options.devices * plan.device.peak * options.mfu
    for job in plan.jobs:
        one = work.flops(job.stage, plan.mode, plan.classes)
        flops, batch, steps = plan.flops(job), job.section.batch, f"{job.steps:,}"
        if job.stage == "distill" and plan.mode == "cached":
            encode = work.encode_flops()
            once = job.samples * encode * job.repeats
            total += plan.seconds(once)
            sheet.add(
                "teacher's table" + job.times,
                *("", "", f"{encode / 1e9:.1f}", f"{once / 1e15:.2f}", f"{rate / encode:,.0f}"),
                *("", duration(plan.seconds(once))),
            )
        spent, seconds = plan.seconds(flops) * job.repeats, batch * one / rate
        total += spent
        sheet.add(
            job.name + job.times,
            *(steps, f"{batch}", f"{one / 1e9:.1f}", f"{flops * job.repeats / 1e15:.2f}"),
            *(f"{rate / one:,.0f}", f"{1000 * seconds:.1f}", duration(spent)),
        )
        length = ""
        if job.section.steps is None:
            length = f" ({job.section.epochs:g} epochs x {job.epoch:,} / {batch})"
        sheet.notes.append(
            f"{job.name}: {steps} steps{length} x {batch} x {one / 1e9:.1f} GFLOP{job.times}"
            f" / ({options.devices} x {plan.device.peak / 1e12:g} TFLOP/s x {options.mfu:g})"
            f" = {spent:,.0f} s"
        )
        if seconds < SHORT_STEP:
            sheet.notes.append(
                f"{job.name}: a step of {1000 * seconds:.1f} ms is bound by launching kernels and"
                f" by communication, not by FLOPs. With {job.micro} {work.samples} a device expect"
                " a far lower MFU, or take fewer devices"
            )
    if plan.config.checkpoint_activations:
        sheet.notes.append(
            "--checkpoint_activations: each forward is computed twice, which these FLOPs leave out:"
            " expect three quarters of the MFU"
        )
    sheet.add()
    sheet.add("together", "", "", "", "", "", "", duration(total))
    sheet.notes.append(
        "FLOPs: matrix products, a backward twice its forward (engine/monitoring/flops.py). The MFU"
        " is your assumption; a run shows its own in TensorBoard. What the devices wait for is in"
        " the last table."
    )
    return sheet


def input_sheet(plan: Plan) -> Sheet:
    """The rate at which each node must read, decode and copy samples to keep that MFU."""
    work, options, partitions = plan.work, plan.options, plan.config.data.partitions
    names = (f"{work.samples}/s", "bytes each", "from shards, MB/s", "to devices, MB/s")
    sheet = Sheet("input that keeps the devices busy, a node", ("stage", *names))
    for job in plan.jobs:
        one = work.flops(job.stage, plan.mode, plan.classes)
        rate = options.devices * plan.device.peak * options.mfu / one / plan.nodes
        stored = job.sample_bytes
        shards = ("no data", "no data")
        if stored is not None:
            shards = (f"{stored:,.0f}", f"{rate * stored / 1e6:,.1f}")
        to_devices = f"{rate * work.input_bytes() / 1e6:,.1f}"
        sheet.add(job.name, f"{rate:,.0f}", *shards, to_devices)
    sheet.notes.append("bytes each: of the tar, labels and headers included; MB = 1e6 bytes")
    if partitions < plan.nodes and any(is_remote(m.root) for m in plan.manifests.values()):
        sheet.notes.append(
            f"every node fetches all shards ({partitions} partition(s) for {plan.nodes} nodes):"
            f" --data.partitions {plan.nodes} lets each fetch its own part"
        )
    return sheet
