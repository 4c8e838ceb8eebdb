"""Tiny ViT-MAEs: transformers' own as oracles, and the same weights in other formats."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from selfdistill.engine.models.images.vit_mae import ViTMAE, position_table
from selfdistill.engine.models.images.weights import Pretrained

SIZE, PATCH, PATCHES = 16, 4, 16
#: Encoder of two 64-wide heads and decoder of two 32-wide ones: what FAIR's files imply.
SIZES = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 144,
}
DECODER_SIZES = {
    "decoder_hidden_size": 64,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 80,
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Every parameter random, norms and biases too, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            scale = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.2
            parameter.copy_(centre + scale * noise)


def hf_mae(seed: int = 0, **options: object) -> ViTMAEForPreTraining:
    """transformers' MAE with random weights and the fixed position embeddings filled in."""
    model = ViTMAEForPreTraining(ViTMAEConfig(**{**SIZES, **DECODER_SIZES, **options}))
    randomise(model, seed)
    with torch.no_grad():
        for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
            table.copy_(position_table(table.shape[2], SIZE // PATCH))
    return model.eval()


def hf_classifier(classes: int = 3, **options: object) -> ViTForImageClassification:
    """transformers' ViT classifier with random weights, its position embeddings learnt."""
    model = ViTForImageClassification(ViTConfig(**{**SIZES, "num_labels": classes, **options}))
    randomise(model, seed=1)
    return model.eval()


def batch(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [5, 3, 16, 16] and noise [5, 16]."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(5, 3, SIZE, SIZE, generator=generator)
    return images, torch.rand(5, PATCHES, generator=generator)


def built(weights: Pretrained) -> ViTMAE:
    """Our model with loaded weights."""
    model = ViTMAE(weights.shape)
    model.encoder.load_state_dict(weights.encoder)
    assert weights.decoder is not None
    model.decoder.load_state_dict(weights.decoder)
    return model.eval()


#: Names of transformers 5 -> 4.
_OLD = (
    (".layers.", ".encoder.layer."),
    (".q_proj.", ".attention.query."),
    (".k_proj.", ".attention.key."),
    (".v_proj.", ".attention.value."),
    (".o_proj.", ".output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as transformers 4 named it (and the hub's files still are)."""
    renamed = {}
    for name, tensor in state.items():
        for new, old in _OLD:
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def write_folder(folder: Path, config: dict[str, object], state: dict[str, Tensor]) -> Path:
    """A model's folder with exactly these names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.detach().contiguous() for k, v in state.items()}, folder / "model.safetensors")
    return folder


def fair_state(model: ViTMAEForPreTraining) -> dict[str, Tensor]:
    """The same weights under the names of FAIR's models_mae.py."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    fair = {
        "cls_token": state["vit.embeddings.cls_token"],
        "pos_embed": state["vit.embeddings.position_embeddings"],
        "mask_token": state["decoder.mask_token"],
        "decoder_pos_embed": state["decoder.decoder_pos_embed"],
    }
    for kind in ("weight", "bias"):
        projection = state[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        fair[f"patch_embed.proj.{kind}"] = projection
        fair[f"norm.{kind}"] = state[f"vit.layernorm.{kind}"]
        for part in ("decoder_embed", "decoder_norm", "decoder_pred"):
            fair[f"{part}.{kind}"] = state[f"decoder.{part}.{kind}"]
        for theirs, ours in (
            ("vit.layers", "blocks"),
            ("decoder.decoder_layers", "decoder_blocks"),
        ):
            for i in range(2):
                block, other = f"{theirs}.{i}", f"{ours}.{i}"
                parts = [state[f"{block}.attention.{p}_proj.{kind}"] for p in "qkv"]
                fair[f"{other}.attn.qkv.{kind}"] = torch.cat(parts)
                fair[f"{other}.attn.proj.{kind}"] = state[f"{block}.attention.o_proj.{kind}"]
                fair[f"{other}.norm1.{kind}"] = state[f"{block}.layernorm_before.{kind}"]
                fair[f"{other}.norm2.{kind}"] = state[f"{block}.layernorm_after.{kind}"]
                fair[f"{other}.mlp.fc1.{kind}"] = state[f"{block}.mlp.fc1.{kind}"]
                fair[f"{other}.mlp.fc2.{kind}"] = state[f"{block}.mlp.fc2.{kind}"]
    return fair
