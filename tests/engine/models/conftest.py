"""A small ViT-MAE as transformers saves it."""

from pathlib import Path

import pytest

from tests.kit import models as kit


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' MAE, saved by itself."""
    folder = tmp_path_factory.mktemp("hf") / "mae"
    kit.hf_mae().save_pretrained(folder)
    return folder
