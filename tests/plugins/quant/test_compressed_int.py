"""Whole checkpoints in whole numbers, as two tools wrote and ran them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.errors import CheckpointError
from quire_quant.int8 import product, rounded

MADE_BY_TOOLS = Path(__file__).parents[2] / "data"
CASES = {
    "compressed_int/w4a16-group-asymmetric": "pack-quantized",
    "compressed_int/w8a16-channel": "pack-quantized",
    "compressed_int/w8a8-token": "int8",
    "compressed_int/w8a8-static-asymmetric": "int8",
    "llm_compressor/gptq-order-of-groups": "pack-quantized",
    "llm_compressor/awq": "pack-quantized",
}


def tokens_of(folder: Path, prompts: list[list[int]], length: int, **options: Any) -> Any:
    engine = tiny_llama.make_engine(folder, **options)
    requests = [tiny_llama.request(i, p, max_tokens=length) for i, p in enumerate(prompts)]
    tokens, _ = tiny_llama.run_all(engine, requests)
    return engine, [tokens[(f"r{i}", 0)] for i in range(len(prompts))]


def rounded_as_the_tool_does(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows by their largest by 127.5, where Quire and vLLM take 127."""
    scale = x.abs().amax(1) / 127.5
    return ((x / scale[:, None]).round().clamp(-128, 127) + 128).to(torch.uint8), scale


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_of_a_tool_gives_the_tokens_of_the_tool(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounded.ops, "quantize_rows", rounded_as_the_tool_does)
    monkeypatch.setattr(product, "takes_tiles", lambda *sizes: False)  # it rounds by itself
    folder = MADE_BY_TOOLS / case
    expected = json.loads((folder / "expected.json").read_text())

    engine, found = tokens_of(folder, expected["prompts"], len(expected["tokens"][0]))

    assert engine.prepared.quantization.name == CASES[case]
    # An input of each token that lies between two numbers may go to either.
    num_compared = 8 if case.endswith("w8a8-token") else 16
    compared = [tokens[:num_compared] for tokens in expected["tokens"]]
    assert [tokens[:num_compared] for tokens in found] == compared


def test_checkpoints_of_the_tool_differ_in_their_tokens() -> None:
    """Or a reader that ignored scales or zero points would go unseen."""
    tokens = [(MADE_BY_TOOLS / case / "expected.json").read_text() for case in CASES]

    assert len(set(tokens)) == len(CASES)


@pytest.mark.parametrize("case", CASES)
def test_random_weights_of_a_checkpoint_are_served(case: str) -> None:
    _, found = tokens_of(MADE_BY_TOOLS / case, [[1, 2, 3]], 5, load_format="dummy")

    assert [len(tokens) for tokens in found] == [5]


@pytest.mark.parametrize(
    ("case", "tensor"),
    [
        ("compressed_int/w4a16-group-asymmetric", "model.layers.1.mlp.up_proj.weight_zero_point"),
        ("llm_compressor/gptq-order-of-groups", "model.layers.0.mlp.down_proj.weight_g_idx"),
        ("compressed_int/w8a16-channel", "model.layers.1.mlp.up_proj.weight_shape"),
        ("compressed_int/w8a8-token", "model.layers.0.self_attn.o_proj.weight_scale"),
        ("compressed_int/w8a8-static-asymmetric", "model.layers.0.self_attn.v_proj.input_scale"),
    ],
)
def test_missing_tensor_is_named(tmp_path: Path, case: str, tensor: str) -> None:
    (tmp_path / "config.json").write_bytes((MADE_BY_TOOLS / case / "config.json").read_bytes())
    tensors: dict[str, Tensor] = load_file(MADE_BY_TOOLS / case / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=f"1 missing: {tensor}"):
        tiny_llama.make_engine(tmp_path)
