"""Whole checkpoints in each format: tokens of the dequantized model, files of other tools, damage.

`tests/data/packed_weights` has layers that GPTQModel and AutoAWQ wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from naive_packing import Rounded, awq_tensors, gptq_tensors, groups_of, round_weight
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import LayerMethod, LinearSpec
from quire.layers.linear import Linear
from quire.testing.quantization_cases import load
from quire_quant.awq.method import Awq
from quire_quant.gptq.method import Gptq

TOOLS = Path(__file__).parents[2] / "data" / "packed_weights"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
Change = Callable[[str, Tensor], dict[str, Tensor]]
CONFIGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq, 2 bits": {**GPTQ, "bits": 2},
    "gptq, 3 bits": {**GPTQ, "bits": 3},
    "gptq, 8 bits": {**GPTQ, "bits": 8},
    "gptq, symmetric": {**GPTQ, "sym": True},
    "gptq, desc_act": {**GPTQ, "desc_act": True},
    "gptq, 3 bits, desc_act": {**GPTQ, "bits": 3, "desc_act": True},
    "gptq, whole rows": {**GPTQ, "group_size": -1},
    "gptq, version 2": {**GPTQ, "checkpoint_format": "gptq_v2", "desc_act": True},
    "gptq, head too": {**GPTQ, "lm_head": True},
    "gptq, MLP alone": {**GPTQ, "dynamic": {"-:.*self_attn.*": {}}},
    "awq": AWQ,
    "awq, whole rows": {**AWQ, "group_size": -1},
    "awq, attention alone": {**AWQ, "modules_to_not_convert": ["mlp"]},
}


def is_quantized(name: str, config: Mapping[str, Any]) -> bool:
    if name.startswith("lm_head"):
        return bool(config.get("lm_head"))
    alone = "mlp" if "modules_to_not_convert" in config else "self_attn"
    if "dynamic" in config or "modules_to_not_convert" in config:
        return "_proj" in name and alone not in name
    return "_proj" in name


def rounded_of(name: str, weight: Tensor, config: Mapping[str, Any]) -> Rounded:
    """Round a tensor; with desc_act every projection has an order of its own."""
    seed = sum(name.encode()) if config.get("desc_act") else None
    groups = groups_of(weight.shape[1], config["group_size"], shuffled=seed)
    return round_weight(weight, config["bits"], groups, symmetric=config.get("sym", False))


def tensors_of(rounded: Rounded, config: Mapping[str, Any]) -> dict[str, Tensor]:
    if config["quant_method"] == "awq":
        return awq_tensors(rounded)
    version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
    return gptq_tensors(rounded, version=version)


def write_pair(folder: Path, config: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write a quantized tiny Llama and the same with its weights dequantized."""
    packed, plain = folder / "packed", folder / "plain"
    for each, keys in ((packed, {"quantization_config": config}), (plain, {})):
        each.mkdir()
        tiny_llama.write_folder(each, **SIZES, **keys)
    tensors = load_file(plain / "model.safetensors")
    dequantized = dict(tensors)
    for name in [name for name in tensors if is_quantized(name, config)]:
        rounded = rounded_of(name, tensors.pop(name), config)
        dequantized[name] = rounded.weight.float()
        module = name.removesuffix(".weight")
        tensors.update({f"{module}.{k}": t for k, t in tensors_of(rounded, config).items()})
    save_file(tensors, packed / "model.safetensors")
    save_file(dequantized, plain / "model.safetensors")
    return packed, plain


