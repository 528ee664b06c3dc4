"""What is wrong with a mixture's files or options is told in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from quire import LLM
from quire.errors import CheckpointError, ConfigError

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint as Transformers writes it."""
    config = transformers.Qwen3MoeConfig(**SIZES)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def start(folder: Path, **options: Any) -> LLM:
    return LLM(str(folder), device="cpu", skip_tokenizer_init=True, num_threads=1, **options)


def test_experts_that_a_method_does_not_keep_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.experts.*own dtype, by fp8"):
        start(folder, quantization="int8")


def test_expert_without_weights_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.1\.mlp\.experts\.2\.up"):
        start(folder)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"num_local_experts": 3}, "unexpected: model.layers.0.mlp.experts.3.down_proj"),
        ({"num_local_experts": 5}, "missing: model.layers.0.mlp.experts.4.down_proj"),
        ({"moe_intermediate_size": 24}, "experts.0.down_proj.weight [32, 16] instead of [32, 24]"),
        ({"mlp_only_layers": [1]}, "missing: model.layers.1.mlp.down_proj.weight"),
    ],
)
def test_config_that_contradicts_its_weights_is_told(
    folder: Path, keys: dict[str, Any], words: str
) -> None:
    change_config(folder, **keys)

    with pytest.raises(CheckpointError) as found:
        start(folder)

    assert words in str(found.value)


def test_more_experts_a_token_than_there_are_is_told(folder: Path) -> None:
    change_config(folder, num_experts_per_tok=9)

    with pytest.raises(ConfigError, match="num_experts_per_tok is 9; allowed: .* experts, 4"):
        start(folder)


def test_drawn_weights_give_finite_answers(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    llm = start(folder, load_format="dummy", dtype="bfloat16")

    [output] = llm.generate([{"prompt_token_ids": [1, 2, 3]}], use_tqdm=False)

    assert output.outputs[0].token_ids


def test_deterministic_answers_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="--deterministic: model .*'qwen3-moe' cannot be used"):
        start(folder, deterministic=True)
