"""What the C library does with memory that a training step gives back."""

import ctypes
from contextlib import suppress

# Of mallopt(3), in glibc's malloc.h; the threshold of mmap first: to set the other alone would end
# glibc's own adjustment of it.
_SETTINGS = {-3: 2**30, -1: -1}  # M_MMAP_THRESHOLD in bytes; M_TRIM_THRESHOLD, -1: never


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
        return all(mallopt(what, value) for what, value in _SETTINGS.items())
    return False
