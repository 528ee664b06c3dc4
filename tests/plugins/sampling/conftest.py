"""Put this folder's helper modules on the import path, and compute with one thread."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


@pytest.fixture
def logits_of() -> Callable[[int], torch.Tensor]:
    """Return random logits of a vocabulary."""
    generator = torch.Generator().manual_seed(7)
    return lambda vocab_size: torch.randn(vocab_size, generator=generator) * 2
