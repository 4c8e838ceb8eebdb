"""The kinds of input: what the stages need to know of images and of text, and nothing else does."""

from __future__ import annotations

from data.manifest import Manifest
from engine.folder import Run
from engine.kinds.base import Kind


def kind_of(run: Run, manifest: Manifest) -> Kind:
    """The kind that a packed data set holds."""
    if manifest.kind == "text":
        from engine.kinds.text import TextKind  # transformers' models: seconds

        return TextKind(run, manifest)
    from engine.kinds.image import ImageKind

    return ImageKind(run)
