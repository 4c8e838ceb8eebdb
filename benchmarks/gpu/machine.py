"""What the machine is, and what it can do at most."""

import json
import os
import platform
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.say import say
from benchmarks.record import machine
from selfdistill.data import cli


def timed(action: Callable[[], object], device: torch.device, rounds: int) -> list[float]:
    """Seconds of an action, each round awaited."""
    found = []
    for number in range(rounds + 2):
        _wait(device)
        began = time.perf_counter()
        action()
        _wait(device)
        if number > 1:
            found.append(time.perf_counter() - began)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(tiny: bool = False) -> None:
    """Versions, the bandwidth of a copy, the rate of a bf16 and of an fp32 product.

    Args:
        tiny: small ones.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(machine(), indent=1))
    say("cores", "", len(os.sched_getaffinity(0)), python=platform.python_version(), **_versions())
    size = 2**20 if tiny else 2**32
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, 5)
    say("copy on the device, read and written", "GB/s", [2e-9 * size / s for s in seconds])

    side = 256 if tiny else 8192
    for name, dtype, setting in (
        ("bf16", torch.bfloat16, "highest"),
        ("TF32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        torch.set_float32_matmul_precision(setting)
        a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
        # mypy does not infer the type of a lambda with defaults.
        seconds = timed(lambda a=a, b=b: a @ b, device, 5)  # type: ignore[misc]
        say(f"{side}³ product, {name}", "TFLOP/s", [2e-12 * side**3 / s for s in seconds])


def _versions() -> dict[str, str]:
    told = machine()
    return {"device": told["device"], "date": told["date"]} | {
        k: v for k, v in told["versions"].items() if v
    }


if __name__ == "__main__":
    cli.run(main)
