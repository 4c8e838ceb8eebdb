"""timm's transformer block with a forward for the CLS token's row alone.

After the last block of an unmasked view most features read the CLS vector only. The other tokens'
rows are then needed as keys and values and for nothing else: their queries, output projection and
MLP are left out, three quarters of the block's work. The CLS row stays what it was, up to the order
of sums.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F


class SplitLinear(nn.Linear):
    """The joint projection to queries, keys and values, which can be asked for the first query.

    The weight is read inside its own module's forward, around which ZeRO-3 gathers it.
    """

    def forward(self, x: Tensor, cls_only: bool = False) -> Any:
        """Projects tokens [B, T, D].

        Args:
            x: the tokens.
            cls_only: queries of the first token alone.

        Returns:
            [B, T, 3D]; with `cls_only` the pair of [B, 1, D] and keys and values [B, T, 2D].
        """
        if not cls_only:
            return super().forward(x)
        width = self.out_features // 3
        query = F.linear(x[:, :1], self.weight[:width], self.bias[:width])
        return query, F.linear(x, self.weight[width:], self.bias[width:])


class CLSBlock(Block):
    """timm's `Block`, with biases and without its extras (norms of queries, layer scale)."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        """See timm's `Block`; the state-dict keys are the same."""
        super().__init__(dim, num_heads, **options)
        self.attn.qkv = SplitLinear(dim, 3 * dim)

    def forward(self, x: Tensor, cls_only: bool = False, **masks: Any) -> Tensor:
        """Tokens [B, T, D] to [B, T, D], or with `cls_only` to the first one's row [B, 1, D]."""
        if not cls_only:
            whole: Tensor = super().forward(x, **masks)
            return whole
        query, rest = self.attn.qkv(self.norm1(x), cls_only=True)
        batch, tokens, heads = len(x), x.shape[1], self.attn.num_heads
        query = query.view(batch, 1, heads, -1).transpose(1, 2)
        key, value = rest.view(batch, tokens, 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value)
        seen = seen.transpose(1, 2).reshape(batch, 1, -1)
        x = x[:, :1] + self.attn.proj_drop(self.attn.proj(seen))
        row: Tensor = x + self.mlp(self.norm2(x))
        return row
