"""A folder of raw images or texts, given where shards are wanted."""

import os
from pathlib import Path

from selfdistill.data.formats.images import SUFFIXES
from selfdistill.data.sources import texts
from selfdistill.data.sources.samples import Columns


def cure(place: Path) -> str:
    """What to do with a folder of raw images or texts that was given in place of shards.

    Args:
        place: A folder without manifests, a file, or nothing.

    Returns:
        The error's line; "" where it holds neither.
    """
    names = (name for _, _, files in os.walk(place) for name in files)
    if place.is_file():
        holds = "is a file"
    elif any(os.path.splitext(name)[1].lower() in SUFFIXES for name in names):
        holds = "holds images"
    elif place.is_dir() and texts.recognise(place, Columns()):
        holds = "holds texts"
    else:
        return ""
    # Packed into the folder itself, the shards would lie among what they are made of.
    return (
        f"{place} {holds}, not shards: python -m data.pack {place} shards/NAME, then --data"
        " shards/NAME"
    )
