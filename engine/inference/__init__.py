"""Trained models at work: one loaded from a run or an export, and what it says of inputs.

What its options may be is here: a command says it (--help) before torch is there.
"""

from typing import Literal

#: `own`: what the model's head reads, or of an encoder what its makers pool.
Asked = Literal["own", "cls", "mean", "tokens"]
#: `auto`: as it was scored when it was trained, where this device has units for that.
Precision = Literal["auto", "fp32", "bf16"]
