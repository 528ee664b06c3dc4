"""Mixtures whose experts are packed: tokens of the dequantized model, and what is made wide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
import transformers
from naive_packing import awq_tensors, gptq_tensors, groups_of, round_weight
from safetensors.torch import load_file, save_file
from test_int8_checkpoints import WEIGHTS as INT8_WEIGHTS
from test_int8_checkpoints import config as int8_config
from test_int8_checkpoints import encoded as int8_encoded
from test_pack_quantized import config as pack_config
from test_pack_quantized import tensors_of as pack_tensors
from test_packed_checkpoints import AWQ, GPTQ, greedy
from torch import Tensor

from quire.errors import CheckpointError, ConfigError
from quire.interfaces.quantization import ExpertsSpec
from quire_kernels.packed.experts import StackedWeight, widen, widen_in_pytorch
from quire_quant.packed import pack

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "eos_token_id": None,
}
QWEN = {"num_experts": 5, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "head_dim": 16}
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 16},
    **{"qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 32, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
}
FAMILIES = {
    "deepseek": ("DeepseekV3", {**SIZES, **LATENT}),
    "qwen3": ("Qwen3Moe", {**SIZES, **QWEN}),
    "mixtral": ("Mixtral", {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen2": ("Qwen2Moe", {**SIZES, **QWEN, "shared_expert_intermediate_size": 32}),
}
DESC = {**GPTQ, "desc_act": True}
PACK = pack_config(ignore=("lm_head", r"re:.*mlp\.gate$"))
INT8 = int8_config(ignore=("lm_head", r"re:.*gate$", "re:.*attn"))
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("qwen3", GPTQ),
    "gptq, 3 bits, an order of its own each": ("qwen3", {**DESC, "bits": 3}),
    "gptq, 8 bits": ("qwen2", {**GPTQ, "bits": 8, "sym": True}),
    "gptq, without g_idx": ("mixtral", {**GPTQ, "desc_act": False, "sym": True}),
    "gptq, experts alone": ("qwen3", {**GPTQ, "dynamic": {"-:.*attn": {}}}),
    "awq": ("qwen2", AWQ),
    "awq, attention alone": ("mixtral", {**AWQ, "modules_to_not_convert": ["experts", "gate"]}),
    "awq, a router's name is part of others": (
        "qwen3",
        {**AWQ, "modules_to_not_convert": ["gate"]},
    ),
    "pack-quantized": ("qwen3", PACK),
    "int8, inputs by token": ("mixtral", INT8),
    "awq, latents": ("deepseek", AWQ),
    "gptq, latents": ("deepseek", {**DESC, "bits": 8}),
}
LINEARS = ("_proj", "w1", "w2", "w3", "kv_a_proj_with_mqa")


def is_packed(name: str, config: dict[str, Any]) -> bool:
    """Tools leave routers, embeddings and heads alone."""
    is_linear = name.endswith(tuple(f"{end}.weight" for end in LINEARS))
    is_out = ("dynamic" in config or config is INT8) and "attn" in name
    is_out |= "experts" in config.get("modules_to_not_convert", ()) and "experts" in name
    return is_linear and not is_out


def packed_tensors(name: str, weight: Tensor, config: dict[str, Any]) -> tuple[Any, Tensor]:
    """Return a projection's tensors, and what they stand for."""
    if config is INT8:
        code = int8_encoded(weight, {"weights": INT8_WEIGHTS, "input_activations": None}, 1.0)
        return code.tensors, code.weight.float()
    seed = sum(name.encode()) if config.get("desc_act") else None
    groups = groups_of(weight.shape[1], 32, shuffled=seed)
    symmetric = config.get("sym", False)
    rounded = round_weight(weight, config.get("bits", 4), groups, symmetric=symmetric)
    if config["quant_method"] == "compressed-tensors":
        tensors = pack_tensors(rounded, symmetric=False, has_order=False)
    elif config["quant_method"] == "awq":
        tensors = awq_tensors(rounded)
    else:
        tensors = gptq_tensors(rounded)
        if config.get("desc_act") is False:
            del tensors["g_idx"]
    return tensors, rounded.weight.float()


