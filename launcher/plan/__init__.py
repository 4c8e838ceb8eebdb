"""What a run takes: memory, time, ranks. Its options are here, for a --help without torch."""

from __future__ import annotations

import pydantic

from selfdistill.launcher.doctor.devices import DEVICES


class Options(pydantic.BaseModel):
    """Options of plan beside those of engine/run.py."""

    model_config = pydantic.ConfigDict(extra="forbid")

    devices: int = pydantic.Field(1, ge=1, description="ranks, one a GPU")
    per_node: int = pydantic.Field(8, ge=1, description="GPUs of a node")
    device: str = pydantic.Field("h100", description=f"one of {', '.join(DEVICES)}")
    memory_gb: float | None = pydantic.Field(None, gt=0, description="memory of another device")
    tflops: float | None = pydantic.Field(None, gt=0, description="dense peak of another device")
    mfu: float = pydantic.Field(0.4, gt=0, le=1, description="share of the peak that is reached")
    price: float | None = pydantic.Field(None, gt=0, description="of a device for an hour")
    samples: int | None = pydantic.Field(None, ge=1, description="training samples, without --data")
    tokens: float | None = pydantic.Field(None, ge=3, description="mean tokens of a text")
    classes: int | None = pydantic.Field(None, ge=1, description="classes, without --data [10]")
    link_gbs: float = pydantic.Field(
        450, gt=0, description="GB/s that a GPU sends in its node: an H100's NVLink, one direction"
    )
    network_gbs: float = pydantic.Field(
        400, gt=0, description="GB/s that a node sends to others: 8 cards of 400 Gb/s"
    )
    storage_gbs: float = pydantic.Field(
        5, gt=0, description="GB/s that the shared storage writes, for all nodes together"
    )
    read_gbs: float | None = pydantic.Field(
        None, gt=0, description="GB/s that it reads, for all nodes together [as it writes]"
    )
    cores: int = pydantic.Field(112, ge=1, description="processor cores of a node: a DGX H100's")
