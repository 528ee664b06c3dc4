"""Whole checkpoints in e4m3: greedy tokens of a tiny Llama, and what loading takes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from attrs import evolve
from e4m3_oracle import FORMS, Form
from load_and_measure import HIDDEN, NUM_LAYERS, tensor_shapes
from safetensors.torch import load_file, save_file
from safetensors_files import entry, file_bytes
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from quire.cli.main import main
from quire.errors import CheckpointError, ConfigError

MADE_BY_THE_TOOL = Path(__file__).parents[2] / "data/compressed_fp8"
LENGTHS = (3, 9, 20)
MIB = 1 << 20


def quantize(folder: Path, form: Form, **config: Any) -> dict[str, Tensor]:
    """Rewrite a folder in a format; return every tensor as it then counts, float64."""
    file = folder / "model.safetensors"
    stored, exact = {}, {}
    for name, tensor in load_file(file).items():
        exact[name] = tensor.double()
        stored[name] = tensor
        if name.endswith("_proj.weight"):
            code = form.encode(tensor)
            prefix = name.removesuffix("weight")
            stored |= {prefix + key: value for key, value in code.tensors.items()}
            exact[name] = code.weight
    save_file(stored, file)
    change_config(folder, quantization_config={**form.config, **config})
    return exact


def change_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


class RoundedLinear(nn.Linear):
    """A product of inputs that a format rounds."""

    form: Form

    def forward(self, x: Tensor) -> Tensor:
        """Return the product in float64."""
        rows = self.form.rounded_input(x.flatten(0, -2).float())
        return functional.linear(rows, self.weight).view(*x.shape[:-1], -1)


@torch.inference_mode()
def oracle_tokens(exact: dict[str, Tensor], form: Form, prompts: list[list[int]]) -> Any:
    """Return the greedy tokens of Transformers' Llama in float64 with those weights."""
    keys = {k: v for k, v in tiny_llama.CONFIG.items() if k not in ("architectures", "dtype")}
    model = LlamaForCausalLM(LlamaConfig(**keys)).double().eval()
    model.load_state_dict(exact)
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.__class__ = type("Rounded", (RoundedLinear,), {"form": form})
    found = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        found.append(tokens[len(prompt) :])
    return found


def engine_tokens(folder: Path, prompts: list[list[int]], **options: Any) -> Any:
    engine = tiny_llama.make_engine(folder, **options)
    length = options.get("max_tokens", 12)
    requests = [tiny_llama.request(i, p, max_tokens=length) for i, p in enumerate(prompts)]
    tokens, _ = tiny_llama.run_all(engine, requests)
    held = sum(p.numel() * p.element_size() for p in engine.runner.model.parameters())
    assert engine.layout.budget.weights == held
    return [tokens[(f"r{i}", 0)] for i in range(len(prompts))]


@pytest.mark.parametrize("name", FORMS)
def test_greedy_tokens_are_those_of_the_dequantized_weights(tmp_path: Path, name: str) -> None:
    form = FORMS[name]
    if form.inputs == "static":
        form = evolve(form, input_scale=0.05)
    exact = quantize(tiny_llama.write_folder(tmp_path), form)
    prompts = [tiny_llama.prompt(i, length) for i, length in enumerate(LENGTHS)]

    assert engine_tokens(tmp_path, prompts) == oracle_tokens(exact, form, prompts)


def test_greedy_tokens_on_the_fly_are_those_of_the_quantized_weights(tmp_path: Path) -> None:
    form = FORMS["compressed-token"]
    folder = tiny_llama.write_folder(tmp_path)
    plain = load_file(folder / "model.safetensors")
    exact = {
        name: form.encode(t).weight if name.endswith("_proj.weight") else t.double()
        for name, t in plain.items()
    }
    prompts = [tiny_llama.prompt(i, length) for i, length in enumerate(LENGTHS)]

    found = engine_tokens(folder, prompts, quantization="fp8")

    assert found == oracle_tokens(exact, form, prompts)
    assert found != engine_tokens(folder, prompts), "quantization changes nothing here"


def test_checkpoint_of_compressed_tensors_gives_the_tokens_of_the_tool() -> None:
    expected = json.loads((MADE_BY_THE_TOOL / "expected.json").read_text())
    engine = tiny_llama.make_engine(MADE_BY_THE_TOOL)
    requests = [
        tiny_llama.request(i, prompt, max_tokens=len(expected["tokens"][i]))
        for i, prompt in enumerate(expected["prompts"])
    ]

    tokens, _ = tiny_llama.run_all(engine, requests)

    assert [tokens[(f"r{i}", 0)] for i in range(len(requests))] == expected["tokens"]


