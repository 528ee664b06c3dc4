"""DeepSeek's own fp8 files: latents' projections, experts, and what is left in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from e4m3_oracle import FORMS
from safetensors.torch import load_file, save_file
from test_fp8_checkpoints import LENGTHS, RoundedLinear, change_config, engine_tokens
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from quire.errors import CheckpointError

REFERENCE = {"attention_backend": "reference"}
FORM = FORMS["fp8-small-blocks"]
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "mscale": 1.0}
CONFIG: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 48,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 128,
    "eos_token_id": None,
    "initializer_range": 0.3,
    "rope_parameters": {**YARN, "mscale_all_dim": 1.0, "original_max_position_embeddings": 32},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DeepseekV3ForCausalLM]:
    """A folder in blocks of e4m3, and the real class with what its weights stand for, float64."""
    folder = tmp_path_factory.mktemp("deepseek")
    torch.manual_seed(3)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**CONFIG)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    model.save_pretrained(folder)
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name], exact[name] = tensor, tensor.double()
        if name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            code, prefix = FORM.encode(tensor), name.removesuffix("weight")
            stored |= {prefix + key: value for key, value in code.tensors.items()}
            exact[name] = code.weight
    further = {"eh_proj.weight": stored["lm_head.weight"], "mlp.up_proj.weight": torch.ones(2, 2)}
    stored |= {f"model.layers.2.{name}": tensor.clone() for name, tensor in further.items()}
    save_file(stored, folder / "model.safetensors")
    change_config(folder, quantization_config={**FORM.config, "scale_fmt": "ue8m0"})
    return folder, _dequantized(folder, exact)


def _dequantized(folder: Path, exact: dict[str, Tensor]) -> DeepseekV3ForCausalLM:
    """Return the real class in float64, whose linears round their inputs as Quire's do."""
    other = folder / "exact"
    other.mkdir()
    DeepseekV3Config(**CONFIG).save_pretrained(other)
    save_file(exact, other / "model.safetensors")
    model = DeepseekV3ForCausalLM.from_pretrained(other, dtype=torch.float64).eval()
    model.set_experts_implementation("eager")  # others have no float64
    for name, module in model.named_modules():
        # On a CPU experts take inputs as they are; latents' second projection is made wide.
        if isinstance(module, torch.nn.Linear) and not name.endswith(("kv_b_proj", "lm_head")):
            module.__class__ = type("Rounded", (RoundedLinear,), {"form": FORM})
    return model


@torch.inference_mode()
def test_greedy_tokens_are_those_of_the_dequantized_weights(
    checkpoint: tuple[Path, DeepseekV3ForCausalLM],
) -> None:
    folder, model = checkpoint
    prompts = [tiny_llama.prompt(i, length) for i, length in enumerate(LENGTHS)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected.append(tokens[len(prompt) :])

    # It also compares the bytes that are told with those that are held.
    found = engine_tokens(folder, prompts, **REFERENCE)

    assert found == expected


def test_dummy_weights_give_tokens(checkpoint: tuple[Path, Any]) -> None:
    [tokens] = engine_tokens(checkpoint[0], [[1, 2, 3]], **REFERENCE, load_format="dummy")

    assert len(tokens) == 12


def test_scales_of_the_latents_that_are_missing_are_named(
    checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((checkpoint[0] / "config.json").read_bytes())
    tensors = load_file(checkpoint[0] / "model.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight_scale_inv"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
        tiny_llama.make_engine(tmp_path, **REFERENCE)
