"""DINOv2 with MAE's decoder, as one would write it by hand with transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEModelOutput


class MaskedDINOv2(nn.Module):
    """DINOv2 in the place of ViTMAE's encoder: what is masked leaves after the embeddings."""

    def __init__(self, config: ViTMAEConfig) -> None:
        """Fresh weights.

        Args:
            config: of the whole auto-encoder.
        """
        super().__init__()
        self.config = config
        own = Dinov2Config(
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size // config.hidden_size,
            layer_norm_eps=config.layer_norm_eps,
            use_mask_token=False,
        )
        self.dinov2 = Dinov2Model(own)
        # As in MAE, and so in ours: positions are trained from the classifier on.
        self.dinov2.embeddings.position_embeddings.requires_grad_(False)

    def forward(self, pixel_values: Tensor, noise: Tensor, **_: Any) -> ViTMAEModelOutput:
        """Tokens [B, 1 + L, D] of the patches of the smallest noise, and what the decoder asks for.

        Args:
            pixel_values: [B, 3, S, S], normalised.
            noise: [B, K].
        """
        tokens = self.dinov2.embeddings(pixel_values)
        shuffle = noise.argsort(dim=1)
        restore = shuffle.argsort(dim=1)
        kept = int(noise.shape[1] * (1 - self.config.mask_ratio))
        keep = shuffle[:, :kept, None].expand(-1, -1, tokens.shape[2])
        seen = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, keep)], dim=1)
        hidden = self.dinov2.encoder(seen).last_hidden_state
        return ViTMAEModelOutput(
            last_hidden_state=self.dinov2.layernorm(hidden),
            mask=(restore >= kept).float(),
            ids_restore=restore,
        )


def autoencoder(config: ViTMAEConfig) -> Any:
    """ViTMAE's decoder and loss on DINOv2, with fresh weights."""
    model = ViTMAEForPreTraining(config)
    model.vit = MaskedDINOv2(config)
    return model
