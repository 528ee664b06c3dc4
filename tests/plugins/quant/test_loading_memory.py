"""While weights are loaded, memory is what the format says and at most 3% more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from live_memory import LiveMemory
from torch.utils._python_dispatch import _disable_current_modes

from quire import start
from quire.execution import setup
from quire.execution.mapped_files import MappedFiles
from quire_quant import packed
from quire_quant.fp8 import numbers
from quire_quant.int8 import rounded

# Many layers, each small beside all of them, as a real model's are.
SIZES = {
    "num_hidden_layers": 40,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "dtype": "bfloat16",
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False}
STORED: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq 8 bits": {**GPTQ, "bits": 8},
    "gptq act-order": {**GPTQ, "desc_act": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 64},
    "fp8 blocks": {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make pieces as small beside these layers as they are beside those of a real model."""
    monkeypatch.setattr(packed, "PIECE_WEIGHTS", 1 << 13)
    monkeypatch.setattr(rounded, "PIECE_ELEMENTS", 1 << 13)
    monkeypatch.setitem(numbers.PIECE_ELEMENTS, "cpu", 1 << 13)
    view = MappedFiles._view

    def uncounted(self: MappedFiles, tensor: Any) -> torch.Tensor:
        with _disable_current_modes():  # a mapped file is no memory of ours
            return view(self, tensor)

    monkeypatch.setattr(MappedFiles, "_view", uncounted)


def measure(
    monkeypatch: pytest.MonkeyPatch, name: str, folder: Path, **options: Any
) -> dict[str, int]:
    """Start an engine; return what was foretold, the most bytes there were, and those at last."""
    found: dict[str, int] = {}
    load: Callable[..., None] = getattr(start, name)

    def watched(model: Any, *args: Any, **kwargs: Any) -> None:
        found["foretold"] = setup.weight_bytes(model)
        built = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
        memory = LiveMemory()
        with memory:
            load(model, *args, **kwargs)
        found["peak"], found["after"] = built + memory.peak, built + memory.bytes

    monkeypatch.setattr(start, name, watched)
    options |= {"max_model_len": 64, "dtype": "bfloat16", "skip_self_check": True}
    tiny_llama.make_engine(folder, **options)
    return found


@pytest.mark.parametrize("method", ["int4", "int8", "int8-weight-only", "fp8"])
def test_rounding_on_the_fly_takes_at_most_3_percent_more(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama.write_folder(tmp_path, **SIZES)

    found = measure(monkeypatch, "load_weights", folder, quantization=method)

    assert found["after"] <= found["foretold"]
    assert found["peak"] <= 1.03 * found["foretold"], found


def test_pieces_are_small_beside_the_layer_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-0.6B's proportions: the last layers are a hundredth of the model."""
    monkeypatch.setattr(packed, "PIECE_WEIGHTS", 1 << 19)
    sizes = {**SIZES, "num_hidden_layers": 28, "hidden_size": 512, "intermediate_size": 1536}
    folder = tiny_llama.write_folder(tmp_path, **sizes)

    found = measure(monkeypatch, "load_weights", folder, quantization="int4")

    assert found["peak"] <= 1.03 * found["foretold"], found


@pytest.mark.parametrize("stored", STORED)
def test_repacking_takes_at_most_3_percent_more(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama.write_folder(tmp_path, **SIZES, quantization_config=STORED[stored])

    found = measure(monkeypatch, "draw_weights", folder, load_format="dummy")

    assert found["after"] <= found["foretold"]
    assert found["peak"] <= 1.03 * found["foretold"], found
