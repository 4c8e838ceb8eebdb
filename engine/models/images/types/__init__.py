"""The types of image encoders that transformers has: how each is read, and written again."""

from __future__ import annotations

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images.shape import Shape
from selfdistill.engine.models.images.types.base import ModelType
from selfdistill.engine.models.images.types.clip import CLIP
from selfdistill.engine.models.images.types.deit import DeiT
from selfdistill.engine.models.images.types.dinov2 import DINOv2
from selfdistill.engine.models.images.types.dinov3 import DINOv3
from selfdistill.engine.models.images.types.siglip import SigLIP
from selfdistill.engine.models.images.types.vit import ViT

#: All of them. A shape belongs to the first that fits it.
TYPES: tuple[ModelType, ...] = (ViT(), DeiT(), DINOv2(), DINOv3(), CLIP(), SigLIP())


def named(model_type: object, origin: str) -> ModelType:
    """The type of a config.json's ``model_type``.

    Raises:
        UserError: It is none of them; says which there are.
    """
    for one in TYPES:
        if model_type in one.model_types:
            return one
    if str(model_type).startswith("siglip2"):
        raise UserError(
            f"{origin} is a SigLIP 2 for images of any shape (NaFlex), which is not known here:"
            " take one of a fixed size, as google/siglip2-base-patch16-224"
        )
    kind = f"a {str(model_type)[:80]}" if model_type else "a model of unknown type"
    raise UserError(
        f"{origin} is {kind}, none of the image encoders known here"
        f" ({', '.join(one.title for one in TYPES)}): give such a model, as"
        " facebook/vit-mae-base or facebook/dinov2-base"
    )


def fitting(shape: Shape, origin: str) -> ModelType:
    """The type as which a shape is written for transformers.

    Raises:
        UserError: Its parts go together in no class of transformers.
    """
    for one in TYPES:
        if one.fits(shape):
            return one
    raise UserError(
        f"{origin} joins parts as no model of transformers does, so its results could not be"
        f" loaded: take a plain {', '.join(one.title for one in TYPES)}"
    )
