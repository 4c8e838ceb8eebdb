"""Images as patches, and their projection to tokens."""

from __future__ import annotations

from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images [B, C, H, W] into patches [B, K, p·p·C]; inside a patch: row, column, channel."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    images = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return images.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def unpatchify(patches: Tensor, patch_size: int, grid: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for images of a grid: [B, K, p·p·C] -> [B, C, H, W]."""
    batch, _, values = patches.shape
    (rows, columns), channels = grid, values // patch_size**2
    patches = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return patches.permute(0, 5, 1, 3, 2, 4).reshape(
        batch, channels, rows * patch_size, columns * patch_size
    )


def pick(patches: Tensor, chosen: Tensor) -> Tensor:
    """The patches [B, K, P] of the given numbers [B, M], as [B, M, P]."""
    return patches.gather(1, chosen[:, :, None].expand(-1, -1, patches.shape[2]))


class PatchProjection(nn.Conv2d):
    """A convolution whose windows do not overlap, as the one matrix product that it is.

    Its weight has a convolution's shape [D, C, p, p], under which every checkpoint has it, and is
    read inside its own module's forward, around which ZeRO-3 gathers it.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """Tokens [B, M, D] of patches [B, M, p·p·C], pixels in `patchify`'s order.

        As [B·M, ...]: DeepSpeed's linear function, which under ZeRO-3 stands in for torch's, sums a
        bias's gradient over two dimensions in another order than over one.
        """
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        tokens: Tensor = F.linear(patches.flatten(0, 1), weight, self.bias)
        return tokens.view(*patches.shape[:2], -1)


class KeptPatchEmbed(PatchEmbed):
    """timm's `PatchEmbed`, which projects no more patches than are asked for."""

    def __init__(self, in_chans: int, embed_dim: int, **options: Any) -> None:
        """See timm's `PatchEmbed`; the state-dict keys are the same."""
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, **options)
        side = self.patch_size
        bias = options.get("bias", True)
        self.proj = PatchProjection(in_chans, embed_dim, side, side, bias=bias)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Projects patches.

        Args:
            images: [B, C, H, W], of the size that the module was made for.
            keep: LongTensor [B, L], numbers of the patches to project; None: all K.

        Returns:
            [B, L, D] in the order of `keep`, or [B, K, D].
        """
        assert tuple(images.shape[2:]) == self.img_size, (images.shape, self.img_size)
        patches = patchify(images, self.patch_size[0])
        tokens: Tensor = self.proj(patches if keep is None else pick(patches, keep))
        return tokens
