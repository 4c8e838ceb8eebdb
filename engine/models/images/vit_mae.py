"""ViT-MAE on timm's blocks: encoder, decoder, masked auto-encoder, classifier.

The method is He et al. 2022 (arXiv 2111.06377). Orders, masks and the loss are those of
transformers' ``ViTMAEForPreTraining``, so that the same weights, images and noise give the same
loss and gradients.

Every parameter is used only inside the forward of the module that owns it: DeepSpeed's ZeRO-3
gathers a parameter around that forward alone, so code outside must never read ``encoder.cls_token``
and its like while it trains.
"""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import SwiGLUPacked, trunc_normal_
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from selfdistill.data.formats.images import Size, sides
from selfdistill.engine.models.images.patches import KeptPatchEmbed, patchify, pick
from selfdistill.engine.models.images.rows_block import CLS, RowsBlock
from selfdistill.engine.models.images.shape import Shape, kept_patches


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


def position_table(width: int, grid: Size) -> Tensor:
    """Fixed sine-cosine position embeddings, CLS first (zeros): float32 [1, 1 + K, width].

    FAIR's MAE code, and so every published MAE weight, has the patch's *column* in the first half
    of the vector and its row in the second, each as (sines, cosines) of frequencies
    10000^(-i/(width/4)). Computed in float64.

    Args:
        width: of a vector.
        grid: patches along a side, or rows and columns of them, K in all.
    """
    rows, columns = sides(grid)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(max(rows, columns), dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    across, down = axis[:columns].repeat(rows, 1), axis[:rows].repeat_interleave(columns, dim=0)
    table = torch.cat([across, down], dim=1)
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

    The first row of what it gives is the model's own summary of an image: the CLS token, or
    without one what timm's attention pooling makes of the patches.
    """

    def __init__(self, shape: Shape, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        """Fresh weights.

        Args:
            shape: the model's shape.
            dropout: rate in the places of transformers' ``hidden_dropout_prob``: after the
                embeddings, after each attention's output projection and after each MLP (not inside
                it, where timm has one more).
            drop_path: rate of stochastic depth of the last block, falling linearly to 0 of the
                first.
        """
        super().__init__(
            img_size=shape.sides,
            patch_size=shape.patch_size,
            in_chans=shape.channels,
            num_classes=0,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=_mlp_ratio((1 + shape.gated) * shape.mlp_width, shape.width),
            qkv_bias=True,
            init_values=1.0 if shape.layer_scale else None,
            class_token=shape.class_token,
            global_pool="token" if shape.class_token else "map",
            pos_embed="none" if shape.rope else "learn",
            pre_norm=shape.pre_norm,
            pos_drop_rate=dropout,
            proj_drop_rate=dropout,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=shape.norm_eps),
            act_layer="silu" if shape.gated else shape.activation,
            weight_init="skip",
            block_fn=RowsBlock,
            embed_layer=KeptPatchEmbed,
            **({"mlp_layer": SwiGLUPacked} if shape.gated else {}),
        )
        self.shape = shape
        if shape.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, shape.registers, shape.width))
        self.rope = None
        if shape.rope:
            self.rope = RotaryEmbeddingDinoV3(
                shape.width // shape.heads, shape.rope, feat_shape=list(shape.grid)
            )
        for block in self.blocks:
            block.mlp.drop1.p = 0.0
            if shape.rope:
                block.attn.qkv.leave_key_bias()
        self.apply(_initialise)
        if shape.class_token:
            nn.init.normal_(self.cls_token, std=0.02)
        if not shape.rope:
            with torch.no_grad():
                table = position_table(shape.width, shape.grid)
                self.pos_embed.copy_(table if shape.class_token else table[:, 1:])
            self.pos_embed.requires_grad_(False)

    def forward(self, images: Tensor, keep: Tensor | None = None, cls_only: bool = False) -> Tensor:
        """Encodes all patches, or the kept ones.

        Args:
            images: [B, C, H, W], normalised; cast to the weights' dtype.
            keep: LongTensor [B, L], the patches to encode; None encodes all K.
            cls_only: the CLS token's row alone; the last block then does a quarter of its work.

        Returns:
            [B, 1 + L, D] after the last LayerNorm, the summary first, patches in the order of
            ``keep``; with ``cls_only`` [B, 1, D].
        """
        tokens = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype), keep)
        tokens = self.norm_pre(self.pos_drop(self._placed(tokens, keep)))
        rope = None if self.rope is None else self._rotations(keep)
        *blocks, last = self.blocks
        for block in blocks:
            tokens = block(tokens, rope=rope)
        summary = self.shape.class_token
        tokens = last(tokens, CLS if cls_only and summary else None, rope)
        encoded: Tensor = self.norm(tokens)
        if not summary:
            pooled = self.attn_pool(encoded)[:, None]
            return pooled if cls_only else torch.cat([pooled, encoded], dim=1)
        if self.shape.registers and not cls_only:
            encoded = torch.cat([encoded[:, :1], encoded[:, self.shape.prefix :]], dim=1)
        return encoded

    def _placed(self, patches: Tensor, keep: Tensor | None) -> Tensor:
        """Patches [B, L, D] with their positions, behind the tokens that stand before them."""
        batch, shape, table = patches.shape[0], self.shape, self.pos_embed
        first = int(shape.class_token)  # position of the first patch
        if table is not None:
            patches = patches + (table[:, first:] if keep is None else table[0, first:][keep])
        given = [patches]
        if shape.registers:
            given.insert(0, self.reg_token.expand(batch, -1, -1))
        if shape.class_token:
            cls = self.cls_token if table is None else self.cls_token + table[:, :1]
            given.insert(0, cls.expand(batch, -1, -1))
        return torch.cat(given, dim=1)

    def _rotations(self, keep: Tensor | None) -> Tensor:
        """Sines and cosines [B or 1, 1, T, 2d] of the tokens; those before the patches stay."""
        assert self.rope is not None
        angles = self.rope.get_embed()
        angles = angles[None] if keep is None else angles[keep]
        still = angles.new_zeros(angles.shape[0], self.shape.prefix, angles.shape[2])
        still[..., angles.shape[2] // 2 :] = 1  # cosines
        return torch.cat([still, angles], dim=1)[:, None]


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
            pool: ``cls``, the CLS vector after the last LayerNorm (without one the attention's
                pooling), or ``mean``, the mean of the patches' vectors.
            dropout: rate before the head; transformers has none there.
        """
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"pool is {pool!r}, not cls or mean")
        self.pool = pool
        self.encoder = encoder
        if encoder.pos_embed is not None:
            encoder.pos_embed.requires_grad_(True)
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
