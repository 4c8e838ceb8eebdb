"""What a benchmark leaves: a JSON record of machine and figures, and tables in Markdown."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "deepspeed", "transformers", "timm", "webdataset", "accelerate", "torchvision")


def machine() -> dict[str, Any]:
    """Date, command, processor, device and versions."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # accelerate, without the peer that needs it
        return None


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name.removesuffix(".__main__") if spec else Path(sys.argv[0]).name


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def instructions() -> list[str]:
    """The processor's instruction sets that decide how fast matrix products are."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, greatest and number of some figures."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    rule = ["---", *["---:" for _ in columns[1:]]]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, rule, *rows))


def write(out: Path | None, name: str, figures: Mapping[str, Any], text: str) -> None:
    """Prints the tables, and leaves NAME.json and NAME.md in a folder if there is one."""
    print("\n" + text, flush=True)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), **figures}
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text.rstrip() + "\n", encoding="utf-8")
