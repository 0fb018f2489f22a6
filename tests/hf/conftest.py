from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.hf.tiny_models import CONFIGS, random_model


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str, torch.dtype], tuple[Path, dict[str, Tensor]]]:
    """(kind, dtype) -> (folder of several shards, the model's tensors)."""
    made: dict[tuple[str, torch.dtype], tuple[Path, dict[str, Tensor]]] = {}

    def save(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Path, dict[str, Tensor]]:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp(kind)
            model = random_model(CONFIGS[kind](), dtype)
            model.save_pretrained(folder, max_shard_size="60KB" if dtype == torch.float32 else "30KB")
            assert len(list(folder.glob("*.safetensors"))) > 2
            made[kind, dtype] = folder, model.state_dict()
        return made[kind, dtype]

    return save
