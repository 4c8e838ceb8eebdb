"""MATLAB files of the Stanford Dogs and Oxford Flowers lists. scipy's reader unpickles nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
from numpy.typing import NDArray

from selfdistill.data.errors import UserError


def load(path: Path, *names: str) -> list[NDArray[Any]]:
    """Reads variables of a MATLAB 5 file.

    Args:
        path: The file.
        names: Variables that it must have.

    Returns:
        Each variable flattened; a cell array of strings as an array of str.

    Raises:
        UserError: The file is missing, broken, or lacks a variable.
    """
    cure = "take the official file again"
    try:
        found = scipy.io.loadmat(str(path), variable_names=names)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {cure} and put it there") from None
    except Exception as error:  # scipy raises many kinds for a broken file, its own and struct's
        raise UserError(f"{path} is no readable MATLAB file ({error}): {cure}") from None
    absent = [name for name in names if name not in found]
    if absent:
        raise UserError(f"{path} has no variable {absent[0]!r}: {cure}")
    out = []
    for name in names:
        flat = np.asarray(found[name]).ravel()
        if flat.dtype == object:
            flat = np.array([str(np.asarray(cell).ravel()[0]) for cell in flat])
        out.append(flat)
    return out
