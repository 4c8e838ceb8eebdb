"""A packed set and a base, for sweeps."""

from pathlib import Path

import pytest

from tests.kit.experiments import make_specs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("experiments")
    make_specs(root, ("colours", "again"))
    return root