def test_dummy_weights_of_a_quantized_checkpoint_give_tokens(tmp_path: Path) -> None:
    quantize(tiny_llama.write_folder(tmp_path), FORMS["fp8-static"])
    (tmp_path / "model.safetensors").unlink()

    [tokens] = engine_tokens(tmp_path, [[1, 2, 3]], load_format="dummy")

    assert len(tokens) == 12


def test_dummy_weights_on_the_fly_give_tokens(tmp_path: Path) -> None:
    folder = tiny_llama.write_folder(tmp_path)

    [tokens] = engine_tokens(folder, [[1, 2, 3]], load_format="dummy", quantization="fp8")

    assert len(tokens) == 12


def test_missing_scale_is_named(tmp_path: Path) -> None:
    quantize(tiny_llama.write_folder(tmp_path), FORMS["fp8-blocks"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    del tensors[name]
    save_file(tensors, file)

    with pytest.raises(CheckpointError, match=f"1 missing: {name}"):
        tiny_llama.make_engine(tmp_path)


def test_scale_that_is_nan_is_named(tmp_path: Path) -> None:
    quantize(tiny_llama.write_folder(tmp_path), FORMS["modelopt"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.input_scale"
    tensors[name] = torch.tensor(math.nan)
    save_file(tensors, file)

    with pytest.raises(CheckpointError, match=f"'{name}' holds NaN"):
        tiny_llama.make_engine(tmp_path)


def test_scales_for_other_blocks_are_refused_with_both_shapes(tmp_path: Path) -> None:
    quantize(tiny_llama.write_folder(tmp_path), FORMS["fp8-blocks"], weight_block_size=[16, 16])

    with pytest.raises(CheckpointError, match=r"weight_scale_inv \[1, 1\] instead of \[2, 2\]"):
        tiny_llama.make_engine(tmp_path)


def test_full_precision_of_a_layer_that_is_not_excluded_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write_folder(tmp_path)
    change_config(folder, quantization_config=FORMS["fp8-tensor"].config)

    with pytest.raises(CheckpointError, match=r"14 missing: .*k_proj.weight_scale"):
        tiny_llama.make_engine(folder)


def test_unknown_algorithm_names_the_file_and_what_is_read(tmp_path: Path) -> None:
    folder = tiny_llama.write_folder(tmp_path)
    change_config(folder, quantization_config={"quant_method": "modelopt", "quant_algo": "W4A8"})

    with pytest.raises(ConfigError, match="quant_algo is 'W4A8'; fp8 reads 'FP8'"):
        tiny_llama.make_engine(folder)


def test_explain_shows_the_bytes_of_quantized_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_llama.write_folder(tmp_path)
    options = ["--skip-tokenizer-init", "--attention-backend", "sdpa"]
    shown = []
    for more in ([], ["--quantization", "fp8"]):
        assert main(["explain", str(folder), *options, *more]) == 0
        shown.append(next(s for s in capsys.readouterr().out.splitlines() if "weights" in s))

    # Two layers of 7,680 weights and 224 outputs.
    plain = 4 * (2 * 101 * 32 + 5 * 32)
    assert f"{(plain + 4 * 2 * 7680) / 1024:.1f} KiB" in shown[0]
    assert f"{(plain + 2 * (7680 + 4 * 224)) / 1024:.1f} KiB" in shown[1]


def test_loading_on_the_fly_takes_the_quantized_size_and_one_layer(tmp_path: Path) -> None:
    header, end = {}, 0
    for name, shape in tensor_shapes().items():
        begin, end = end, end + math.prod(shape) * 4
        header[name] = entry("F32", shape, begin, end)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file_bytes(header, b""))
    os.truncate(file, file.stat().st_size + end)
    script = Path(__file__).with_name("measure_fp8.py")

    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    wide_layer, constant = 3 * HIDDEN * HIDDEN * 4, 48 * MIB
    assert found["held"] == found["foretold"]
    assert found["after"] <= found["held"] + constant, found
    assert found["peak"] <= found["held"] + wide_layer + constant, found
    # Were all layers wide at once, or kept, it would be seen.
    assert 0.75 * NUM_LAYERS * wide_layer > wide_layer + constant
