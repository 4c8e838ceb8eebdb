"""Attacks checkpoints of a real engine; run by test_checkpoint.py in a process of its own.

    python tests/engine/checkpoints/attack.py FOLDER

Prints one JSON object with what came out.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[3])

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from selfdistill.data.errors import UserError  # noqa: E402
from selfdistill.engine.checkpoints import training_state  # noqa: E402
from selfdistill.engine.checkpoints.checkpoint import Checkpoints, Reader  # noqa: E402
from selfdistill.engine.checkpoints.state import State  # noqa: E402
from selfdistill.engine.run import _quiet  # noqa: E402
from selfdistill.engine.runtime.distributed import Ranks, initialize  # noqa: E402

CONFIG = {"pretrain.lr": 0.1}


class Toy(nn.Module):
    """Some hundred thousand weights, so that a save takes a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(128, 128) for _ in range(40)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).square().mean()


class Training:
    """An engine without ZeRO, which has no threads that a fork would lose."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        import deepspeed

        torch.manual_seed(0)
        self.folder, self.ranks = folder, ranks
        module = Toy()
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3),
            config={"train_batch_size": 4, "gradient_clipping": 0.0, "steps_per_print": 10**9},
            dist_init_required=False,
        )
        self.state = State(0, 0, CONFIG, "data", 1)
        self.weights: dict[int, dict[str, Tensor]] = {}

    def step(self) -> None:
        self.engine.backward(self.engine(torch.randn(4, 128)))
        self.engine.step()
        self.state.step += 1
        self.state.position += 4
        self.weights[self.state.step] = {
            k: v.clone() for k, v in training_state.collect(self.engine, 0, 1).items()
        }

    def save(self, folder: Path | None = None) -> None:
        Checkpoints(folder or self.folder, self.ranks, keep=2).save(self.engine, self.state)

    def resumed(self, folder: Path) -> int:
        """The step that a launch would go on from; its tensors must be that step's, bit for bit."""
        found = Checkpoints(folder, self.ranks).find(CONFIG, "data")
        if found is None:
            return 0
        where, state = found
        read = Reader(where, state)
        assert state.position == 4 * state.step
        for name, value in self.weights[state.step].items():
            assert torch.equal(read(name), value), f"{name} at step {state.step}"
        return state.step


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def plausible(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 3', '"step": 7', 1))


def attack_files(run: Training, root: Path) -> dict[str, int]:
    """Each file of the newest checkpoint, attacked in each way -> the step resumed from."""
    newest = max(p for p in run.folder.glob("step-*"))
    came: dict[str, int] = {}
    files = [str(p.relative_to(run.folder)) for p in newest.iterdir()]
    for file in [*files, "latest"]:
        for attack in (truncate, zero, flip, empty, Path.unlink):
            copy = root / "copy"
            shutil.copytree(run.folder, copy)
            # Path.unlink has one argument more, so the tuple's common type is no callable to mypy.
            attack(copy / file)  # type: ignore[operator]
            came[f"{attack.__name__} {Path(file).name}"] = run.resumed(copy)
            shutil.rmtree(copy)
    shutil.copytree(run.folder, root / "copy")
    plausible(root / "copy" / newest.name / "state.json")
    came["plausible state.json"] = run.resumed(root / "copy")
    shutil.rmtree(root / "copy")
    shutil.copytree(run.folder, root / "copy")
    (root / "copy" / "latest").write_text("step-99999999")
    came["latest points nowhere"] = run.resumed(root / "copy")
    (root / "copy" / "step-99999999").mkdir()
    came["an empty folder is newer"] = run.resumed(root / "copy")
    (root / "copy" / "step-soon").mkdir()
    came["a folder of another name"] = run.resumed(root / "copy")
    # And training goes on from there: the broken one is replaced, nothing is lost.
    run.save(root / "copy")
    came["saved again"] = run.resumed(root / "copy")
    shutil.rmtree(root / "copy")
    return came


def kill_while_saving(run: Training, times: int) -> list[dict[str, Any]]:
    """Kills a save at random moments -> what a launch would go on from each time."""
    random.seed(1)
    longest = 0.1  # s; follows the machine: longer after a save that was cut off, else shorter
    came = []
    for _ in range(times):
        before = run.resumed(run.folder)
        run.step()
        child = os.fork()
        if child == 0:
            run.save()
            os._exit(0)
        time.sleep(random.uniform(0, longest))
        left = sorted(p.name for p in run.folder.glob(".draft-*"))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        came.append(
            {
                "before": before,
                "saving": run.state.step,
                "after": run.resumed(run.folder),
                "finished": os.WIFEXITED(status),
                "draft": bool(left),
            }
        )
        if came[-1]["after"] == run.state.step:
            longest /= 1.2
        else:
            longest *= 1.1
            run.save()
    return came


def refused_disk(run: Training, root: Path) -> dict[str, Any]:
    """A disk that fills up, and one that can no longer be written, on real file systems."""
    came: dict[str, Any] = {}
    for name, command in (
        ("full", "dd if=/dev/zero of={}/fill bs=64k status=none"),
        ("read-only", "mount -o remount,ro {}"),
    ):
        disk = root / name
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], check=True)
        run.step()
        run.save(disk / "checkpoints")
        old = run.state.step
        subprocess.run(command.format(disk), shell=True, check=False, stderr=subprocess.DEVNULL)
        run.step()
        try:
            run.save(disk / "checkpoints")
            message = "saved"
        except UserError as error:
            message = str(error)
        left = [p.name for p in (disk / "checkpoints").glob(".draft-*")]
        came[name] = [message, run.resumed(disk / "checkpoints") == old, left]
        subprocess.run(["umount", str(disk)], check=True)
    return came


def main() -> None:
    root = Path(sys.argv[1])
    _quiet()
    torch.set_num_threads(1)
    run = Training(root / "checkpoints", initialize())
    for _ in range(3):
        run.step()
        run.save()
    kept = Checkpoints(run.folder, run.ranks).names()
    result = {"kept": kept, "files": attack_files(run, root)}
    result["disk"] = refused_disk(run, root)
    result["kills"] = kill_while_saving(run, int(sys.argv[2]))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
