"""The processes of torch's DataLoader: their signals, how their death is told, their end."""

import functools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from selfdistill.data.errors import WorkerLost


def ignore_signals(_: int) -> None:
    """A worker leaves SIGTERM, SIGUSR2 and Ctrl-C to the trainer, which saves and then ends it."""
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


_DEATHS = {
    -signal.SIGKILL: "was killed by the system (SIGKILL), most likely for lack of memory",
    -signal.SIGBUS: "died (SIGBUS), most likely for lack of shared memory (/dev/shm)",
}
_awaited: Any = None  # the iterator for whose batch the main thread waits


def lost(iterator: Any) -> WorkerLost | None:
    """What to say of the workers of a DataLoader's iterator, if one of them died."""
    for worker in getattr(iterator, "_workers", ()):
        if code := worker.exitcode:  # 0: at its end; None: alive
            how = _DEATHS.get(code, f"died (exit {code})")
            return WorkerLost(
                f"a data loader worker (pid {worker.pid}) {how}: launch again and the stage goes on"
                " from its checkpoint; take fewer --data.workers, or a --data.cache_dir that is not"
                " in memory, if it happens again"
            )
    return None


@functools.cache
def _watch() -> None:
    """Lets the death of a worker end the wait for a batch at once, and nothing else.

    torch's handler of SIGCHLD raises wherever the program stands, in the midst of a step or of a
    checkpoint. Without one torch sees the death within 5 s, or never if the worker was writing.
    """
    torchs = signal.getsignal(signal.SIGCHLD)

    def handle(number: int, frame: Any) -> None:
        with suppress(RuntimeError):
            if callable(torchs):
                torchs(number, frame)
        if found := lost(_awaited):
            raise found

    signal.signal(signal.SIGCHLD, handle)


@contextmanager
def awaiting(iterator: Any) -> Iterator[None]:
    """Raises WorkerLost when a worker of the iterator is dead, or dies within."""
    global _awaited
    if hasattr(iterator, "_workers") and threading.current_thread() is threading.main_thread():
        _watch()
        _awaited = iterator
    try:
        if found := lost(iterator):
            raise found
        yield
    except Exception as error:
        # torch makes its own errors of a death, and of what is raised within its queue. The
        # connections of a process that dies break a moment before it is dead.
        end = time.monotonic() + (2 if isinstance(error, (EOFError, OSError)) else 0)
        while not (found := lost(iterator)) and time.monotonic() < end:
            time.sleep(0.01)
        if found:
            raise found from None
        raise
    finally:
        _awaited = None


def stop(iterator: Any) -> None:
    """Ends the workers of a DataLoader's iterator.

    They are asked first. Where that does not reach them (Python has collected the queue to them
    before the iterator) torch sends SIGTERM, which they ignore, and the program would wait for them
    at its end for ever: so they are killed. When one of them died nothing is asked: it may have
    held a lock that all share, and that is never released.
    """
    if not hasattr(iterator, "_shutdown_workers"):
        return
    with suppress(WorkerLost), awaiting(iterator):
        iterator._shutdown_workers()
    if lost(iterator):
        iterator._shutdown = True  # or it asks when it is collected
        if iterator._worker_pids_set:  # torch refuses the next iterator that has its id
            torch._C._remove_worker_pids(id(iterator))
            iterator._worker_pids_set = False
        for queue in (*iterator._index_queues, iterator._worker_result_queue):
            queue.cancel_join_thread()
        if iterator._pin_memory:
            iterator._pin_memory_thread_done_event.set()
    for worker in iterator._workers:
        if worker.is_alive():
            worker.kill()
            worker.join()
