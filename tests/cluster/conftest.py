"""The cluster of a test module, and a loud word where none can be made."""

from collections.abc import Iterator

import pytest

from tests.cluster.kit.lab import Cluster, obstacle

#: Before the reason of those that are skipped.
_NOT_RUN = "no cluster: "


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mine = [item for item in items if item.get_closest_marker("cluster")]
    expression = config.option.markexpr
    # Nothing to say where they are deselected anyway.
    if not mine or "not cluster" in expression:
        return
    if reason := obstacle():
        # Without root there is no cluster to test on: the closing lines say so, in red.
        for item in mine:
            item.add_marker(pytest.mark.skip(reason=f"{_NOT_RUN}{reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # From the reports: under xdist this process has collected nothing.
    told = [str(one.longrepr[2]) for one in terminalreporter.stats.get("skipped", ())]
    reasons = [one.partition(_NOT_RUN)[2] for one in told if _NOT_RUN in one]
    if reasons:
        terminalreporter.section("no SLURM cluster here", red=True, bold=True)
        line = f"{len(reasons)} cluster tests NOT RUN: {reasons[0]}"
        terminalreporter.write_line(line, red=True, bold=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two hosts of a cluster of this module's own."""
    with Cluster(nodes=2) as started:
        yield started
