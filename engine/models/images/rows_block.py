"""timm's transformer block with a forward for some of the tokens' rows.

What is read after a last block is often a part of its rows: the CLS vector of an unmasked view, the
masked patches of a masked one. The other rows are then needed as keys and values and for nothing
else: their queries, output projection and MLP are left out, three quarters of the block's work. The
rows that are left stay what they were, up to the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, apply_rot_embed_cat
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

#: The CLS token's row.
CLS = slice(0, 1)


class SplitLinear(nn.Linear):
    """The joint projection to queries, keys and values, which can be asked for some queries.

    The weight is read inside its own module's forward, around which ZeRO-3 gathers it.
    """

    given: Tensor | None

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)
        # 1, and 0 where a bias is to stay away; None: all of them are there.
        self.register_buffer("given", None, persistent=False)

    def leave_key_bias(self) -> None:
        """Keys get no bias and never learn one (DINOv3)."""
        given = torch.ones(self.out_features)
        given[self.in_features : 2 * self.in_features] = 0
        self.given = given

    def forward(self, x: Tensor, rows: slice | None = None) -> Any:
        """Projects tokens [B, T, D].

        Args:
            x: the tokens.
            rows: whose queries are asked for, R of them; None: all.

        Returns:
            [B, T, 3D]; with `rows` the pair of queries [B, R, D] and keys and values [B, T, 2D].
        """
        bias = self.bias if self.given is None else self.bias * self.given
        if rows is None:
            return F.linear(x, self.weight, bias)
        width = self.out_features // 3
        query = F.linear(x[:, rows], self.weight[:width], bias[:width])
        return query, F.linear(x, self.weight[width:], bias[width:])


class RowsAttention(Attention):
    """timm's `Attention`, with biases and without its extras, for some rows.

    Heads are split so that no layout changes on the way back: attention's gradients lie token by
    token, as those of the projection do, and are copied together once, where timm's order of
    dimensions takes two copies. The numbers are timm's, bit for bit.
    """

    def __init__(self, dim: int, **options: Any) -> None:
        """See timm's `Attention`; the state-dict keys are the same."""
        super().__init__(dim, **options)
        self.qkv = SplitLinear(dim)

    def forward(self, x: Tensor, rows: slice | None = None, rope: Tensor | None = None) -> Tensor:
        """Tokens [B, T, D] to [B, T, D], or to those of the given rows [B, R, D].

        Args:
            x: the tokens.
            rows: whose output is asked for; None: all.
            rope: sines and cosines [B or 1, 1, T, 2d] that turn queries and keys (RoPE).
        """
        found, heads = self.qkv(x, rows), (self.num_heads, self.head_dim)
        if rows is None:
            query, key, value = found.unflatten(2, (3, *heads)).unbind(2)
        else:
            query = found[0].unflatten(2, heads)
            key, value = found[1].unflatten(2, (2, *heads)).unbind(2)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        if rope is not None:
            seen_by = rope if rows is None else rope[:, :, rows]
            query = apply_rot_embed_cat(query, seen_by, half=True)
            key = apply_rot_embed_cat(key, rope, half=True)
        dropout = self.attn_drop.p if self.training else 0.0
        seen = _attention(query, key, value, dropout)
        out: Tensor = self.proj_drop(self.proj(seen.transpose(1, 2).flatten(2)))
        return out


def _attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """SDPA of [B, H, R, D] and [B, H, T, D]; on a CPU in fp32.

    PyTorch's attention for CPUs takes 2.7 times as long backward in bf16 as in fp32.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            parts = (query.float(), key.float(), value.float())
            seen = F.scaled_dot_product_attention(*parts, dropout_p=dropout)
        return seen.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)


class RowsBlock(Block):
    """timm's `Block`, perhaps with layer scale, gate, RoPE, stochastic depth; no other extras.

    Attributes:
        recomputes: whether the backward computes it anew, of its input, in place of keeping it.
    """

    recomputes = False

    def __init__(self, dim: int, num_heads: int, **options: Any) -> None:
        """See timm's `Block`; the state-dict keys are the same."""
        super().__init__(dim, num_heads, **{**options, "attn_layer": RowsAttention})

    def forward(self, x: Tensor, rows: slice | None = None, rope: Tensor | None = None) -> Tensor:
        """Tokens [B, T, D] to [B, T, D], or to those of the given rows [B, R, D]; see above."""
        if self.recomputes and torch.is_grad_enabled():
            found: Tensor = checkpoint(self._forward, x, rows, rope, use_reentrant=False)
            return found
        return self._forward(x, rows, rope)

    def _forward(self, x: Tensor, rows: slice | None, rope: Tensor | None) -> Tensor:
        seen = self.drop_path1(self.ls1(self.attn(self.norm1(x), rows, rope)))
        x = (x if rows is None else x[:, rows]) + seen
        part: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return part
