"""What every test shares: the order of files, and gpu tests left out where there is no device."""

import gc
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

# Tiny models: threads would only wait for each other. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The files that start ranks first: the longest of them, begun last, would run on alone.
    slow = {item.path for item in items if item.get_closest_marker("multi")}
    items.sort(key=lambda item: item.path not in slow)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch  # seconds to import: only where a gpu test was asked for

    if torch.cuda.is_available():
        return
    config.hook.pytest_deselected(items=gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]
    config.stash[_LEFT_OUT] = len(gpu)


def pytest_collection_finish() -> None:
    # What is there stays: each end of a stage, which collects, would look through all of it.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries complain of what is left at the end of a process


def pytest_sessionfinish(session: pytest.Session) -> None:
    # Under xdist it is the workers that collect, and the main process that has the last word.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(_LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    # Each worker collects all. One that was lost says nothing.
    count = getattr(node, "workeroutput", {}).get("left_out", 0)
    node.config.stash[_LEFT_OUT] = max(count, node.config.stash.get(_LEFT_OUT, 0))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if count := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"gpu tests not run, no CUDA device here: {count}")
    seconds: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    if len(seconds) > 1:
        terminalreporter.section("slowest files", sep="=")
        for name, took in seconds.most_common(15):
            terminalreporter.write_line(f"{took:7.0f} s  {name}")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Any]:
    """This process as the only rank of a process group (`engine.runtime.distributed.Ranks`).

    The group stays. The environment that DeepSpeed reads does not: launches of other tests would
    take themselves for this rank. Nor does the linear function that its ZeRO-3 puts in the place of
    PyTorch's: it sums, and saves for the backward, in another way.
    """
    from torch.nn import functional

    from selfdistill.engine.runtime.distributed import initialize

    before, linear = dict(os.environ), functional.linear
    yield initialize()
    functional.linear = linear
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


_LEFT_OUT = pytest.StashKey[int]()
