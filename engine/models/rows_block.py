"""timm's transformer block with a forward for some of the tokens' rows.

What is read after a last block is often a part of its rows: the CLS vector of an unmasked view, the
masked patches of a masked one. The other rows are then needed as keys and values and for nothing
else: their queries, output projection and MLP are left out, three quarters of the block's work. The
rows that are left stay what they were, up to the order of sums.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

#: The CLS token's row.
CLS = slice(0, 1)


class SplitLinear(nn.Linear):
    """The joint projection to queries, keys and values, which can be asked for some queries.

    The weight is read inside its own module's forward, around which ZeRO-3 gathers it.
    """

    def forward(self, x: Tensor, rows: slice | None = None) -> Any:
        """Projects tokens [B, T, D].

        Args:
            x: the tokens.
            rows: whose queries are asked for, R of them; None: all.

        Returns:
            [B, T, 3D]; with `rows` the pair of queries [B, R, D] and keys and values [B, T, 2D].
        """
        if rows is None:
            return super().forward(x)
        width = self.out_features // 3
        query = F.linear(x[:, rows], self.weight[:width], self.bias[:width])
        return query, F.linear(x, self.weight[width:], self.bias[width:])


class RowsBlock(Block):
    """timm's `Block`, with biases and without its extras (norms of queries, layer scale)."""

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        """See timm's `Block`; the state-dict keys are the same."""
        super().__init__(dim, num_heads, **options)
        self.attn.qkv = SplitLinear(dim, 3 * dim)

    def forward(self, x: Tensor, rows: slice | None = None, **masks: Any) -> Tensor:
        """Tokens [B, T, D] to [B, T, D], or to those of the given rows [B, R, D]."""
        if rows is None:
            whole: Tensor = super().forward(x, **masks)
            return whole
        query, rest = self.attn.qkv(self.norm1(x), rows)
        batch, tokens, heads = len(x), x.shape[1], self.attn.num_heads
        query = query.view(batch, query.shape[1], heads, -1).transpose(1, 2)
        key, value = rest.view(batch, tokens, 2, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        seen = F.scaled_dot_product_attention(query, key, value)
        seen = seen.transpose(1, 2).reshape(batch, seen.shape[2], -1)
        x = x[:, rows] + self.attn.proj_drop(self.attn.proj(seen))
        part: Tensor = x + self.mlp(self.norm2(x))
        return part
