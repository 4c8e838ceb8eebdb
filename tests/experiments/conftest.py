"""A packed set and a base, for sweeps; an example sweep and its report."""

from pathlib import Path

import pytest

from selfdistill.experiments.report import __main__ as report
from selfdistill.experiments.report import sweep as report_sweep
from selfdistill.experiments.report.blocks import Report
from selfdistill.experiments.report.sweep import Contents
from selfdistill.experiments.state import Sweep
from tests.kit.experiments import make_specs
from tests.kit.report import example


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiments")
    make_specs(root, ("colours", "again"))
    return root


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return example(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def contents(sweep: Sweep) -> Contents:
    return report_sweep.read(sweep.root)


@pytest.fixture(scope="module")
def built(contents: Contents) -> Report:
    return report.build(contents)
