"""The kinds of input: what the stages need to know of images and of text, and nothing else does."""

from __future__ import annotations

from selfdistill.data.errors import UserError
from selfdistill.data.shards.manifest import Manifest
from selfdistill.engine.checkpoints.folder import Run
from selfdistill.engine.config.idle import of_other_kind
from selfdistill.engine.training.modalities.base import Modality


def modality_of(run: Run, manifest: Manifest) -> Modality:
    """The modality of a packed data set.

    Raises:
        UserError: the recipe is for another one.
    """
    asked = run.config.kind
    if asked not in ("auto", manifest.kind):
        raise UserError(
            f"{run.config.recipe or 'this configuration'} is a recipe for {asked}s,"
            f" {manifest.root} holds {manifest.kind}s: take another --recipe, or other --data"
        )
    if line := of_other_kind(run.config, manifest.kind):
        run.info_once(f"note: {line}")
    if manifest.kind == "text":
        from selfdistill.engine.training.modalities.text import TextModality

        return TextModality(run, manifest)
    from selfdistill.engine.training.modalities.image import ImageModality

    return ImageModality(run, manifest)
