"""Rotary tables against Transformers' functions for every type and both spellings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from quire.interfaces.rope import RopeParameters
from quire.layers.rotary import RotaryTable, inverse_frequencies

torch.set_num_threads(1)

HEAD_DIM, LIMIT = 16, 64
HALF = HEAD_DIM // 2
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 16,
        "beta_fast": 24,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
        "truncate": False,
    },
    "yarn with attention factor": {
        "rope_type": "yarn",
        "factor": 2.0,
        "attention_factor": 1.5,
        "original_max_position_embeddings": 32,
    },
    "yarn without factor": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0 + i / 8 for i in range(HALF)],
        "long_factor": [2.0 + i for i in range(HALF)],
        "original_max_position_embeddings": 32,
    },
}


def oracle_config(scaling: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        head_dim=HEAD_DIM,
        max_position_embeddings=LIMIT,
        rope_parameters={"rope_theta": 500.0, **copy.deepcopy(scaling)},
    )


def parameters_of(scaling: dict[str, Any], *, partial: bool = False) -> RopeParameters:
    given = {
        "max_position_embeddings": LIMIT,
        "rope_parameters": {"rope_theta": 500.0, **scaling},
    }
    return RopeParameters.from_json(given, partial=partial)


def table_of(
    scaling: dict[str, Any], *, max_len: int = LIMIT, dtype: torch.dtype = torch.float32
) -> RotaryTable:
    parameters = parameters_of(scaling)
    return RotaryTable.from_parameters(
        parameters, HEAD_DIM, max_len=max_len, dtype=dtype, device="cpu"
    )


def assert_equal_to_one_rounding(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=torch.finfo(torch.float32).eps, atol=0)


def oracle_cos_sin(
    scaling: dict[str, Any], positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    rotary = LlamaRotaryEmbedding(oracle_config(scaling))
    cos, sin = rotary(torch.zeros(1, dtype=dtype), positions[None].long())
    return cos, sin


@pytest.mark.parametrize("name", [n for n in SCALINGS if n not in ("default", "dynamic")])
def test_inverse_frequencies_equal_transformers(name: str) -> None:
    expected, scaling = ROPE_INIT_FUNCTIONS[SCALINGS[name]["rope_type"]](
        oracle_config(SCALINGS[name]), "cpu"
    )
    parameters = parameters_of(SCALINGS[name])
    assert_equal_to_one_rounding(inverse_frequencies(parameters, HEAD_DIM, 1, "cpu"), expected)
    assert parameters.attention_scaling == pytest.approx(scaling, rel=1e-12)


def test_inverse_frequencies_of_longrope_are_the_long_ones_beyond_the_original_length() -> None:
    expected, _ = ROPE_INIT_FUNCTIONS["longrope"](
        oracle_config(SCALINGS["longrope"]), "cpu", seq_len=33
    )
    parameters = parameters_of(SCALINGS["longrope"])
    assert_equal_to_one_rounding(inverse_frequencies(parameters, HEAD_DIM, 33, "cpu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCALINGS)
def test_rotated_heads_equal_transformers(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # In steps of one token up to the limit; LongRoPE's long factors need the last position.
    positions = torch.arange(LIMIT, dtype=torch.int32)
    qkv = torch.randn(LIMIT, 7 * HEAD_DIM, dtype=dtype)
    heads = qkv.view(LIMIT, 7, HEAD_DIM)[:, :5]
    cos, sin = oracle_cos_sin(SCALINGS[name], positions, dtype)
    expected, _ = apply_rotary_pos_emb(heads[None], heads[None], cos, sin, unsqueeze_dim=2)
    rotated = table_of(SCALINGS[name], dtype=dtype).rotate(heads, positions)
    # Two products and a sum, each rounded once: of numbers as large as cos, sin and the head.
    scale = parameters_of(SCALINGS[name]).attention_scaling * float(heads.abs().max())
    bound = 3 * torch.finfo(dtype).eps * scale
    torch.testing.assert_close(rotated, expected[0], rtol=0, atol=bound)


def test_rotation_leaves_its_input_alone() -> None:
    heads = torch.randn(3, 2, HEAD_DIM)
    before = heads.clone()
    table_of(SCALINGS["default"]).rotate(heads, torch.tensor([0, 5, 9]))
    assert torch.equal(heads, before)


def test_rotation_depends_on_the_position_alone() -> None:
    table = table_of(SCALINGS["dynamic"], max_len=2 * LIMIT)
    heads = torch.randn(2 * LIMIT, 2, HEAD_DIM)
    positions = torch.arange(2 * LIMIT)
    whole = table.rotate(heads, positions)
    assert torch.equal(whole[90:93], table.rotate(heads[90:93], positions[90:93]))


@pytest.mark.parametrize("position", [0, LIMIT - 1, LIMIT, LIMIT + 1, 2 * LIMIT - 1])
def test_dynamic_row_equals_what_transformers_generates_with_at_that_length(position: int) -> None:
    table = table_of(SCALINGS["dynamic"], max_len=2 * LIMIT)
    cos, sin = oracle_cos_sin(SCALINGS["dynamic"], torch.tensor([position]), torch.float32)
    # A frequency off by one rounding turns the angle by that much of it.
    bound = 4 * torch.finfo(torch.float32).eps * max(position, 1)
    torch.testing.assert_close(table.cos[position], cos[0, 0, :HALF], rtol=0, atol=bound)
    torch.testing.assert_close(table.sin[position], sin[0, 0, :HALF], rtol=0, atol=bound)


@pytest.mark.parametrize("name", SCALINGS)
def test_table_holds_half_a_head_in_float32(name: str) -> None:
    table = table_of(SCALINGS[name], max_len=10, dtype=torch.bfloat16)
    assert (table.rotary_dim, table.head_dim) == (HEAD_DIM, HEAD_DIM)
    assert {(t.shape, t.dtype) for t in (table.cos, table.sin)} == {
        (torch.Size([10, HALF]), torch.float32)
    }


def test_partial_rotation_leaves_the_rest_of_a_head_alone() -> None:
    parameters = parameters_of({"rope_type": "default", "partial_rotary_factor": 0.5}, partial=True)
    table = RotaryTable.from_parameters(
        parameters, HEAD_DIM, max_len=9, dtype=torch.float32, device="cpu"
    )
    heads, positions = torch.randn(9, 3, HEAD_DIM), torch.arange(9)
    rotated = table.rotate(heads, positions)
    whole = RotaryTable.from_parameters(
        parameters_of({"rope_type": "default"}), 8, max_len=9, dtype=torch.float32, device="cpu"
    )
    assert torch.equal(rotated[..., 8:], heads[..., 8:])
    assert torch.equal(rotated[..., :8], whole.rotate(heads[..., :8], positions))
