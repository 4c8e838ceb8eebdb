"""Where shards, tables and manifests lie: paths, addresses, and names that may stand in either."""

import os
import re
from pathlib import Path
from urllib.parse import urlsplit

#: Of addresses that a manifest may name. Never a command: it may come from a stranger.
SCHEMES = ("http", "https", "s3", "gs", "az", "hf")


def is_remote(place: str) -> bool:
    """Whether a place is a URL or a ``pipe:`` command and not a local path."""
    return place.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", place) is not None


def join(root: str, name: str) -> str:
    """The place of a file in a folder: a path, a URL, or a ``pipe:`` command that ends in one."""
    return f"{root.rstrip('/')}/{name}"


def is_plain(name: str) -> bool:
    """Whether a shard, or a table, may be called so, in a folder or below it.

    Such a name is the same in a path, a URL and a shell's command.
    """
    parts = name.split("/")
    short = all(len(part.encode()) <= 255 for part in parts)  # what file systems bear
    inside = not {"", ".", ".."} & set(parts)
    return bool(re.fullmatch(r"[\w.+=@-][\w./+=@-]*", name)) and inside and short


def is_address(name: str) -> bool:
    """Whether a shard, or a table, may be fetched from a URL of its own; see `SCHEMES`."""
    scheme, separator, rest = name.partition("://")
    if not (separator and scheme.lower() in SCHEMES and re.fullmatch(r"[!-~]+", rest)):
        return False
    if "::" in name:  # fsspec would chain what follows, of any scheme
        return False
    try:
        return bool(urlsplit(name).hostname)
    except ValueError:  # such as http://[bad
        return False


def as_typed(path: Path) -> Path:
    """A path from the root on, links in it left as they are: a split is what it is called."""
    here = os.environ.get("PWD", "")  # the shell's, which remembers links; getcwd does not
    if not path.is_absolute() and os.path.isdir(here) and os.path.samefile(here, "."):
        path = Path(here) / path
    return Path(os.path.abspath(path))
