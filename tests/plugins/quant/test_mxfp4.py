"""gpt-oss as it is published, with experts in MXFP4: tokens of the same numbers in bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_packed_checkpoints import greedy
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quire.cli.main import main
from quire.errors import CheckpointError, ConfigError

CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 6,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
}
REFERENCE = {"attention_backend": "reference"}
UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in MXFP4 and the same as Transformers makes it wide."""
    root = tmp_path_factory.mktemp("mxfp4")
    packed, plain = root / "packed", root / "plain"
    torch.manual_seed(2)
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES)).bfloat16()
    for folder in (packed, plain):
        model.save_pretrained(folder)
    stored = load_file(plain / "model.safetensors")
    exact: dict[str, Tensor] = dict(stored)
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = torch.randint(122, 127, shape, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        exact[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    save_file(stored, packed / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    change_config(packed, quantization_config=CONFIG)
    return packed, plain


def change_config(folder: Path, **keys: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_greedy_tokens_are_those_of_the_wide_checkpoint(
    folders: tuple[Path, Path], dtype: str
) -> None:
    packed, plain = folders
    assert greedy(packed, **REFERENCE, dtype=dtype) == greedy(plain, **REFERENCE, dtype=dtype)


def test_what_is_told_is_what_wide_weights_take(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    told = []
    for folder in folders:
        assert main(["explain", str(folder), "--skip-tokenizer-init"]) == 0
        out = capsys.readouterr().out.splitlines()
        told.append(next(line for line in out if "weights" in line))
    engine = tiny_llama.make_engine(folders[0], **REFERENCE, dtype="float32")
    held = sum(p.numel() * p.element_size() for p in engine.runner.model.parameters())

    assert told[0] == told[1]
    assert engine.layout.budget.weights == held


def test_random_weights_are_served(folders: tuple[Path, Path]) -> None:
    tokens = greedy(folders[0], **REFERENCE, load_format="dummy")

    assert [len(found) for found in tokens.values()] == [12, 12, 12]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{UP}_scales"), rf"1 missing: {UP}_scales"),
        (lambda t: t[f"{UP}_scales"][1, 2].fill_(255), rf"'{UP}_scales' holds a scale that is NaN"),
        (lambda t: t.update({f"{UP}_blocks": t[f"{UP}_blocks"][..., :8].clone()}), r"_blocks \["),
    ],
)
def test_damage_is_named(
    folders: tuple[Path, Path], tmp_path: Path, change: Any, words: str
) -> None:
    (tmp_path / "config.json").write_bytes((folders[0] / "config.json").read_bytes())
    tensors = load_file(folders[0] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=words):
        tiny_llama.make_engine(tmp_path, **REFERENCE)


def test_experts_of_another_model_are_refused(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=96, hidden_size=64, intermediate_size=32, max_position_embeddings=64
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config=CONFIG)

    with pytest.raises(ConfigError, match=r"layers\.0.*experts'.*gpt-oss alone"):
        tiny_llama.make_engine(tmp_path, **REFERENCE)


def test_sizes_that_make_no_blocks_are_refused(tmp_path: Path) -> None:
    config = {**SIZES, "intermediate_size": 40, "architectures": ["GptOssForCausalLM"]}
    text = json.dumps({**config, "quantization_config": CONFIG})
    (tmp_path / "config.json").write_text(text)

    with pytest.raises(ConfigError, match=r"experts\.down_proj has 40 inputs; MXFP4 has blocks"):
        tiny_llama.make_engine(tmp_path, **REFERENCE, load_format="dummy")
