"""Time of a distillation step against a plain loop: `python -m benchmarks.step`.

The peer is transformers' ViTMAE: two backward calls a step, the teacher run online, one process.
Ours is the objective that the stages use, with the teacher's features from a table. Both take the
same batch, fp32, and torch's AdamW; rounds alternate between them.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from data import cli
from engine.models.image import ImageAutoencoder, Normalize
from engine.models.vit_mae import ViTMAE
from engine.models.weights import load_pretrained
from engine.objectives import DistillObjective

#: Whose shape both take: the base of the embedded default.
BASE = Path(__file__).resolve().parent.parent / "recipes" / "vit_small"


def peer(batch: int, device: str) -> Callable[[], None]:
    """One step of the plain loop."""
    config = ViTMAEConfig.from_pretrained(BASE)
    model = ViTMAEForPreTraining(config).to(device)
    teacher = ViTMAEForPreTraining(config).to(device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(batch, 3, 64, 64, device=device)
    everything = torch.arange(64, device=device).float().expand(batch, -1)

    def full(network: ViTMAEForPreTraining) -> torch.Tensor:
        network.config.mask_ratio = 0.0
        feature: torch.Tensor = network.vit(images, noise=everything).last_hidden_state[:, 0]
        network.config.mask_ratio = 0.75
        return feature

    def step() -> None:
        model(images).loss.backward()
        with torch.no_grad():
            target = full(teacher)
        (full(model) - target).pow(2).sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(batch: int, device: str) -> Callable[[], None]:
    """One step of the project's objective."""
    shape = load_pretrained(str(BASE)).shape
    model = ImageAutoencoder(ViTMAE(shape), Normalize((0.5,) * 3, (0.5,) * 3))
    objective = DistillObjective(model).to(device)
    optimizer = torch.optim.AdamW(
        [p for p in objective.parameters() if p.requires_grad], lr=1e-4, fused=True
    )
    images = torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8, device=device)
    target = torch.randn(batch, 192, device=device)

    def step() -> None:
        noise = torch.rand(batch, 64, device=device)
        objective(target, images=images, noise=noise)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def name_of(device: str) -> str:
    """What the device is, for people."""
    return torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} cores"


def wait(device: str) -> None:
    """Returns once the device has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def main(batch: int = 64, rounds: int = 5, steps: int = 3) -> None:
    """Times both and prints medians, spread and the ratio.

    Args:
        batch: images a step.
        rounds: alternating rounds.
        steps: steps of each in a round.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    methods = {
        "plain loop (transformers, teacher online)": peer(batch, device),
        "ours (cached)": ours(batch, device),
    }
    rates: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds + 1):
        for name, step in methods.items():
            began = time.perf_counter()
            for _ in range(steps):
                step()
            wait(device)
            if number:  # the first round warms up
                rates[name].append(batch * steps / (time.perf_counter() - began))
    where = f"fp32, one process, {name_of(device)}"
    table = Table(title=f"distillation step, small base, 64x64, batch {batch}, {where}")
    for column in ("", "images/s, median", "min to max", "n", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    base = statistics.median(rates[next(iter(rates))])
    for name, values in rates.items():
        middle = statistics.median(values)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        table.add_row(name, f"{middle:.1f}", spread, str(len(values)), f"{middle / base:.2f}")
    Console().print(table)


if __name__ == "__main__":
    cli.run(main)
