"""ViT-MAE on timm's blocks: encoder, decoder, masked auto-encoder, classifier.

The method is He et al. 2022 (arXiv 2111.06377). Orders, masks and the loss are those of
transformers' ``ViTMAEForPreTraining``, so that the same weights, images and noise give the same
loss and gradients.

Every parameter is used only inside the forward of the module that owns it: DeepSpeed's ZeRO-3
gathers a parameter around that forward alone, so code outside must never read ``encoder.cls_token``
and its like while it trains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from selfdistill.data.errors import UserError
from selfdistill.engine.models.images.patches import KeptPatchEmbed, patchify, pick
from selfdistill.engine.models.images.rows_block import CLS, RowsBlock

#: The largest that a shape may have, well beyond any published: a file may say anything.
_MOST = {
    **dict.fromkeys(("image_size", "patch_size"), 2**14),
    **dict.fromkeys(("width", "decoder_width"), 2**16),
    **dict.fromkeys(("depth", "decoder_depth", "heads", "decoder_heads"), 2**10),
    **dict.fromkeys(("mlp_width", "decoder_mlp_width"), 2**18),
    "channels": 2**8,
}


@dataclass(frozen=True)
class Shape:
    """All that fixes a ViT-MAE apart from its weights; the defaults are the paper's.

    ``image_size`` and ``patch_size`` are in pixels, one side of a square. ``mlp_width`` is the
    hidden width of a block's MLP. ``norm_eps`` is 1e-12 in Hugging Face's models and 1e-6 in FAIR's
    and timm's: it travels with the weights. ``mask_ratio`` is the share of patches that the encoder
    does not see in pre-training. ``normalize_pixels``: the target is each patch's pixels less their
    mean, over their standard deviation. ``layer_scale`` and ``registers`` are DINOv2's: a learnt
    factor for each channel of what a block adds, and tokens beside the patches that no one reads.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_mlp_width: int = 2048
    channels: int = 3
    norm_eps: float = 1e-12
    mask_ratio: float = 0.75
    normalize_pixels: bool = True
    layer_scale: bool = False
    registers: int = 0

    def __post_init__(self) -> None:
        """Refuses a shape that no model can have, with a UserError."""
        for name, most in _MOST.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= most:
                raise UserError(f"{name} is {value!r}: it must be a whole number, 1 to {most}")
        if type(self.registers) is not int or not 0 <= self.registers <= 64:
            raise UserError(f"registers is {self.registers!r}: it must be a whole number, 0 to 64")
        if self.registers and not self.layer_scale:
            raise UserError("it has registers and no layer scale, so it is no DINOv2: take one")
        for name, value in (("norm_eps", self.norm_eps), ("mask_ratio", self.mask_ratio)):
            if type(value) not in (int, float) or not 0 < value < 1:
                raise UserError(f"{name} is {value!r}: it must be a number between 0 and 1")
        if self.image_size % self.patch_size:
            raise UserError(
                f"image size {self.image_size} is not a multiple of patch size {self.patch_size}: "
                f"take {max(1, round(self.image_size / self.patch_size)) * self.patch_size}"
            )
        for name, width, heads in (
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ):
            if width % heads or width % 4:
                raise UserError(
                    f"{name} {width} is not a multiple of both 4 and its {heads} heads: change one "
                    "of them"
                )
        if not 0 < self.kept < self.patches:
            raise UserError(
                f"mask ratio {self.mask_ratio} keeps {self.kept} of {self.patches} patches: it "
                "must leave some, and hide some"
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches in an image, K."""
        return self.grid**2

    @property
    def patch_values(self) -> int:
        """Values in a patch, p·p·C."""
        return self.patch_size**2 * self.channels

    @property
    def kept(self) -> int:
        """Patches that the masked view keeps, L."""
        return kept_patches(self.patches, self.mask_ratio)


def kept_patches(patches: int, ratio: float) -> int:
    """How many of ``patches`` are kept at a mask ratio: rounded down as transformers does."""
    return int(patches * (1 - ratio))


def random_mask(noise: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the patches to keep: those of the smallest noise.

    The same choice as ``ViTMAEEmbeddings.random_masking`` in transformers.

    Args:
        noise: [B, K], one uniform number a patch. Ties are broken by position, on every device
            alike.
        ratio: share of patches to mask.

    Returns:
        keep: LongTensor [B, L], numbers of the kept patches, in order of their noise.
        hidden: LongTensor [B, K - L], numbers of the masked patches, ascending.
        mask: float32 [B, K], 1 where a patch is masked, 0 where it is kept.
    """
    shuffle = torch.argsort(noise, dim=1, stable=True)
    kept = kept_patches(noise.shape[1], ratio)
    keep, hidden = shuffle[:, :kept], shuffle[:, kept:].sort(dim=1).values
    mask = torch.zeros(noise.shape, dtype=torch.float32, device=noise.device)
    return keep, hidden, mask.scatter_(1, hidden, 1.0)


def mae_loss(prediction: Tensor, images: Tensor, hidden: Tensor, normalize_pixels: bool) -> Tensor:
    """Squared error of the masked patches' pixels, in fp32.

    MAE section 3; ``ViTMAEForPreTraining.forward`` in transformers.

    Args:
        prediction: [B, M, p·p·C], of the masked patches.
        images: [B, C, H, W], normalised by the data set's mean and standard deviation.
        hidden: LongTensor [B, M], numbers of the masked patches.
        normalize_pixels: normalise each patch's target by its own mean and *unbiased* variance.

    Returns:
        Scalar fp32: the mean over a patch's values, then over all masked patches of the batch.
    """
    patch_size = round((prediction.shape[2] / images.shape[1]) ** 0.5)
    target = pick(patchify(images.float(), patch_size), hidden)
    if normalize_pixels:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6) ** 0.5
    return F.mse_loss(prediction.float(), target)


