"""Baselines of fine-tuning by name: RecAdam, MARS and R3F; SupCon is one of stage 1."""

from selfdistill.engine.regularizers.base import Regularizer
from selfdistill.engine.regularizers.mars import Mars
from selfdistill.engine.regularizers.r3f import R3F
from selfdistill.engine.regularizers.recadam import Pull

#: `--finetune.regularizer` -> what it does.
REGULARIZERS: dict[str, type[Regularizer]] = {
    "none": Regularizer,
    "recadam": Pull,
    "mars": Mars,
    "r3f": R3F,
}
