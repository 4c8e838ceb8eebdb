"""What inputs are: a list in a fixed order, of which each entry is read by its place."""

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

from selfdistill.data.errors import printable
from selfdistill.data.formats.texts import Text


class Input(NamedTuple):
    """One input: its name, and its content or why there is none.

    Attributes:
        name: a path, an id.
        content: a picture's file or a packed sample's member (bytes), or a text.
        error: why it cannot be read, in a line; "" where it can.
    """

    name: str
    content: bytes | Text
    error: str = ""


def broken(name: str, error: object) -> Input:
    """An input that cannot be read."""
    return Input(name, b"", printable(" ".join(str(error).split())))


class Inputs(ABC):
    """A list of inputs, which may be too long to hold its contents.

    Attributes:
        kind: of all of them.
        root: what the user named, for messages.
        samples: their number.
        column: what their names are called in a table: `path` or `id`.
        notes: what was passed over, a line each.
    """

    kind: Literal["image", "text"]
    root: str
    samples: int
    column: Literal["path", "id"] = "path"
    notes: list[str]

    @abstractmethod
    def read(self, place: int) -> Input:
        """The input at 0 ... samples - 1; what cannot be read says why."""

    @abstractmethod
    def digest(self) -> str:
        """A hash of the list: of the names in their order and their place, not of all contents."""
