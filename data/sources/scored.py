"""Labels and pictures that a trained model is scored on: it says what they are, nothing is guessed.

What is refused before a training, such as samples of one class alone, may well be a test.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_CLASSES: ContextVar[frozenset[str] | None] = ContextVar("classes", default=None)


@contextmanager
def by(classes: Sequence[str]) -> Iterator[None]:
    """Within, what is packed is for scoring a model.

    Args:
        classes: The model's.
    """
    token = _CLASSES.set(frozenset(classes))
    try:
        yield
    finally:
        _CLASSES.reset(token)


def classes() -> frozenset[str] | None:
    """Those of the model; None where a training is packed for."""
    return _CLASSES.get()
