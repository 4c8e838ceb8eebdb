"""`python -m benchmarks.scale`: what is counted, on one rank and on two, and what is printed."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.scale import __main__ as scale
from benchmarks.scale import model as scale_model
from benchmarks.scale import ranks as scale_ranks
from benchmarks.scale import rehearsal
from benchmarks.scale import tables as scale_tables
from selfdistill.data.errors import UserError

FLOAT = 4
PARAMETERS = scale.parameters()

#: Case -> tensors of all parameters that are moved, an all-reduce twice.
EXPECTED = {
    "0": 2,
    "1": 3,
    "2, A = 2": 5,
    "2, use_multi_rank_bucket_allreduce off": 2,
    "3": 2,
}


@pytest.fixture
def alone() -> Any:
    """A process group of one rank: that of the fixture `ranks`, if a test before left one."""
    made = not dist.is_initialized()
    if made:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    if made:
        dist.destroy_process_group()


def test_whole_tensors_are_counted(alone: Any) -> None:
    part, whole = torch.zeros(10), torch.zeros(10)
    with scale_ranks.counting() as found:
        dist.all_reduce(part)
        dist.all_gather([whole], part)
        dist.all_gather_into_tensor(whole, part)
        dist.reduce_scatter_tensor(part, whole)
        dist.broadcast(part.double(), 0)
        dist.reduce(part, 0)
        dist.barrier()
    assert found == [
        ("all-reduce", 10 * FLOAT, 1),
        ("all-gather", 10 * FLOAT, 1),
        ("all-gather", 10 * FLOAT, 1),
        ("reduce-scatter", 10 * FLOAT, 1),
        ("broadcast", 80, 1),
        ("reduce", 10 * FLOAT, 1),
    ]
    dist.all_reduce(part)  # the methods are back, and nobody counts
    assert len(found) == 6


def test_what_has_no_formula_is_an_error(alone: Any) -> None:
    with scale_ranks.counting(), pytest.raises(LookupError, match="scatter"):
        dist.scatter(torch.zeros(2), [torch.zeros(2)], src=0)


def test_every_moving_method_of_torch_is_known() -> None:
    """A torch that names its collectives otherwise must be noticed."""
    words = ("reduce", "gather", "scatter", "broadcast", "alltoall", "all_to_all", "send", "recv")
    found = {n for n in vars(dist.ProcessGroup) if any(word in n for word in words)}
    assert found <= {*scale_ranks.METHODS, *scale_ranks.UNKNOWN}


def test_numbers_of_ranks() -> None:
    assert scale.numbers("4,1, 2,2") == [1, 2, 4]
    for wrong in ("", "2,", "0", "two", "-1", "1.5"):
        with pytest.raises(UserError, match="such as 1,2,4"):
            scale.numbers(wrong)


def test_comparison_by_hand() -> None:
    trained = scale.parameters().trained
    whole = FLOAT * trained
    counts = {"all-reduce": [3, whole + 8], "all-gather": [2, whole]}
    found = scale.compared(scale.CASES[1], counts, 4)
    assert found["textbook"] == 2 * whole * 3 / 4
    assert found["measured"] == 3 * whole * 3 / 4 + 12
    assert found["plan"] == pytest.approx(found["measured"], abs=16)
    assert found["calls"] == {"all-reduce": 3, "all-gather": 2}


def test_text() -> None:
    volume = {"setting": "1", "ranks": 2, "textbook": 2e6, "plan": 3e6, "measured": 3e6}
    volume |= {"calls": {"all-reduce": 3, "all-gather": 2}}
    rates = [
        {"ranks": n, "cores": 2, "median": m, "min": m - 1, "max": m + 1, "n": 5}
        | {"efficiency": {"median": e, "min": e, "max": 1.0, "n": 3}}
        for n, m, e in ((1, 10.0, 1.0), (4, 15.0, 0.75))
    ]
    said = scale_tables.text([volume], rates, [], 1000)
    assert "| 1 | 2 | 2.000 | 3.000 | 3.000 | 1.500 | 3 all-reduce, 2 all-gather |" in said
    assert "| 4 | 2 | 15.0 | 14.0 to 16.0 | 5 | 75% (75% to 100%) |" in said
    assert "machine has 2 cores: more ranks than that share them" in said
    assert "Textbook" not in scale_tables.text([], rates, [], 1000)


def test_the_plan_is_held_against_the_ranks() -> None:
    """By hand: 3.2 s of compute a step, 16 images a rank, one byte sent a nanosecond."""
    sent = FLOAT * scale.parameters().trained / 2 * 1e-9
    quick = {kind: [0.01, 1e9] for kind in ("all-reduce", "all-gather", "reduce-scatter")}
    settings = scale_ranks.SETTINGS
    one: dict[int, Any] = {
        ranks: {"rates": {name: [rate, rate] for name in settings}, "collectives": quick}
        for ranks, rate in ((1, 5.0), (2, 8.0), (4, 4.0))
    }
    efficiency = [row["efficiency"]["median"] for row in scale_model.weak([one, one], 2)]
    assert efficiency == pytest.approx([1.0, 0.8, 0.4])
    rows = {(row["setting"], row["ranks"]): row for row in scale_model.held([one], 2, PARAMETERS)}
    assert rows["zero0", 2]["plan"]["median"] == pytest.approx(3.2 + 0.01 + 2 * sent)
    assert rows["zero1", 2]["plan"]["median"] == pytest.approx(3.2 + 0.1 + 3 * sent, rel=1e-6)
    assert rows["zero1", 2]["measured"]["median"] == 4.0
    assert rows["zero0", 4]["plan"]["median"] == pytest.approx(6.4 + 0.01 + 3 * sent)
    assert rows["zero0", 4]["ratio"]["median"] == pytest.approx((6.41 + 3 * sent) / 16)
    said = scale_tables.text([], scale_model.weak([one], 2), list(rows.values()), 1000)
    assert "| 1 | 2 | 3318 | 4% | 4000 | 0.83 (0.83 to 0.83) |" in said


def test_ranks_that_are_not_done_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "PATIENCE", 1)
    monkeypatch.setattr(scale, "EACH", 0)
    with pytest.raises(UserError, match=r"2 ranks failed .* not done after 1 s"):
        scale.measure(2, (), steps=1)


@pytest.mark.multi
def test_two_real_ranks_send_what_the_plan_says() -> None:
    """The formula of launcher/plan/scaling.py, which the plan uses, against DeepSpeed on gloo."""
    cases = [case for case in scale.CASES if case.name in EXPECTED]
    found = scale.measure(2, cases, steps=2)
    assert len(found["rates"]["zero1"]) == 2
    assert min(found["rates"]["zero1"]) > 0
    assert all(latency > 0 and rate > 0 for latency, rate in found["collectives"].values())
    whole = FLOAT * scale.parameters().trained
    for case in cases:
        row = scale.compared(case, found["bytes"][case.name], 2)
        # Two ranks: half of each tensor, twice that in an all-reduce. Padding, two scalars.
        assert row["measured"] == pytest.approx(EXPECTED[case.name] * whole / 2, rel=0.007), case
        assert row["measured"] == pytest.approx(row["plan"], rel=1e-3), case


@pytest.mark.multi
def test_one_rank_of_many_keeps_and_sends_what_the_plan_says() -> None:
    """Under torch's fake process group: see docs/scale.md."""
    found, model = rehearsal.rehearse(37, 64)
    assert found.keys() == set(rehearsal.SETTINGS)
    for setting, row in found.items():
        told = rehearsal.compared(setting, row, 64, model)
        assert told["kept"] == pytest.approx(told["planned_kept"], rel=0.1), setting
        assert told["sent"] == pytest.approx(told["planned_sent"], rel=0.05), setting
