"""What a notebook's cell shows of mistakes and interrupts: a real kernel says it."""

import os
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from tests.kit.launches import COMMON, ROOT, environment, make_world

pytestmark = pytest.mark.multi


class Kernel:
    """A kernel in a folder with a data set and a model."""

    def __init__(self, manager: KernelManager, client: BlockingKernelClient) -> None:
        self.manager, self.client = manager, client

    def cell(self, code: str, interrupt_at: str = "", times: int = 1) -> tuple[str, str]:
        """What was printed, and what stands below of the error; colours left out.

        Args:
            code: of the cell.
            interrupt_at: text at which it is interrupted.
            times: how often.
        """
        message = self.client.execute(code)
        printed, error = "", ""
        while True:
            said: Any = self.client.get_iopub_msg(timeout=300)
            content = said["content"]
            if said["parent_header"].get("msg_id") != message:
                continue
            if said["msg_type"] == "stream":
                printed += content["text"]
            if said["msg_type"] == "display_data":
                printed += content["data"]["text/plain"]
            if said["msg_type"] == "error":
                error = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))
            if interrupt_at and interrupt_at in printed:
                interrupt_at = ""
                for _ in range(times):
                    self.manager.interrupt_kernel()
                    time.sleep(0.5)
            if content.get("execution_state") == "idle":
                return printed, error


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    root = make_world(tmp_path_factory.mktemp("cells"))
    variables = environment(PYTHONPATH=str(ROOT), IPYTHONDIR=str(root), TMPDIR=str(root))
    manager, client = start_new_kernel(
        startup_timeout=300, cwd=str(root), env=os.environ | variables
    )
    try:
        kernel = Kernel(manager, client)
        common = COMMON | {"pretrain.steps": 4000, "stage": "pretrain", "save_every": 9999}
        kernel.cell(f"import selfdistill as sd\ncommon = {common}\nbase, shards = 'base', 'shards'")
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_mistake_shows_the_line_and_the_message(kernel: Kernel) -> None:
    for call, message in (
        ("sd.pack('images', 'shards')", "shards/train exists: give another folder, or replace it"),
        ("sd.Run('images')", "images holds no training"),
        ("sd.load('images')", "images holds no model"),
        ("sd.train(output='x', epochs=3)", "epochs belongs to pretrain, distill, finetune or"),
    ):
        printed, error = kernel.cell(f"a = 1\nb = 2\n{call}\nc = 3\nd = 4")
        lines = error.splitlines()
        assert lines[-1].startswith(f"UserError: {message}"), error
        assert [line for line in lines if line.startswith("----> 3 ")], error
        assert len(lines) <= 10, error
        assert "error" not in printed.lower()


def test_a_cell_without_widgets_is_not_told_of_them(kernel: Kernel) -> None:
    printed, error = kernel.cell("sd.pack('images', 'small', size=8); sd.embed(base, 'images')")
    assert "57 inputs" in printed, error
    assert "idget" not in printed
    assert "IProgress" not in printed


def test_what_the_ranks_refuse_stands_in_the_cell_once(kernel: Kernel) -> None:
    printed, error = kernel.cell("sd.train(output='x', data=shards, model='./nowhere')")
    assert "x: stage all" in printed
    assert (printed + error).count("no weights at ./nowhere") == 1, printed + error
    assert len(error.splitlines()) <= 10
    # What can be seen before they start is told without them.
    printed, error = kernel.cell("sd.train(output='y', data='nowhere', model=base)")
    assert printed == ""
    assert error.splitlines()[-1].endswith("pack it first (sd.pack(SOURCE, 'nowhere'))")
    assert len(error.splitlines()) <= 10


def test_an_interrupt_saves_and_says_where(kernel: Kernel) -> None:
    call = "sd.train(output='cut', data=shards, model=base, **common)"
    steps = []
    # The second one comes while the ranks save.
    for at, times in (("pretrain 3/4000", 2), ("pretrain: resumed at step", 1)):
        printed, error = kernel.cell(call, at, times)
        assert printed.count("interrupted: saving, wait\n") == 1, printed
        assert "Traceback" not in printed
        found = re.fullmatch(
            r"KeyboardInterrupt: interrupted at pretrain, step (\d+) of 4000: call sd\.train again"
            r" to go on from there",
            error.splitlines()[-1],
        )
        assert found, error
        assert len(error.splitlines()) <= 10, error
        steps.append(int(found[1]))
    assert f"pretrain: resumed at step {steps[0]} of 4000" in printed
    assert kernel.cell("print(1 + 1)") == ("2\n", "")