def write(folder: Path, family: str, config: dict[str, Any]) -> tuple[Path, Path]:
    """Write a mixture in a format, and the same with its weights dequantized."""
    name, sizes = FAMILIES[family]
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForCausalLM")
    model = model(getattr(transformers, f"{name}Config")(**sizes))
    packed, plain = folder / "packed", folder / "plain"
    for each in (packed, plain):
        model.save_pretrained(each)
    stored = load_file(plain / "model.safetensors")
    exact = dict(stored)
    for name in [name for name in stored if is_packed(name, config)]:
        tensors, exact[name] = packed_tensors(name, stored.pop(name), config)
        module = name.removesuffix(".weight")
        stored.update({f"{module}.{key}": tensor for key, tensor in tensors.items()})
    save_file(stored, packed / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    file = packed / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return packed, plain


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_the_dequantized_model(tmp_path: Path, case: str) -> None:
    packed, plain = write(tmp_path, *CASES[case])

    options = {"attention_backend": "reference"} if "latents" in case else {}
    assert greedy(packed, **options) == greedy(plain, **options)


@pytest.mark.parametrize("quantization", ["int4", "int8-weight-only"])
def test_on_the_fly_experts_take_what_is_told(tmp_path: Path, quantization: str) -> None:
    _, plain = write(tmp_path, "qwen3", GPTQ)
    engine = tiny_llama.make_engine(plain, quantization=quantization)
    held = sum(p.numel() * p.element_size() for p in engine.runner.model.parameters())
    experts = [m for n, m in engine.runner.model.named_modules() if n.endswith("mlp.experts")]

    assert engine.layout.budget.weights == held
    assert all(p.dtype != torch.float32 for e in experts for p in e.parameters())
    requests = [tiny_llama.request(0, [1, 2, 3])]
    assert len(tiny_llama.run_all(engine, requests)[0]["r0", 0]) == 12


def test_random_weights_are_served(tmp_path: Path) -> None:
    packed, _ = write(tmp_path, "qwen2", {**GPTQ, "dynamic": {}})

    tokens = greedy(packed, load_format="dummy")

    assert [len(found) for found in tokens.values()] == [12, 12, 12]


def changed(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.1.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(f"{UP}.scales"), f"1 missing: {UP}.scales"),
        (lambda t: t[f"{UP}.scales"][1].fill_(float("nan")), f"{UP}.scales' holds NaN"),
        (lambda t: t[f"{UP}.g_idx"].fill_(7), f"{UP}.g_idx' names group 7"),
        (lambda t: t.update({f"{UP}.qzeros": torch.zeros(2, 3).int()}), rf"{UP}.qzeros \[2, 3\]"),
    ],
)
def test_damage_of_one_expert_is_named(tmp_path: Path, change: Any, words: str) -> None:
    packed, _ = write(tmp_path, "qwen3", GPTQ)
    changed(packed, change)

    with pytest.raises(CheckpointError, match=words):
        tiny_llama.make_engine(packed)


def test_experts_that_differ_are_refused_by_name(tmp_path: Path) -> None:
    config = {**GPTQ, "dynamic": {r"+:.*experts\.2\..*": {"bits": 8}}}
    packed, _ = write(tmp_path, "qwen3", config)

    words = r"layers\.0\.mlp\.experts'.*alike, and .*experts\.2\.gate_up_proj' is not"
    with pytest.raises(ConfigError, match=words):
        tiny_llama.make_engine(packed)


def spec_of(**changes: Any) -> ExpertsSpec:
    given = {"name": "mlp.experts", "num_experts": 3, "dtype": "float32", "device": "cpu"}
    return ExpertsSpec(**given, hidden_size=64, intermediate_size=32, top_k=2, **changes)


@pytest.mark.parametrize("has_order", [False, True])
@pytest.mark.parametrize("chosen", [None, [2, 0, 2, 1]])
@pytest.mark.parametrize(("bits", "dtype"), [(2, "float32"), (3, "bfloat16"), (4, "float16")])
def test_kernel_makes_wide_what_pytorch_does(
    bits: int, dtype: str, chosen: list[int] | None, has_order: bool
) -> None:
    kernel = pytest.importorskip("quire_kernels.packed.experts_kernel")
    from kernel_cases import DEVICE

    torch.manual_seed(bits)
    outputs, inputs, group = 40, 288, {2: 96, 3: 24, 4: 32}[bits]
    codes = torch.randint(0, 2**bits, (3, outputs, inputs), dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, (3, inputs // group, outputs), dtype=torch.uint8)
    orders = torch.stack([torch.stack([torch.randperm(inputs) for _ in range(2)]) for _ in "123"])
    weight = StackedWeight(
        values=pack(codes, bits).to(DEVICE),
        scales=torch.rand(3, inputs // group, outputs).half().to(DEVICE),
        zeros=pack(zeros, bits).to(DEVICE),
        columns=orders.int().to(DEVICE) if has_order else None,
        bits=bits,
        group_size=group,
    )
    ids = None if chosen is None else torch.tensor(chosen, device=DEVICE)

    found = kernel.widen(weight, ids, getattr(torch, dtype))

    assert torch.equal(found, widen_in_pytorch(weight, ids, getattr(torch, dtype)))


@pytest.mark.parametrize("case", ["gptq, 3 bits, an order of its own each", "awq"])
def test_what_is_made_wide_is_what_is_multiplied(tmp_path: Path, case: str) -> None:
    """So that the products on a GPU, of weights made wide, are those on a CPU."""
    packed, plain = write(tmp_path, *CASES[case])
    model = tiny_llama.make_engine(packed).runner.model
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.experts"))
    exact = load_file(plain / "model.safetensors")

    for kind, parts in (("gate_up", ("gate_proj", "up_proj")), ("down", ("down_proj",))):
        found = widen(layer.method._weight(layer, kind), torch.tensor([3, 1]), torch.float32)
        for number, expert in enumerate((3, 1)):
            names = [f"model.layers.1.mlp.experts.{expert}.{part}.weight" for part in parts]
            assert torch.allclose(found[number], torch.cat([exact[n] for n in names]), rtol=1e-6)
