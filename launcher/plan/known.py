"""Hub names of models that a plan knows without the network."""

from __future__ import annotations

from transformers import BertConfig, ModernBertConfig, PreTrainedConfig, RobertaConfig

from selfdistill.engine.models.images.shape import Shape


def _roberta(width: int, depth: int, heads: int) -> PreTrainedConfig:
    return RobertaConfig(
        vocab_size=50_265,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        max_position_embeddings=514,
        type_vocab_size=1,
    )


def _dinov2(width: int, depth: int) -> Shape:
    return Shape(518, 14, width, depth, width // 64, 4 * width, norm_eps=1e-6, layer_scale=True)


def _dinov3(width: int, depth: int) -> Shape:
    return Shape(
        *(224, 16, width, depth, width // 64, 4 * width),
        norm_eps=1e-5,
        layer_scale=True,
        registers=4,
        rope=100.0,
    )


IMAGES = {
    "facebook/vit-mae-base": Shape(224, 16, 768, 12, 12, 3072),
    "facebook/vit-mae-large": Shape(224, 16, 1024, 24, 16, 4096),
    "facebook/vit-mae-huge": Shape(224, 14, 1280, 32, 16, 5120),
    "facebook/dinov2-small": _dinov2(384, 12),
    "facebook/dinov2-base": _dinov2(768, 12),
    "facebook/dinov2-large": _dinov2(1024, 24),
    "facebook/dinov3-vits16-pretrain-lvd1689m": _dinov3(384, 12),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": _dinov3(768, 12),
    "facebook/dinov3-vitl16-pretrain-lvd1689m": _dinov3(1024, 24),
}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
TEXTS = {
    "FacebookAI/roberta-base": _roberta(768, 12, 12),
    "roberta-base": _roberta(768, 12, 12),
    "FacebookAI/roberta-large": _roberta(1024, 24, 16),
    "roberta-large": _roberta(1024, 24, 16),
    "sentence-transformers/all-MiniLM-L6-v2": BertConfig(**_MINILM),
    "answerdotai/ModernBERT-base": ModernBertConfig(),
}
#: Of these, those that come without a decoder: stage 0 trains one.
BARE = frozenset(name for name in IMAGES if "/vit-mae-" not in name) | {
    "sentence-transformers/all-MiniLM-L6-v2"
}
