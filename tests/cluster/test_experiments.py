"""A sweep as SLURM arrays, on a real cluster, with a cell that fails."""

import re
import sys
from pathlib import Path

import pytest

from selfdistill.experiments import results
from selfdistill.experiments.state import Sweep
from tests.cluster.kit.lab import LOGIN, Cluster
from tests.kit.experiments import command, make_specs, make_table
from tests.kit.launches import ROOT, environment

pytestmark = pytest.mark.cluster


def test_a_sweep_as_arrays(cluster: Cluster, tmp_path: Path) -> None:
    my = make_specs(tmp_path)
    (my / "methods" / "broken.toml").write_text(
        'title = "broken"\nstart = "pretrain"\ntuned_as = "fine_tuning"\n'
        '[options]\n"pretrain.warmup" = 99\n'
    )
    make_table(my, "core", ["fine_tuning", "broken", "self_distillation"], ["colours"])
    words = command(tmp_path, "core", "--slurm", python=sys.executable)
    env = environment()
    done = cluster.run(LOGIN, *words, cwd=ROOT, env=env)
    ids = re.findall(r"^(\d+)  level", done.stdout, re.M)
    assert len(ids) == 3, done.stdout
    for job in ids:
        cluster.wait(job, 300)
    sweep = tmp_path / "sweep"
    logs = "\n".join(path.read_text() for path in sorted((sweep / "logs").glob("*.log")))
    outcomes = {c.method.name: results.outcome(sweep, c) for c in Sweep.open(sweep).plan().cells}
    for name in ("fine_tuning", "self_distillation"):
        assert outcomes[name].status == "done", logs
        assert sorted(outcomes[name].results) == [0, 1]
    assert outcomes["broken"].status == "blocked"
    assert "--pretrain.warmup 99" in outcomes["broken"].message
    again = cluster.run(LOGIN, *words, "--only", "fine_tuning", cwd=ROOT, env=env)
    assert "everything is complete" in again.stdout
