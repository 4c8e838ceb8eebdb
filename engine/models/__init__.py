"""The models: ViT-MAE on timm, and the conversion between weight formats."""