def position_table(width: int, grid: int) -> Tensor:
    """Fixed sine-cosine position embeddings, CLS first (zeros): float32 [1, 1 + grid·grid, width].

    FAIR's MAE code, and so every published MAE weight, has the patch's *column* in the first half
    of the vector and its row in the second, each as (sines, cosines) of frequencies
    10000^(-i/(width/4)). Computed in float64.
    """
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    table = torch.cat([axis.repeat(grid, 1), axis.repeat_interleave(grid, dim=0)], dim=1)
    return torch.cat([torch.zeros(1, width, dtype=torch.float64), table]).float()[None]


def _initialise(module: nn.Module) -> None:
    """MAE's fresh weights: Xavier-uniform linear layers with zero bias; LayerNorm at identity."""
    if isinstance(module, nn.Linear | nn.Conv2d):
        # The patch projection is a linear map over a patch's values, and is initialised as one.
        nn.init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


def _mlp_ratio(hidden: int, width: int) -> float:
    # timm takes int(width * ratio): the half keeps rounding from ever giving hidden - 1.
    return (hidden + 0.5) / width


class ViTEncoder(VisionTransformer):
    """timm's ``VisionTransformer`` with a forward that can leave patches out.

    Its state-dict keys are timm's. The position embeddings are the fixed ones and not trained;
    `ViTClassifier` sets them free, as fine-tuning does.
    """

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        """Fresh weights.

        Args:
            shape: the model's shape.
            dropout: rate in the places of transformers' ``hidden_dropout_prob``: after the
                embeddings, after each attention's output projection and after each MLP (not inside
                it, where timm has one more).
        """
        super().__init__(
            img_size=shape.image_size,
            patch_size=shape.patch_size,
            in_chans=shape.channels,
            num_classes=0,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=_mlp_ratio(shape.mlp_width, shape.width),
            qkv_bias=True,
            init_values=1.0 if shape.layer_scale else None,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            norm_layer=partial(nn.LayerNorm, eps=shape.norm_eps),
            weight_init="skip",
            block_fn=RowsBlock,
            embed_layer=KeptPatchEmbed,
        )
        self.shape = shape
        if shape.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, shape.registers, shape.width))
        for block in self.blocks:
            block.mlp.drop1.p = 0.0
        self.apply(_initialise)
        nn.init.normal_(self.cls_token, std=0.02)
        with torch.no_grad():
            self.pos_embed.copy_(position_table(shape.width, shape.grid))
        self.pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, keep: Tensor | None = None, cls_only: bool = False) -> Tensor:
        """Encodes all patches, or the kept ones.

        Args:
            images: [B, C, H, W], normalised; cast to the weights' dtype.
            keep: LongTensor [B, L], the patches to encode; None encodes all K.
            cls_only: the CLS token's row alone; the last block then does a quarter of its work.

        Returns:
            [B, 1 + L, D] after the last LayerNorm, the CLS token first, patches in the order of
            ``keep``; with ``cls_only`` [B, 1, D].
        """
        tokens = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype), keep)
        positions = self.pos_embed[:, 1:] if keep is None else self.pos_embed[0, 1:][keep]
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        given, registers = [cls, tokens + positions], self.shape.registers
        if registers:
            given.insert(1, self.reg_token.expand(tokens.shape[0], -1, -1))
        tokens = self.pos_drop(torch.cat(given, dim=1))
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        tokens = last(tokens, CLS if cls_only else None)
        encoded: Tensor = self.norm(tokens)
        if registers and not cls_only:
            encoded = torch.cat([encoded[:, :1], encoded[:, 1 + registers :]], dim=1)
        return encoded


