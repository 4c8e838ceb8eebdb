"""The plan of a step at scale: hand-computed figures, what must rise or fall, counted bytes."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale import model as scale_model
from selfdistill.data import pack
from selfdistill.engine.config.options import load
from selfdistill.engine.runtime import zero
from selfdistill.launcher.plan import Options, scaling, scaling_tables
from selfdistill.launcher.plan import __main__ as plan
from selfdistill.launcher.plan.forecast import Plan, prepare
from selfdistill.launcher.plan.scaling import Collective, Links, Step
from selfdistill.launcher.plan.workload import Parameters
from tests.kit.launches import make_images

#: 100 million trained parameters, half a million frozen ones; one of 5 million is the largest.
MODEL = Parameters(100_000_000, 500_000, 5_000_000)
#: 100 GB/s within a node of 4, 50 GB/s between nodes.
LINKS = Links(100e9, 50e9, 4)


def content(stage: int, **more: Any) -> dict[str, Any]:
    buckets = {"reduce_bucket_size": 40_000_000, "stage3_prefetch_bucket_size": 50_000_000}
    return {"zero_optimization": {"stage": stage, **buckets, **more}}


def totals(found: list[Collective]) -> dict[str, tuple[float, int]]:
    """Kind -> bytes and calls, whenever they are."""
    kinds = dict.fromkeys(c.kind for c in found)
    return {
        kind: (
            sum(c.payload for c in found if c.kind == kind),
            sum(c.calls for c in found if c.kind == kind),
        )
        for kind in kinds
    }


def made(options: dict[str, Any] | None = None, **overrides: Any) -> Plan:
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    told = {"samples": 6000, "devices": 8} | (options or {})
    return prepare(Options(**told), load({"recipe": "vit_base", "precision": "bf16"} | named))


# Bytes


def test_a_ring_of_four() -> None:
    # Of 800 bytes each rank keeps a quarter: 600 are sent, twice that to sum and hand out.
    assert scaling.sent("all-gather", 800, 4) == 600
    assert scaling.sent("reduce-scatter", 800, 4) == 600
    assert scaling.sent("all-reduce", 800, 4) == 1200
    assert scaling.sent("all-reduce", 800, 1) == 0


def test_the_textbook_is_2_2_2_and_3() -> None:
    for stage, times in ((0, 2), (1, 2), (2, 2), (3, 3)):
        found = scale_model.textbook(stage, 1000, size=4)
        assert scaling.volume(found, 4) == times * 1000 * 4 * 3 / 4
    assert scaling.volume(scale_model.textbook(2, 1000, size=4, accumulation=3), 2) == 8000
    assert scaling.volume(scale_model.textbook(3, 1000, size=4, accumulation=3), 2) == 18000


def test_what_deepspeed_asks_for() -> None:
    every = {stage: totals(scaling.asked(content(stage), MODEL, size=2)) for stage in range(4)}
    # 200 MB at 2 bytes. 100 million values in buckets of 40 million: 3 sums.
    assert every[0] == {"all-reduce": (200e6, 1)}
    assert every[1] == every[2] == {"all-gather": (200e6, 2), "all-reduce": (200e6, 3)}
    # 100.5 million parameters, 50 million a gather.
    gathers, sums = (201e6, 3), (200e6, 3)
    assert every[3] == {"all-gather": gathers, "reduce-scatter": sums, "all-reduce": (16, 2)}


def test_micro_batches_are_summed_one_by_one_from_zero_2_on() -> None:
    every = [
        totals(scaling.asked(content(stage), MODEL, size=4, accumulation=2)) for stage in range(4)
    ]
    assert [found["all-reduce"][0] for found in every] == [400e6, 400e6, 800e6, 16]
    assert every[3]["reduce-scatter"] == (800e6, 6)
    assert every[3]["all-gather"] == (804e6, 6)


def test_other_settings_of_zero() -> None:
    apart = content(2, use_multi_rank_bucket_allreduce=False)
    assert totals(scaling.asked(apart, MODEL, size=4))["reduce"] == (400e6, 3)
    little = content(3, stage3_max_live_parameters=1_000_000)
    assert totals(scaling.asked(little, MODEL, size=4))["all-gather"] == (804e6, 6)
    # No bucket is smaller than the largest module: 21 gathers of up to 5 million.
    small = content(3, stage3_prefetch_bucket_size=0)
    assert totals(scaling.asked(small, MODEL, size=4))["all-gather"] == (402e6, 21)
    # Two of a thousand values, kept whole: once a step, each by itself, and not in the forward.
    many = dataclasses.replace(MODEL, sizes=(5_000_000, 1000, 1000))
    whole = content(3, stage3_param_persistence_threshold=100_000)
    kept = totals(scaling.asked(whole, many, size=4, accumulation=2))["all-gather"]
    assert kept == (2 * (402e6 - 8000) + 8000, 2 * 3 + 2)
    # hpZ: the first forward over all ranks, what follows in a node, the encoder's second pass, too.
    nodes = {"stage3_max_reuse_distance": 0, "zero_hpz_partition_size": "auto"}
    found = scaling.asked(content(3, **nodes), MODEL, size=4, twice=20_000_000, node=8)
    assert totals([c for c in found if not c.group])["all-gather"] == (402e6, 3)
    inside = [c for c in found if c.group == 8]
    assert totals(inside) == {"all-gather": (402e6 + 160e6, 1 + 3)}
    sent = (402e6 + 400e6 + 32) * 63 / 64
    assert scaling.volume(found, 64) == pytest.approx(sent + 562e6 * 7 / 8)
    assert scaling.between(found, 64, 8) == pytest.approx(sent / 8)
    assert scaling.between(found, 8, 8) == 0
    taught = scaling.asked(content(0), MODEL, size=4, sharded=60_000_000)
    assert totals(taught)["all-gather"] == (240e6, 2)


def test_what_has_nothing_to_hide_behind() -> None:
    first = scaling.asked(content(1), MODEL, size=2)
    sums = [c for c in first if c.kind == "all-reduce" and c.payload > 100]
    # Two full buckets of 40 million go out while the backward runs, 20 million when it is over.
    assert [(c.when, c.payload, c.calls) for c in sums] == [
        ("backward", 160e6, 2),
        ("alone", 40e6, 1),
    ]
    third = scaling.asked(content(3), MODEL, size=2)
    gathers = [(c.when, c.payload) for c in third if c.kind == "all-gather"]
    assert gathers == [("alone", 100e6), ("forward", 101e6)]


#: Bytes of all tensors in a late step on two gloo ranks, as `python -m benchmarks.scale` counts
#: them: the distillation of recipes/vit_small in fp32. ZeRO 3 with no persistent parameters.
SMALL = Parameters(2_967_936, 18_720, 147_456)
COUNTED: dict[str, dict[scaling.Collected, int]] = {
    "zero0": {"all-reduce": 11_871_744},
    "zero1": {"all-reduce": 11_871_744, "all-gather": 11_797_632 + 74_112},
    "zero2": {"all-reduce": 11_871_744, "all-gather": 11_797_632 + 74_112},
    "zero3": {"all-reduce": 16, "all-gather": 11_946_624, "reduce-scatter": 11_871_744},
}


@pytest.mark.parametrize("name", COUNTED)
def test_counted_bytes_of_two_ranks(name: str) -> None:
    told = scaling.asked(zero.read(name), SMALL, size=4)
    counted = sum(scaling.sent(kind, size, 2) for kind, size in COUNTED[name].items())
    assert scaling.volume(told, 2) == pytest.approx(counted, abs=16)
    book = scaling.volume(
        scale_model.textbook(zero.stage_of(zero.read(name)), 2_967_936, size=4), 2
    )
    ratio = {"zero0": 1, "zero1": 1.5, "zero2": 1.5, "zero3": 2 / 3}[name]
    assert counted / book == pytest.approx(ratio, rel=5e-3)


# Time


def test_bandwidth_is_the_narrowest() -> None:
    assert LINKS.bandwidth(4) == 100e9
    assert LINKS.bandwidth(5) == 50e9
    assert Links(40e9, 50e9, 4).bandwidth(8) == 40e9
    assert [LINKS.nodes(n) for n in (1, 4, 5, 1024)] == [1, 1, 2, 256]


def test_latency_by_hand() -> None:
    # 3 hops over NVLink; 7 hops of which one goes through the network.
    assert LINKS.latency("all-gather", 4) == pytest.approx(8.4e-6 + 3 * 3.4e-6)
    assert LINKS.latency("all-gather", 8) == pytest.approx(8.4e-6 + 6 * 3.4e-6 + 9.6e-6)
    assert LINKS.latency("all-reduce", 4) == pytest.approx(8.4e-6 + 6 * 3.4e-6)
    # 1,024 ranks on 256 nodes: a tree of 3 hops in the node and 8 between, up and down.
    assert LINKS.latency("all-reduce", 1024) == pytest.approx(2 * (3 * 28e-6 + 8 * 50e-6))
    assert LINKS.latency("reduce-scatter", 1) == 0


def test_time_of_a_collective() -> None:
    gather = Collective("all-gather", 4e9, 2, "alone")
    # 3 GB at 100 GB/s: 30 ms; two starts.
    assert LINKS.seconds(gather, 4) == pytest.approx(0.030 + 2 * 18.6e-6)
    assert LINKS.seconds(gather, 1) == 0


def test_what_hides_and_what_does_not() -> None:
    free = Links(1e9, 1e9, 2)  # 1 GB/s: latencies are nothing beside seconds
    both = [
        Collective("all-gather", 4e9, 1, "forward"),  # 2 s
        Collective("reduce-scatter", 10e9, 1, "backward"),  # 5 s
        Collective("all-gather", 2e9, 1, "alone"),  # 1 s
    ]
    # Of 3 s of compute 1 is the forward and 2 the backward: 1 + 3 + 1 s are left over.
    found = scaling.step(both, free, 2, 3.0)
    assert (found.compute, found.communication) == (3.0, pytest.approx(8, abs=1e-3))
    assert found.exposed == pytest.approx(5, abs=1e-3)
    assert found.seconds == pytest.approx(8, abs=1e-3)
    assert scaling.step(both, free, 2, 30.0).exposed == pytest.approx(1, abs=1e-3)
    assert scaling.step(both, free, 2, 30.0, overlap=False).exposed == pytest.approx(8, abs=1e-3)
    # ZeRO 1 with 4 micro-batches: 5 of the 20 s of backwards.
    late = scaling.step(both[1:], free, 2, 15.0, backwards=0.25)
    assert late.exposed == pytest.approx(1 + 5 - 2.5, abs=1e-3)
    assert scaling.step(both, free, 1, 3.0) == Step(3.0, 0.0, 0.0)


def test_overlap_is_deepspeeds_setting() -> None:
    said = [scaling.overlaps(zero.read(f"zero{n}")) for n in range(4)]
    assert said == [False, True, True, True]
    assert [scaling.overlaps(content(n)) for n in range(4)] == [False, False, False, True]


def test_share_of_checkpoints() -> None:
    assert scaling.share_of_saving(5.0, 0.1, 150) == 0.25
    assert scaling.share_of_saving(5.0, 0.1, 0) == 0


# The plan


def of(found: Plan, stage: str, devices: int) -> scaling_tables.Row:
    return next(
        row
        for row in scaling_tables.rows(found)
        if (row.job.stage, row.devices) == (stage, devices)
    )


def test_a_step_of_vit_base_by_hand() -> None:
    found = of(made(save_every=0), "distill", 8)
    assert (found.strong, found.micro, found.batch) == (True, 8, 64)
    # 155.3 GFLOP an image (test_flops.py: by the counter), 8 images, 40% of 989.4 TFLOP/s.
    assert found.step.compute == pytest.approx(8 * 155.3e9 / (0.4 * 989.4e12), rel=1e-3)
    # 111,655,680 parameters in fp32, three times, 7/8 of it: by NVLink at 450 GB/s. Latencies: an
    # all-reduce 8.4 + 14 x 3.4 = 56 µs, eight of them; a gather 8.4 + 7 x 3.4 = 32.2 µs, two.
    assert found.sent == pytest.approx(3 * 4 * 111_655_680 * 7 / 8, rel=1e-6)
    moved = found.sent / 450e9
    assert found.step.communication == pytest.approx(moved + 8 * 56e-6 + 2 * 32.2e-6, rel=1e-6)
    # Seven of eight buckets hide. Exposed: the last, and the gathers.
    alone = (2 * 4 * 13_956_960 + 4 * 111_655_680) * 7 / 8 / 450e9 + 56e-6 + 2 * 32.2e-6
    assert found.step.exposed == pytest.approx(alone, rel=1e-4)
    assert found.rate == pytest.approx(64 / (found.step.compute + alone), rel=1e-4)
    assert found.efficiency == pytest.approx(found.step.compute / found.step.seconds)


def test_one_device_is_its_own_measure() -> None:
    found = of(made({"devices": 1}), "distill", 1)
    assert (found.micro, found.sent, found.step.exposed) == (64, 0, 0)
    assert found.efficiency == pytest.approx(1)


def test_a_batch_that_cannot_be_cut_is_weak_scaling() -> None:
    cut, weak = (of(made(), "distill", n) for n in (64, 1024))
    assert (cut.strong, cut.micro, cut.batch) == (True, 1, 64)
    assert (weak.strong, weak.micro, weak.batch) == (False, 8, 8192)
    large = of(made(distill__batch=4096, distill__accumulation=2), "distill", 1024)
    assert (large.strong, large.micro, large.batch) == (True, 2, 4096)


def test_checkpoints() -> None:
    found = of(made({"storage_gbs": 2}, save_every=100, save_async=False), "distill", 8)
    size = 12 * 111_655_680 + 4 * 252_160
    assert found.checkpoint == found.written == pytest.approx(size / 2e9)
    behind = of(made({"storage_gbs": 2}, save_every=100), "distill", 8)
    assert behind.written == found.written
    assert behind.checkpoint == pytest.approx(size / 8 / 12e9)  # each rank copies its own part
    spent = 100 * found.step.seconds + found.checkpoint
    assert found.saving == pytest.approx(found.checkpoint / spent)
    assert found.rate == pytest.approx(6400 / spent)
    assert of(made(save_every=0), "distill", 8).checkpoint == 0


def test_what_must_rise_and_fall() -> None:
    def rate(devices: int = 1024, zero: str = "zero1", **options: float) -> float:
        return of(made(options, zero=zero), "distill", devices).rate

    assert rate(network_gbs=50) < rate(network_gbs=100) < rate()
    assert rate(8, link_gbs=50) < rate(8, link_gbs=450)
    assert rate(8, network_gbs=1) == rate(8)  # one node has no network
    waits = [made({"storage_gbs": n}, save_async=False) for n in (1, 10)]
    assert of(waits[0], "distill", 8).rate < of(waits[1], "distill", 8).rate
    assert rate(8, "zero0") < rate(8, "zero1")  # which communicates more, but hides it
    by_devices = [of(made(), "pretrain", n).step.communication for n in (8, 64, 1024)]
    assert by_devices == sorted(by_devices)
    # The same micro-batch on more devices: more images, less of each device.
    weak = [of(made({"devices": n}), "distill", 1024) for n in (8, 32)]
    assert weak[0].micro > weak[1].micro
    assert weak[0].efficiency > weak[1].efficiency


def test_the_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan.main(
        [
            *("--recipe", "vit_base", "--samples=6000", "--devices", "16", "--precision", "bf16"),
            *("--stage", "distill", "--link_gbs", "300", "--network_gbs", "100"),
        ]
    )
    said = capsys.readouterr().out
    assert "a step at scale, ms: zero1" in said
    lines = [line.split() for line in said.splitlines() if line.split()[:1] == ["distill"]]
    devices = {words[1] for words in lines}
    assert {"8", "16", "64", "1,024"} <= devices
    assert "weak scaling, with the micro-batch that a device has on 16 (distill 4 images)" in said
    assert "all-reduce 4 P + all-gather 4 P" in said
    assert "min(300, 100) GB/s across nodes" in said
    # 3 x 4 P x 1023/1024, of which each of 8 ranks' rings leaves the node once.
    assert ["1,024", "128", "1,338.6", "1,171.2", "167.3", "1,338.6"] in [w[1:] for w in lines]
    assert "the ranks agree every 16 step(s)" in said
    assert "MB/s = images/s x bytes each on the device (no data given)" in said
    assert "checkpoint = (12 B x P + 4 B x F) / devices / 12 GB/s" in said


def test_what_limits_a_step(tmp_path: Path) -> None:
    make_images(tmp_path / "images", size=64)
    pack.pack(str(tmp_path / "images"), str(tmp_path / "shards"), size=64)
    size = (tmp_path / "shards/train").glob("*.tar")
    stored = sum(path.stat().st_size for path in size) / 27

    def limit(**options: float) -> tuple[list[str], list[str]]:
        words = {"data": str(tmp_path / "shards"), "recipe": "vit_small", "zero": "zero1"}
        found = made({"samples": None, "price": 3600.0, **options}, **words, save_every=100)
        sheet = scaling_tables.limits_sheet(found, scaling_tables.rows(found))
        return list(next(row for row in sheet.rows if row[0] == "distill")), sheet.notes

    row, notes = limit(devices=8, mfu=0.001)
    assert row[-1] == "compute"
    batch = load({"recipe": "vit_small"}).distill.batch
    assert float(row[3]) == pytest.approx(1000 * batch * stored / 5e9, abs=0.005)
    assert float(row[4]) == pytest.approx(1000 * batch / 4688 / 112, abs=0.005)  # at 64 pixels
    slow, notes = limit(devices=8, mfu=0.001, read_gbs=0.0001)
    assert slow[-1] == "storage reads"
    assert float(slow[3]) == pytest.approx(1000 * batch * stored / 1e5, rel=1e-4)
    ratio = float(slow[3]) / (float(slow[1]) + float(slow[2]))
    line = next(note for note in notes if note.startswith("distill: storage reads: "))
    assert float(line.split()[3]) == pytest.approx(ratio, rel=1e-3)
    assert limit(devices=8, mfu=0.001, cores=1, read_gbs=5)[0][-1] == "cores decode"
    assert limit(devices=8, mfu=0.001, storage_gbs=1e-5, read_gbs=5)[0][-1] == "storage writes"
    assert limit(devices=8, link_gbs=0.01)[0][-1] == "ranks wait"


def test_the_price_is_that_of_all_that_is_waited_for() -> None:
    found = made({"devices": 8, "price": 3600.0}, stage="distill", save_every=0)
    row = of(found, "distill", 8)
    sheet = scaling_tables.limits_sheet(found, [row])
    spent = row.job.steps * row.step.seconds
    told = next(note for note in sheet.notes if note.startswith("with all that"))
    assert f"= {8 * spent / 3600:,.1f} device hours, {8 * spent:,.2f} at 3600 an hour" in told


@pytest.mark.parametrize("name", ["link_gbs", "network_gbs", "storage_gbs"])
def test_mistakes_are_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        plan.main(["--recipe", "vit_base", "--samples", "9", f"--{name}", "0"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert f"--{name} 0: Input should be greater than 0" in error
    assert error.count("\n") == 1
