"""Memory that a step gives back serves the next one."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from selfdistill.engine.runtime.allocator import keep_memory
taken = keep_memory() if sys.argv[1] == "kept" else True
torch.set_num_threads(1)
before = 0
for step in range(10):  # of several large tensors, as activations are
    if step == 6:  # by then the blocks have found their places
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(40 * 2**18) for _ in range(4)]
    del held
print(taken, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is set")
def test_pages_are_mapped_once() -> None:
    def faults(how: str) -> int:
        words = [sys.executable, "-c", FAULTS, how]
        taken, count = subprocess.check_output(words, text=True).split()
        assert taken == "True"
        return int(count)

    # 4 steps of 160 MiB: 160,000 pages of 4 KiB, or 320 of 2 MiB where the system gives huge ones.
    # A system short of memory takes pages of libraries, too, which are mapped again.
    assert faults("kept") < faults("as it is") / 4
