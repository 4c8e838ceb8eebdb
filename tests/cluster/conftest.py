"""The cluster of a test module, and a loud word where none can be made."""

from collections.abc import Iterator

import pytest

from tests.cluster.kit.lab import Cluster, obstacle

_NOT_RUN = pytest.StashKey[str]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.get_closest_marker("cluster")]
    expression = config.option.markexpr
    # Nothing to say where they are deselected anyway.
    if not mine or "not cluster" in expression:
        return
    if reason := obstacle():
        config.stash[_NOT_RUN] = f"{len(mine)} cluster tests NOT RUN: {reason}"
        # Without root there is no cluster to test on: the closing lines say so, in red.
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if line := config.stash.get(_NOT_RUN, ""):
        terminalreporter.section("no SLURM cluster here", red=True, bold=True)
        terminalreporter.write_line(line, red=True, bold=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two hosts of a cluster of this module's own."""
    with Cluster(nodes=2) as started:
        yield started
