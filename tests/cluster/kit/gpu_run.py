"""engine/run.py on pretend GPUs: torch.cuda shows what CUDA_VISIBLE_DEVICES names (fakes).

While a rank takes its device they are there; it is told what the rank took, and the rank then
computes on the CPU. REAL is the clone.
"""

import json
import os
import runpy
import socket
import sys
from unittest import mock

import torch

REAL = os.environ["REAL"]
sys.path.insert(0, REAL)

from selfdistill.engine.runtime import devices  # noqa: E402

visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
really_take = devices.take


def take(env: "os._Environ[str]") -> torch.device:
    with mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        device_count=lambda: len(visible),
        set_device=lambda _: None,
    ):
        found = really_take(env)
    name = f"GPU-{visible[found.index or 0]}"
    devices.uuid = lambda _: name
    told = {k: env[k] for k in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_LOCALID")}
    line = "TOOK " + json.dumps(told | {"gpu": name, "host": socket.gethostname()})
    print(line, file=sys.__stdout__, flush=True)  # what libraries print goes to log.txt
    return torch.device("cpu")


devices.take = take
sys.argv[0] = f"{REAL}/engine/run.py"
runpy.run_path(sys.argv[0], run_name="__main__")
