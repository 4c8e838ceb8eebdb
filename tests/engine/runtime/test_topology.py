"""Hierarchical partitioning and what ZeRO's files leave open: two "nodes" of two real ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from selfdistill.data.errors import UserError
from selfdistill.engine.runtime import zero
from tests.kit.launches import make_world, metrics, run_cases


def written(path: Path, name: str, **changes: object) -> str:
    """A file of one's own like one of ds_configs/, but for some values."""
    content = zero.read(name)
    content["zero_optimization"] |= changes
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def fitted(name: str, **changes: Any) -> dict[str, Any]:
    content = zero.read(name)
    content["zero_optimization"] |= changes
    found = zero.fitted(content, trained=80_000, every=100_000, largest=20_000, node=8)
    section: dict[str, Any] = found["zero_optimization"]
    return section


def test_what_a_file_leaves_open_follows_from_the_model() -> None:
    third = fitted("zero3")
    assert third["reduce_bucket_size"] == 20_000  # an eighth, and the largest parameter at least
    assert third["stage3_prefetch_bucket_size"] == 20_000
    assert third["stage3_param_persistence_threshold"] == 0
    assert "zero_hpz_partition_size" not in third
    nodes = fitted("zero3_hpz")
    assert (nodes["zero_hpz_partition_size"], nodes["stage3_max_live_parameters"]) == (8, 40_000)
    assert fitted("zero1")["reduce_bucket_size"] == 20_000
    assert "reduce_bucket_size" not in fitted("zero0")
    given = {"reduce_bucket_size": 7, "prefetch_bucket_size": 8}  # DeepSpeed knows both names
    assert fitted("zero3", stage3_prefetch_bucket_size="auto", **given).items() >= given.items()
    large = zero.fitted(zero.read("zero3"), trained=10**9, every=10**9, largest=1, node=1)
    assert large["zero_optimization"]["reduce_bucket_size"] == zero.BUCKET
    lora = zero.fitted(zero.read("zero3"), trained=10, every=10**6, largest=10**5, node=1)
    assert lora["zero_optimization"]["reduce_bucket_size"] == 10


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("zero3", {"mics_shard_size": 8}, "no MiCS any more; --zero zero3_hpz"),
        ("zero3", {"zero_hpz_partition_size": 0}, "is 0: give the ranks of a node"),
        ("zero2", {"zero_hpz_partition_size": 2}, "needs stage 3, not 2"),
        ("zero1", {"zero_quantized_weights": True}, "needs stage 3, not 1"),
    ],
)
def test_refusals(name: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        zero.read(written(tmp_path / "own.json", name, **changes))


def test_what_does_not_fit_the_launch() -> None:
    with pytest.raises(UserError, match="12 ranks cannot be cut into nodes of 8"):
        zero.check_topology({"zero_optimization": fitted("zero3_hpz")}, "zero3_hpz", 12, "cpu")
    zero.check_topology({"zero_optimization": fitted("zero3_hpz")}, "zero3_hpz", 16, "cpu")
    weights = {"zero_optimization": fitted("zero3", zero_quantized_weights=True)}
    zero.check_topology(weights, "own.json", 2, "cuda")
    with pytest.raises(UserError, match="which a cpu device has not"):
        zero.check_topology(weights, "own.json", 2, "cpu")


@pytest.mark.multi
def test_two_nodes_of_two_ranks(tmp_path: Path) -> None:
    """Equal to ZeRO-3 bit for bit, over a checkpoint and an evaluation of the weights' average."""
    root = make_world(tmp_path)
    nodes = written(root / "nodes.json", "zero3_hpz", zero_hpz_partition_size=2)

    def case(name: str, setting: str, **more: object) -> dict[str, object]:
        shared = {"data": str(root / "shards"), "model": str(root / "base"), "zero": setting}
        shared |= {"output": str(root / "runs" / name), "stage": "finetune"}
        shared |= {"finetune.start": "model", "finetune.accumulation": 2, "finetune.lr": "1e-3"}
        shared |= {"finetune.ema": "0.5", "finetune.eval_every": "2", "save_every": "2"}
        return shared | more

    quantised = written(root / "quantised.json", "zero3", zero_quantized_gradients=True)
    cases = [
        case("quantised", quantised, expect_error="zero_quantized_gradients: DeepSpeed quantises"),
        case("plain", "zero3"),
        case("nodes", nodes, leave_at="step 4"),
        case("nodes", nodes),
    ]
    run_cases(root, cases, ranks=4)
    plain, hierarchical = (root / "runs" / name / "finetune-model" for name in ("plain", "nodes"))
    weights, oracle = (load_file(f / "export" / "model.safetensors") for f in (hierarchical, plain))
    assert weights.keys() == oracle.keys()
    assert all(bool((weights[name] == oracle[name]).all()) for name in oracle)
    told = [
        [{k: v for k, v in line.items() if "loss" in k or "val" in k} for line in metrics(folder)]
        for folder in (hierarchical, plain)
    ]
    assert told[0] == told[1]
    assert any("val" in key for line in told[0] for key in line)
