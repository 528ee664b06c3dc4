"""Make `compressed_int`: a tiny Llama in whole numbers, written and run by compressed-tensors.

Run with `pip install compressed-tensors==0.20.0`: python tests/data/make_compressed_int.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from compressed_tensors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM

TARGET = Path(__file__).with_name("compressed_int")
sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

import tiny_llama  # noqa: E402 - found by the line above

PROMPTS = [tiny_llama.prompt(number, 9) for number in range(4)]
NUM_TOKENS = 16
PACKED = {"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}
WHOLE = {"num_bits": 8, "strategy": "channel", "symmetric": True}
TOKENS = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
STATIC = {"num_bits": 8, "strategy": "tensor", "symmetric": False, "dynamic": False}
SCHEMES: dict[str, dict[str, Any]] = {
    "w4a16-group-asymmetric": {"weights": PACKED},
    "w8a16-channel": {"weights": WHOLE},
    "w8a8-token": {"weights": WHOLE, "input_activations": TOKENS},
    "w8a8-static-asymmetric": {"weights": WHOLE, "input_activations": STATIC},
}


def quantize(model: torch.nn.Module, scheme: dict[str, Any]) -> None:
    """Attach a scheme, with the scales of the least and greatest weights and inputs."""
    group = QuantizationScheme(targets=["Linear"], **scheme)
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    ranges = input_ranges(model)
    apply_quantization_config(model, config)
    for name, module in model.named_modules():
        if not hasattr(module, "weight_scale"):
            continue
        args = module.quantization_scheme.weights
        size = args.group_size or module.weight.shape[1]
        pieces = module.weight.detach().unflatten(1, (-1, size))
        scale, zero = calculate_qparams(pieces.amin(-1), pieces.amax(-1), args)
        # A scale that float16 holds, as checkpoints of 16-bit models have.
        module.weight_scale.data.copy_(scale.half())
        if not args.symmetric:
            module.weight_zero_point.data.copy_(zero)
        if hasattr(module, "input_scale"):
            inputs = module.quantization_scheme.input_activations
            scale, zero = calculate_qparams(*ranges[name], inputs)
            module.input_scale.data.copy_(scale)
            module.input_zero_point.data.copy_(zero)


@torch.inference_mode()
def input_ranges(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the least and the greatest input of each linear over the prompts."""
    found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = found.get(name, (torch.zeros(1), torch.zeros(1)))
            found[name] = (
                torch.minimum(low, inputs[0].min()),
                torch.maximum(high, inputs[0].max()),
            )

        return hook

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears]
    for prompt in PROMPTS:
        model(torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    return found


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Return the tokens that the tool's own forward pass gives."""
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def main() -> None:
    """Write the folders."""
    for name, scheme in SCHEMES.items():
        with tempfile.TemporaryDirectory() as folder:
            tiny_llama.write_folder(Path(folder), model_type="llama")
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        quantize(model, scheme)
        expected = {"prompts": PROMPTS, "tokens": [greedy(model, prompt) for prompt in PROMPTS]}
        compressor = ModelCompressor.from_pretrained_model(model)
        compressor.compress_model(model)
        target = TARGET / name
        model.save_pretrained(target)
        compressor.update_config(target)
        (target / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main()
