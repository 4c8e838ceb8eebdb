"""The cluster itself: two side by side, power and cables, and nothing left behind."""

import os
from pathlib import Path

import pytest

from tests.cluster.kit.lab import LOGIN, Cluster

pytestmark = pytest.mark.cluster


def left(word: str) -> list[str]:
    """Command lines of processes of this machine that name `word`, but this one's."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            told = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:  # it has just ended
            continue
        if word.encode() in told and folder.name != str(os.getpid()):
            found.append((folder / "cmdline").read_text())
    return found


def test_two_clusters_side_by_side_and_nothing_left(tmp_path: Path) -> None:
    with Cluster(nodes=2) as one, Cluster(nodes=1) as other:
        jobs = [
            (c, c.sbatch("--wrap=srun -l hostname; sleep 2", f"-N{len(c.nodes)}", cwd=tmp_path))
            for c in (one, other)
        ]
        # Both number their jobs from 1, and have the same addresses.
        assert [job for _, job in jobs] == ["1", "1"]
        folders = [str(c.folder) for c in (one, other)]
        assert all(left(folder) for folder in folders)
        for cluster, job in jobs:
            assert cluster.wait(job, 30) == "COMPLETED"
    assert [left(folder) for folder in folders] == [[], []]
    assert not any(Path(folder).exists() for folder in folders)


def test_power_and_cables(tmp_path: Path) -> None:
    with Cluster(nodes=2) as cluster:
        job = cluster.sbatch("--wrap=sleep 60", "-N2", "--requeue", cwd=tmp_path)
        cluster.until(lambda: cluster.state(job) == "RUNNING", 20)
        reach = ("timeout", "2", "bash", "-c", "</dev/tcp/node2/6818")  # slurmd's port
        cluster.run(LOGIN, *reach)
        cluster.power_off("node2")
        assert cluster.run(LOGIN, *reach, check=False).returncode != 0
        cluster.link("node1", up=False)
        cluster.until(lambda: set(cluster.node_states().values()) <= {"down", "down*"}, 90, "down")
        assert cluster.jobs(job)[0]["Restarts"] == "1"
        cluster.run(LOGIN, "scancel", job)
        cluster.power_on("node2")
        cluster.link("node1", up=True)
        cluster.until(lambda: set(cluster.node_states().values()) == {"idle"}, 60, "idle")
        job = cluster.sbatch("--wrap=srun hostname", "-N2", cwd=tmp_path)
        assert cluster.wait(job, 60) == "COMPLETED"
        assert sorted(cluster.log(job).split()) == cluster.nodes


def test_nothing_leads_out() -> None:
    with Cluster(nodes=1) as cluster:
        assert cluster.run("node1", "ip", "route").stdout.split() == [
            *("10.77.0.0/24", "dev", "eth0", "proto", "kernel", "scope", "link"),
            *("src", "10.77.0.11"),
        ]
