"""Compute with one thread; put helper modules on the import path."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "core"))
torch.set_num_threads(1)
