"""What a start counts of a GPU's memory before it has measured anything there."""

from __future__ import annotations

import pytest
import torch

from quire.config import EngineConfig
from quire.preparation import prepare
from quire.start import Starter


def test_weights_that_lie_on_the_gpu_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of more than half of the memory was refused: it was taken off what it had left."""
    starter = Starter(prepare(EngineConfig.from_options({"model": "demo", "device": "cpu"})))
    layout, model = starter.plan(), starter._build("meta")
    starter.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 57 << 30)

    measured = starter._measure_host(model, layout.groups, layout.limits)

    share = starter.config.cache.gpu_memory_utilization
    assert measured.total == int((77 << 30) * share)
