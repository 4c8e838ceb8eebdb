"""The kinds of input: what the stages need to know of images and of text, and nothing else does."""

from __future__ import annotations

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.training.kinds.base import Kind


def kind_of(run: Run, manifest: Manifest) -> Kind:
    """The kind that a packed data set holds.

    Raises:
        UserError: the recipe is for another one.
    """
    asked = run.config.kind
    if asked not in ("auto", manifest.kind):
        raise UserError(
            f"{run.config.recipe or 'this configuration'} is a recipe for {asked}s,"
            f" {manifest.root} holds {manifest.kind}s: take another --recipe, or other --data"
        )
    if manifest.kind == "text":
        from selfdistill.engine.training.kinds.text import TextKind

        return TextKind(run, manifest)
    from selfdistill.engine.training.kinds.image import ImageKind

    return ImageKind(run)