class MAEDecoder(nn.Module):
    """MAE's light decoder: predicts every patch's pixels from the encoder's kept tokens."""

    def __init__(self, shape: Shape) -> None:
        """Fresh weights for a shape."""
        super().__init__()
        norm = partial(nn.LayerNorm, eps=shape.norm_eps)
        width = shape.decoder_width
        self.embed = nn.Linear(shape.width, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + shape.patches, width), requires_grad=False)
        self.blocks = nn.Sequential(
            *(
                RowsBlock(
                    dim=width,
                    num_heads=shape.decoder_heads,
                    mlp_ratio=_mlp_ratio(shape.decoder_mlp_width, width),
                    qkv_bias=True,
                    norm_layer=norm,
                )
                for _ in range(shape.decoder_depth)
            )
        )
        self.norm = norm(width)
        self.pred = nn.Linear(width, shape.patch_values)
        self.apply(_initialise)
        nn.init.normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            self.pos_embed.copy_(position_table(width, shape.grid))

    def forward(self, tokens: Tensor, keep: Tensor, hidden: Tensor, whole: bool = False) -> Tensor:
        """Predicts pixels.

        Attention does not mind the order of tokens, which their positions alone tell: here kept
        patches come first, then masked ones, and nothing is put in its place and back.

        Args:
            tokens: [B, 1 + L, D] from the encoder, CLS first.
            keep: LongTensor [B, L] from `random_mask`.
            hidden: LongTensor [B, K - L] from it.
            whole: predict the kept patches too, which the loss does not read.

        Returns:
            [B, K - L, p·p·C] of the masked patches in the order of ``hidden``; with ``whole``
            [B, K, p·p·C] of all in the order of the grid.
        """
        tokens = self.embed(tokens)
        masked = self.mask_token.expand(*hidden.shape, -1)
        order = torch.cat([keep, hidden], dim=1)
        positions = self.pos_embed[0, F.pad(order + 1, (1, 0))]  # CLS has the first
        tokens = torch.cat([tokens, masked], dim=1) + positions
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens)
        tokens = last(tokens, None if whole else slice(1 + keep.shape[1], None))
        prediction: Tensor = self.pred(self.norm(tokens))
        return pick(prediction[:, 1:], order.argsort(dim=1)) if whole else prediction


class ViTMAE(nn.Module):
    """The masked auto-encoder: `ViTEncoder` and `MAEDecoder`."""

    def __init__(self, shape: Shape) -> None:
        """Fresh weights for a shape, ready to train from scratch."""
        super().__init__()
        self.shape = shape
        self.encoder = ViTEncoder(shape)
        self.decoder = MAEDecoder(shape)

    def forward(self, images: Tensor, noise: Tensor, whole: bool = False) -> dict[str, Tensor]:
        """One masked reconstruction.

        Args:
            images: [B, C, H, W], normalised.
            noise: [B, K], uniform; decides the mask.
            whole: predict the kept patches too.

        Returns:
            ``loss`` (fp32 scalar), ``prediction`` [B, K - L, p·p·C] of the masked patches in the
            order of the grid, or with ``whole`` [B, K, p·p·C], ``mask`` [B, K] (1 = masked).
        """
        keep, hidden, mask = random_mask(noise, self.shape.mask_ratio)
        prediction = self.decoder(self.encoder(images, keep), keep, hidden, whole)
        read = pick(prediction, hidden) if whole else prediction
        loss = mae_loss(read, images, hidden, self.shape.normalize_pixels)
        return {"loss": loss, "prediction": prediction, "mask": mask}


class ViTClassifier(nn.Module):
    """An encoder with a fresh linear head (transformers' ``ViTForImageClassification``)."""

    def __init__(
        self, encoder: ViTEncoder, classes: int, pool: str = "cls", dropout: float = 0.0
    ) -> None:
        """Puts a head on an encoder.

        Args:
            encoder: taken as it is, not copied; its dropout is its own, and its position embeddings
                become trainable, as in transformers' ViT.
            classes: number of classes.
            pool: ``cls``, the CLS vector after the last LayerNorm, or ``mean``, the mean of the
                patches' vectors.
            dropout: rate before the head; transformers has none there.
        """
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool is {pool!r}, not cls or mean")
        self.pool = pool
        self.encoder = encoder
        self.encoder.pos_embed.requires_grad_(True)
        self.head_drop = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.shape.width, classes)
        trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of normalised images [B, C, H, W]."""
        tokens = self.encoder(images, cls_only=self.pool == "cls")
        features = tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1)
        logits: Tensor = self.head(self.head_drop(features))
        return logits
