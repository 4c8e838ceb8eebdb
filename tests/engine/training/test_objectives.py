"""The distilled feature and its distance, against closed forms."""

from pathlib import Path

import pytest
import torch

from selfdistill.data.errors import UserError
from selfdistill.engine.config.schema import Config
from selfdistill.engine.training.objectives import distance, pick
from selfdistill.engine.training.teacher import choose

TOKENS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
COUNTS = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])


def test_features_leave_padding_out() -> None:
    assert torch.equal(pick(TOKENS, "cls", COUNTS), TOKENS[:, 0])
    assert torch.equal(pick(TOKENS, "tokens", COUNTS), TOKENS)
    mean = pick(TOKENS, "mean", COUNTS)
    assert torch.allclose(mean[0], TOKENS[0].mean(0))
    assert torch.allclose(mean[1], TOKENS[1, :3].mean(0))
    assert torch.equal(mean[2], TOKENS[2, 0])  # a text of one token
    assert torch.allclose(pick(TOKENS, "mean"), TOKENS[:, 1:].mean(1))


def test_distance_sums_over_dimensions_and_averages_over_samples() -> None:
    other = TOKENS + 2
    assert distance(TOKENS[:, 0], other[:, 0]) == pytest.approx(16.0)  # 4 dimensions of 2 squared
    # Whatever stands at padding does not count, and each sample weighs the same.
    noisy = torch.where(COUNTS[..., None] == 1, other, 1e3)
    assert distance(TOKENS, noisy, COUNTS) == pytest.approx(16.0)
    twice = TOKENS + torch.tensor([2.0, 0.0, 4.0]).view(3, 1, 1)
    assert distance(TOKENS, twice, COUNTS) == pytest.approx((16 + 0 + 64) / 3)


def test_features_of_all_lengths_make_no_table(tmp_path: Path) -> None:
    assert choose("auto", None, Config(), tmp_path) == "replicated"
    assert choose("sharded", None, Config(), tmp_path) == "sharded"
    with pytest.raises(UserError, match=r"--teacher\.mode replicated"):
        choose("cached", None, Config(), tmp_path)
