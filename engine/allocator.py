"""What the C library does with memory that a training step gives back."""

import ctypes
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3), in glibc's malloc.h
# Bytes; glibc before 2.35 takes no more than the second.
_LARGEST = (2**30, 2**25)


def keep_memory() -> bool:
    """Keeps memory that tensors on the CPU give back for the next step's, instead of the system's.

    By default glibc returns large blocks at once, and every page of the next step's activations is
    then mapped and zeroed again. The process stays at its peak, which the next step needs anyway;
    blocks of more than 1 GiB still come and go.

    Returns:
        Whether the C library took it; others than glibc have no such setting.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # That of mmap first: to set the other alone would end glibc's own adjustment of it.
        larger = any(mallopt(_M_MMAP_THRESHOLD, size) for size in _LARGEST)
        return larger and bool(mallopt(_M_TRIM_THRESHOLD, -1))  # -1: never
    return False
