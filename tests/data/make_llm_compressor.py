"""Make `llm_compressor`: a tiny Llama that llm-compressor calibrated, wrote and ran.

Run with `pip install llmcompressor==0.8.1`: python tests/data/make_llm_compressor.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

TARGET = Path(__file__).with_name("llm_compressor")
sys.path.insert(0, str(Path(__file__).parents[1] / "core"))

import tiny_llama  # noqa: E402 - found by the line above

PROMPTS = [tiny_llama.prompt(number, 9) for number in range(4)]
NUM_TOKENS = 16
WEIGHTS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}


def scheme(**weights: Any) -> dict[str, Any]:
    """Return the groups of a scheme."""
    return {"group_0": {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}}}


MODIFIERS = {
    "gptq-order-of-groups": GPTQModifier(
        config_groups=scheme(symmetric=True, actorder="group"), ignore=["lm_head"]
    ),
    "awq": AWQModifier(config_groups=scheme(symmetric=False), ignore=["lm_head"]),
}


@torch.inference_mode()
def greedy(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    """Return the tokens that the tool's own forward pass gives."""
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def quantize(folder: Path, modifier: Any, target: Path) -> None:
    """Calibrate, run and write the model of a folder."""
    samples = [tiny_llama.prompt(100 + number, 64) for number in range(32)]
    masks = [[1] * len(sample) for sample in samples]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(folder),  # asked for, but not used
        dataset=Dataset.from_dict({"input_ids": samples, "attention_mask": masks}),
        recipe=[modifier],
        max_seq_length=64,
        num_calibration_samples=len(samples),
    )
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            # A scale that float16 holds, as checkpoints of 16-bit models have.
            module.weight_scale.data.copy_(module.weight_scale.half())
    expected = {"prompts": PROMPTS, "tokens": [greedy(model, prompt) for prompt in PROMPTS]}
    model.save_pretrained(target, save_compressed=True)
    (target / "expected.json").write_text(json.dumps(expected) + "\n")


def main() -> None:
    """Write the folders."""
    for name, modifier in MODIFIERS.items():
        with tempfile.TemporaryDirectory() as text:
            folder, target = Path(text) / "model", TARGET / name
            folder.mkdir()
            tiny_llama.write_folder(folder, model_type="llama")
            tiny_llama.write_tokenizer(folder)
            quantize(folder, modifier, Path(text) / "out")
            target.mkdir(parents=True, exist_ok=True)
            for file in ("config.json", "model.safetensors", "expected.json"):
                (target / file).write_bytes((Path(text) / "out" / file).read_bytes())


if __name__ == "__main__":
    main()