def greedy(folder: Path, **options: Any) -> dict[tuple[str, int], list[int]]:
    requests = [tiny_llama.request(i, tiny_llama.prompt(i, n)) for i, n in enumerate((1, 5, 17))]
    return tiny_llama.run_all(tiny_llama.make_engine(folder, **options), requests)[0]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_greedy_tokens_are_those_of_the_dequantized_model(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    packed, plain = write_pair(tmp_path, config)

    assert greedy(packed) == greedy(plain)


def test_greedy_tokens_of_int4_are_those_of_the_model_rounded_before(tmp_path: Path) -> None:
    plain, rounded = tmp_path / "plain", tmp_path / "rounded"
    for each in (plain, rounded):
        each.mkdir()
        tiny_llama.write_folder(each, **SIZES)
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        inputs = tensors[name].shape[1]
        groups = groups_of(inputs, 64 if inputs == 64 else 32)
        tensors[name] = round_weight(tensors[name], 4, groups).weight.float()
    save_file(tensors, rounded / "model.safetensors")

    assert greedy(plain, quantization="int4") == greedy(rounded)


@pytest.mark.parametrize("name", ["gptq, 3 bits, desc_act", "awq"])
def test_random_weights_are_served(tmp_path: Path, name: str) -> None:
    folder = tiny_llama.write_folder(tmp_path, **SIZES, quantization_config=CONFIGS[name])

    tokens = greedy(folder, load_format="dummy")

    assert [len(found) for found in tokens.values()] == [12, 12, 12]


DAMAGES: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (
        "gptq",
        lambda t: t.pop("model.layers.1.mlp.up_proj.scales"),
        r"1 missing: model\.layers\.1\.mlp\.up_proj\.scales",
    ),
    "zeros of another shape": (
        "awq",
        lambda t: t.update({"model.layers.0.self_attn.q_proj.qzeros": torch.zeros(2, 9).int()}),
        r"q_proj\.qzeros \[2, 9\] instead of \[2, 8\]",
    ),
    "NaN in scales": (
        "gptq",
        lambda t: t["model.layers.0.self_attn.k_proj.scales"][1].fill_(float("nan")),
        r"model\.layers\.0\.self_attn\.k_proj\.scales' holds NaN",
    ),
    "group out of range": (
        "gptq",
        lambda t: t["model.layers.1.mlp.gate_proj.g_idx"][7].fill_(9),
        r"model\.layers\.1\.mlp\.gate_proj\.g_idx' names group 9",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_refused_by_the_tensors_name(tmp_path: Path, damage: str) -> None:
    method, change, words = DAMAGES[damage]
    packed, _ = write_pair(tmp_path, CONFIGS[method])
    tensors = load_file(packed / "model.safetensors")
    change(tensors)
    save_file(tensors, packed / "model.safetensors")

    with pytest.raises(CheckpointError, match=words):
        tiny_llama.make_engine(packed)


def loaded_case(file: str, case: str, method: Any) -> tuple[Linear, Tensor]:
    """Return a layer filled from a tool's file, and the weight that the tool reads."""
    tensors = load_file(TOOLS / f"{file}.safetensors")
    mine = {k.removeprefix(f"{case}."): t for k, t in tensors.items() if k.startswith(f"{case}.")}
    spec = LinearSpec(
        name="o_proj",
        parts=("o_proj",),
        in_features=64,
        output_sizes=(32,),
        bias=False,
        dtype="float32",
        device="cpu",
    )
    chosen: LayerMethod = method.method_for(spec)
    layer = Linear(spec, chosen)
    weight = mine.pop("weight")
    load(layer, {f"o_proj.{name}": tensor for name, tensor in mine.items()})
    layer.finish_loading()
    return layer, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_layer_that_gptqmodel_wrote_is_read_as_it_reads_it(bits: int, version: int) -> None:
    written = "gptq" if version == 1 else "gptq_v2"
    config = {**GPTQ, "bits": bits, "desc_act": True, "checkpoint_format": written}

    layer, weight = loaded_case("gptqmodel", f"bits{bits}.v{version}", Gptq(config))

    found = layer.method.dequantize(layer)
    # GPTQModel multiplies in float16.
    assert (found - weight).abs().max() <= 2**-11 * weight.abs().max()


def test_layer_that_autoawq_wrote_is_read_as_it_reads_it() -> None:
    layer, weight = loaded_case("autoawq", "bits4", Awq(AWQ))

    assert torch.equal(layer.method.dequantize(layer), weight)


def test_files_of_other_tools_have_weights_of_every_size() -> None:
    """Or a wrong zero point or order would go unseen."""
    tensors = load_file(TOOLS / "gptqmodel.safetensors")
    weights = [tensor for name, tensor in tensors.items() if name.endswith(".weight")]

    assert len(weights) == 8
    assert all(len(weight.unique()) > 60 for weight in weights)
