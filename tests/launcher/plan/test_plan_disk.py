"""What a plan says of the disk."""

from typing import Any

import pytest

from selfdistill.launcher.plan.tables import disk_sheet
from tests.launcher.plan.test_plan import made


def test_checkpoints_of_stages_that_come_one_after_another() -> None:
    words = {"compare": True, "finetune__seeds": 5}

    def rows(**more: Any) -> dict[str, float]:
        sheet = disk_sheet(made({"devices": 8}, recipe="vit_base", **words, **more))
        return {row[0]: float(row[-1]) for row in sheet.rows if row and "checkpoint" in row[0]}

    kept, gone = rows(), rows(keep_finished=False)
    one = kept["the largest checkpoint, being written"]
    # Of 3 starts with 5 seeds each two are kept, whose networks have no decoder.
    assert kept["finetune: checkpoints"] == pytest.approx(30 * 12 * 85_800_194 / 2**30, rel=0.01)
    assert kept["pretrain: checkpoints"] == pytest.approx(2 * one, abs=0.02)
    assert gone == {"checkpoints of the stage that runs": pytest.approx(3 * one, abs=0.02)}
