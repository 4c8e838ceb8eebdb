"""Bytes within a node and between nodes, by ZeRO setting: `python -m benchmarks.scale.nodes`.

Nodes are network namespaces of this machine, joined by a bridge; it needs root and iproute2. Ranks
are real processes under torchrun, joined by gloo. What ranks of a node say to each other goes
through its loopback, the rest through its only other interface: the system counts both, with the
headers of TCP. Beside that stands what the plan says of a ring.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.scale.ranks import COUNTED, SEEN, Stepper, counting, encoder, parameters
from selfdistill.data import cli
from selfdistill.data.errors import UserError
from selfdistill.engine.runtime import zero
from selfdistill.launcher.plan import scaling

ROOT = Path(__file__).resolve().parents[2]
_RELEASED = {"stage3_max_live_parameters": "auto", "stage3_max_reuse_distance": 0}
#: Case -> setting, changes of its section zero_optimization. hpZ comes last: DeepSpeed keeps its
#: groups for the rest of a process.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zero1": ("zero1", {}),
    "zero2": ("zero2", {}),
    "zero3": ("zero3", {}),
    "zero3, nothing kept": ("zero3", _RELEASED),
    "zero3_hpz": ("zero3_hpz", {}),
}
#: Steps that are counted, and seconds after which ranks are ended.
STEPS, PATIENCE = 5, 900
#: Interface of a node, its network, and the port where ranks meet.
LINK, NETWORK, PORT = "sd0", "10.213.7.", 29_617


def traffic() -> dict[str, int]:
    """Interface -> bytes sent, in this network namespace."""
    lines = Path("/proc/self/net/dev").read_text(encoding="ascii").splitlines()[2:]
    return {name.strip(): int(rest.split()[8]) for name, rest in (x.split(":") for x in lines)}


def work(file: str) -> None:
    """What a rank does: takes steps under each case; the first of a node writes what it counted."""
    import torch
    import torch.distributed as dist

    from selfdistill.engine.runtime.distributed import initialize

    ranks, answer = initialize(), {}
    torch.set_num_threads(1)
    for name, setting in json.loads(Path(file).read_text(encoding="utf-8")).items():
        step = Stepper(setting, 1, COUNTED, ranks)
        for _ in range(SEEN - 1):
            step()
        with counting() as calls:
            step()
        dist.barrier()
        before = traffic()
        for _ in range(STEPS):
            step()
        dist.barrier()
        after = traffic()
        answer[name] = {
            "calls": calls,
            "inside": (after["lo"] - before["lo"]) / STEPS,
            "between": (after[LINK] - before[LINK]) / STEPS,
        }
        step.close()
    if ranks.local_rank == 0:
        node = ranks.rank // int(os.environ["LOCAL_WORLD_SIZE"])
        Path(f"{file}.{node}").write_text(json.dumps(answer), encoding="utf-8")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may outlive the group


@contextmanager
def joined(nodes: int) -> Iterator[list[str]]:
    """Network namespaces on one bridge, which lies in a namespace of its own; gone afterwards."""
    if os.geteuid() or not shutil.which("ip"):
        raise UserError("benchmarks.scale.nodes makes network namespaces: run it as root, with ip")
    base = f"sd{os.getpid()}"
    names = [f"{base}-{number}" for number in range(nodes)]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"ip {' '.join(words)}: {done.stderr.strip()}")

    made: list[str] = []
    try:
        for name in (base, *names):
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("-n", base, "link", "add", "bridge", "type", "bridge")
        ip("-n", base, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            peer = f"p{number}"
            ip(*("-n", base, "link", "add", peer, "type", "veth"), *("peer", LINK, "netns", name))
            ip("-n", base, "link", "set", peer, "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{NETWORK}{number + 1}/24", "dev", LINK)
            ip("-n", name, "link", "set", LINK, "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


def measure(nodes: int, ranks: int) -> list[dict[str, Any]]:
    """Starts ranks on nodes, and returns what each node's first rank counted.

    Raises:
        UserError: a rank failed; with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as folder, joined(nodes) as names:
        file, settings = Path(folder) / "work.json", {}
        for number, (name, (setting, changes)) in enumerate(CASES.items()):
            content = zero.read(setting)
            content["zero_optimization"] |= changes
            place = Path(folder) / f"{number}.json"
            place.write_text(json.dumps(content), encoding="utf-8")
            settings[name] = str(place)
        file.write_text(json.dumps(settings), encoding="utf-8")
        code = f"from benchmarks.scale.nodes import work; work({str(file)!r})"
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env["GLOO_SOCKET_IFNAME"] = LINK
        processes = []
        for number, name in enumerate(names):
            words = [
                *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"),
                *(f"--nnodes={nodes}", f"--nproc_per_node={ranks}", f"--node_rank={number}"),
                *(f"--master_addr={NETWORK}1", f"--master_port={PORT}"),
                *("--no-python", sys.executable, "-c", code),
            ]
            with (Path(folder) / f"said.{number}").open("wb") as said:
                processes.append(
                    subprocess.Popen(
                        words,
                        cwd=ROOT,
                        env=env,
                        stdout=said,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        try:
            for number, process in enumerate(processes):
                if process.wait(PATIENCE):
                    said = (Path(folder) / f"said.{number}").read_text(encoding="utf-8")
                    raise UserError(f"node {number} failed: {' '.join(said[-2000:].split())}")
        except subprocess.TimeoutExpired:
            raise UserError(f"the nodes are not done after {PATIENCE} s") from None
        finally:
            for process in processes:
                with suppress(ProcessLookupError):  # nobody is left
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return [json.loads(Path(f"{file}.{n}").read_text(encoding="utf-8")) for n in range(nodes)]


def compared(name: str, found: list[dict[str, Any]], ranks: int) -> dict[str, Any]:
    """A case: bytes that a node sends in a step, counted, and by the plan's formula of a ring.

    Args:
        name: of the case.
        found: what each node counted.
        ranks: of a node.
    """
    setting, changes = CASES[name]
    content, world = zero.read(setting), ranks * len(found)
    content["zero_optimization"] |= changes
    asked = scaling.asked(content, parameters(), size=4, twice=encoder(), node=ranks)
    done = [
        scaling.Collective(kind, size, 1, "alone", group)
        for kind, size, group in found[0][name]["calls"]
    ]
    row: dict[str, Any] = {"case": name}
    for place in ("inside", "between"):
        row[place] = sum(node[name][place] for node in found) / len(found)
    for who, collectives in (("plan", asked), ("calls", done)):
        # gloo sends as much in a reduce-scatter as in an all-reduce.
        collectives = [
            c._replace(kind="all-reduce") if c.kind == "reduce-scatter" else c for c in collectives
        ]
        between = scaling.between(collectives, world, ranks)
        row[f"{who}_between"] = ranks * between
        row[f"{who}_inside"] = ranks * (scaling.volume(collectives, world) - between)
    return row | {"calls": len(done)}


def main(out: Path | None = None, nodes: int = 2, ranks: int = 2) -> None:
    """Counts the bytes of a distillation step within nodes and between them.

    Args:
        out: folder for nodes.json and nodes.md.
        nodes: their number.
        ranks: of a node.
    """
    for name, value, least in (("nodes", nodes, 2), ("ranks", ranks, 1)):
        if value < least:
            raise UserError(f"--{name} {value}: give {least} or more")
    found = measure(nodes, ranks)
    rows = [compared(name, found, ranks) for name in CASES]
    columns = ("--zero", "between nodes", "by the calls", "by the plan")
    columns += ("in a node", "by the calls", "by the plan", "calls")
    names = ("between", "calls_between", "plan_between", "inside", "calls_inside", "plan_inside")
    told = [
        (row["case"], *(f"{row[name] / 1e6:.2f}" for name in names), f"{row['calls']}")
        for row in rows
    ]
    text = (
        f"MB that a node sends in a step: {nodes} nodes of {ranks} ranks, gloo,"
        f" {parameters().trained:,} trained parameters, fp32. gloo sends in a reduce-scatter what"
        " an all-reduce takes, twice as much as NCCL; so does the plan here.\n\n"
        + record.markdown(columns, told)
    )
    record.write(out, "nodes", {"nodes": nodes, "ranks": ranks, "rows": rows}, text)


if __name__ == "__main__":
    cli.run(main)
