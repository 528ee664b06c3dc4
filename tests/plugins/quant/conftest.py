"""Put this folder's helper modules on the import path, and compute with one thread."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
CORE = Path(__file__).parents[2] / "core"
sys.path += [str(CORE), str(CORE / "execution")]  # tiny_llama, load_and_measure
torch.set_num_threads(1)
