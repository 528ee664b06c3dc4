"""Make `compressed_fp8`: a tiny Llama quantized, written and run by compressed-tensors.

Run with `pip install compressed-tensors==0.20.0`: python tests/data/make_compressed_fp8.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    preset_name_to_scheme,
)
from transformers import AutoModelForCausalLM

TARGET = Path(__file__).with_name("compressed_fp8")
sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

import tiny_llama  # noqa: E402 - found by the line above

PROMPTS = [tiny_llama.prompt(number, 9) for number in range(4)]
NUM_TOKENS = 16


def quantize(model: torch.nn.Module) -> None:
    """Attach the tool's FP8_DYNAMIC scheme, with the scale of each output's largest weight."""
    scheme = preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            largest = module.weight.abs().amax(1, keepdim=True).float()
            module.weight_scale.data.copy_(largest / torch.finfo(torch.float8_e4m3fn).max)


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Return the tokens that the tool's own forward pass gives."""
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def main() -> None:
    """Write the folder."""
    with tempfile.TemporaryDirectory() as folder:
        tiny_llama.write_folder(Path(folder), model_type="llama")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    quantize(model)
    expected = {"prompts": PROMPTS, "tokens": [greedy(model, prompt) for prompt in PROMPTS]}
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(TARGET)
    compressor.update_config(TARGET)
    (TARGET / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
