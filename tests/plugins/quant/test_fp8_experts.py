"""Experts in e4m3: every scheme that checkpoints have, and on the fly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from torch import Tensor

from quire import LLM, SamplingParams
from quire.benchmark.engine_bench import _model_work
from quire.errors import CheckpointError, ConfigError
from quire.interfaces.quantization import ExpertsSpec, LinearSpec
from quire.layers.experts import Experts
from quire.layers.places import places_of_layer
from quire_quant.fp8.method import Fp8

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 40}
PARTS = ("gate_proj", "up_proj", "down_proj")
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 32]}


def compressed(by: str, **inputs: Any) -> dict[str, Any]:
    number = {"type": "float", "num_bits": 8, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": by, "dynamic": False},
        "input_activations": {**number, **inputs} if inputs else None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


CONFIGS = {
    "blocks": BLOCKS,
    "a scale a projection": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "a scale an output": compressed("channel", strategy="token", dynamic=True),
    "weights alone": compressed("channel"),
    "static": compressed("tensor", strategy="tensor", dynamic=False),
}


def spec_of(**changes: Any) -> ExpertsSpec:
    given = {"name": "mlp.experts", "num_experts": 3, "dtype": "bfloat16", "device": "cpu"}
    return ExpertsSpec(**{**given, **SIZES, "top_k": 2, **changes})


def filled(config: dict[str, Any]) -> tuple[Experts, dict[str, Tensor]]:
    """A layer with random weights and scales, and the tensors by their names."""
    method = Fp8(config).method_for(spec_of())
    layer = Experts(spec_of(), method)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, place in places_of_layer(layer):
        view = place.view()
        drawn = torch.rand(view.shape, generator=generator) + 0.1
        if not name.endswith("scale") and not name.endswith("scale_inv"):
            drawn = torch.randn(view.shape, generator=generator)
        view.copy_(drawn.to(view.dtype))
        tensors[name] = view.clone()
    return layer, tensors


def dequantized(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return a projection in float64, by what its format says."""
    values = tensors[f"{name}.weight"].double()
    if (blocks := tensors.get(f"{name}.weight_scale_inv")) is not None:
        tall = blocks.repeat_interleave(16, 0)[: len(values)]
        return values * tall.repeat_interleave(32, 1)[:, : values.shape[1]].double()
    return values * tensors[f"{name}.weight_scale"].double()


@pytest.mark.parametrize("config", CONFIGS)
def test_experts_of_a_checkpoint_are_multiplied_with_their_scales(config: str) -> None:
    layer, tensors = filled(CONFIGS[config])
    size = sum(p.nbytes for p in layer.parameters())
    promised = layer.method.loaded_bytes(layer)
    layer.finish_loading()
    assert promised == sum(p.nbytes for p in layer.parameters())
    assert promised >= size
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids = torch.tensor([[0, 2], [2, 1], [2, 0], [2, 1], [1, 0]])
    shares = torch.rand(5, 2, generator=torch.Generator().manual_seed(2))

    found = layer(x, shares, ids)

    for row in range(5):
        exact = torch.zeros(64, dtype=torch.float64)
        for share, expert in zip(shares[row], ids[row].tolist(), strict=True):
            gate, up, down = (dequantized(tensors, f"mlp.experts.{expert}.{p}") for p in PARTS)
            wide = x[row].double()
            exact += share * (down @ (torch.nn.functional.silu(gate @ wide) * (up @ wide)))
        assert (found[row] - exact).abs().max() <= 2**-7 * exact.abs().max()


def test_scale_of_zero_is_named() -> None:
    layer, _ = filled(BLOCKS)
    layer.get_weight("gate_up_weight_scale_inv").data[1, -1, 1] = 0.0

    with pytest.raises(CheckpointError, match=r"mlp\.experts\.1\.up_proj\.weight_scale_inv'.* 0;"):
        layer.finish_loading()


def test_static_scale_of_inputs_that_is_nan_is_named() -> None:
    layer, _ = filled(CONFIGS["static"])
    layer.get_weight("down_input_scale").data[2] = float("nan")

    with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj\.input_scale'.* nan;"):
        layer.finish_loading()


REFUSED = {
    "power of two": {**BLOCKS, "weight_block_size": [128, 48]},
    "keeps them apart": {**BLOCKS, "modules_to_not_convert": ["mlp.experts.2.up_proj"]},
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_served_is_refused_with_its_reason(words: str) -> None:
    assert words in str(Fp8(REFUSED[words]).why_unsupported(spec_of()))


def test_excluded_experts_and_routers_made_on_the_fly_are_left_alone() -> None:
    left = Fp8({**BLOCKS, "modules_to_not_convert": ["mlp.experts"]})
    router = LinearSpec(
        name="model.layers.0.mlp.gate",
        in_features=8,
        output_sizes=(4,),
        parts=(),
        bias=False,
        dtype="float32",
        device="cpu",
    )

    assert left.why_unsupported(spec_of()) is None
    assert left.method_for(spec_of()) is None
    assert Fp8({}).method_for(router) is None


def test_mixture_runs_with_experts_rounded_at_load(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=1)
    prompt: Any = {"prompt_token_ids": list(range(3, 40))}
    found = []

    for method in ("none", "fp8"):
        llm = LLM(str(tmp_path), quantization=method, **tiny_llama.OPTIONS)
        answer = llm.generate([prompt], params, use_tqdm=False)[0].outputs[0]
        # A token reads two experts of six.
        assert 0 < _model_work(llm).weight_bytes < llm.engine.layout.budget.weights
        found.append([next(iter(one.values())).logprob for one in answer.logprobs or ()])

    assert len(found[1]) == 8
    assert abs(found[0][0] - found[1][0]) < 0.1
    assert found[0] != found[1]


def test_method_that_has_no_experts_says_so_by_the_layers_name(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=101,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        max_position_embeddings=128,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)

    with pytest.raises(ConfigError, match=r"block_sparse_moe\.experts"):
        LLM(str(tmp_path), quantization="int8", **tiny_llama.OPTIONS)
