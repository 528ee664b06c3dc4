"""What a quantization_config says is read, or refused with the key and what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
from e4m3_oracle import (
    BLOCK_STRUCTURE,
    FORMS,
    GROUP,
    MODELOPT,
    STATIC,
    TOKEN,
    compressed,
    hugging_face,
)

from quire.errors import ConfigError
from quire.hooks.registry import load_plugins
from quire.hooks.selection import select_quantization
from quire.interfaces.quantization import EmbeddingSpec, KVCacheSpec, LinearSpec
from quire_quant.fp8.method import Fp8

CHANNEL = {"strategy": "channel"}


def spec_of(name: str, *parts: str, device: str = "cpu") -> LinearSpec:
    return LinearSpec(
        name=name,
        parts=parts or (name.rpartition(".")[2],),
        in_features=8,
        output_sizes=(4,) * max(1, len(parts)),
        bias=False,
        dtype="bfloat16",
        device=device,
    )


def head(name: str = "lm_head", *, is_head: bool = True) -> EmbeddingSpec:
    return EmbeddingSpec(
        name=name,
        num_embeddings=4,
        embedding_dim=8,
        is_head=is_head,
        dtype="bfloat16",
        device="cpu",
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; fp8 reads fp8, fbgemm_fp8, modelopt"),
        (hugging_face(fmt="e5m2"), "fmt is 'e5m2'; fp8 reads 'e4m3'"),
        (hugging_face(scale_fmt="e4m3"), "scale_fmt is 'e4m3'"),
        (hugging_face(activation_scheme="none"), "activation_scheme is 'none'"),
        (hugging_face(weight_block_size=[128]), r"weight_block_size is \[128\]; expected"),
        (hugging_face(weight_block_size=[128, 0]), r"weight_block_size is \[128, 0\]"),
        (
            hugging_face(weight_block_size=[128, 128], activation_scheme="static"),
            "blocks come with 'dynamic' alone",
        ),
        (hugging_face(modules_to_not_convert="lm_head"), "modules_to_not_convert is 'lm_head'"),
        ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 0}, "activation_scale_ub is 0"),
        ({**MODELOPT, "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4'; fp8 reads 'FP8'"),
        (
            compressed(CHANNEL, TOKEN, format="pack-quantized"),
            "format is 'pack-quantized'; this method reads 'float-quantized'",
        ),
        (compressed(CHANNEL, TOKEN, transform_config={"a": 1}), "transform_config and"),
        (compressed(CHANNEL, TOKEN, sparsity_config={"format": "sparse-24"}), "sparsity_config"),
        (compressed(CHANNEL, TOKEN, config_groups={}), "config_groups is {}"),
        (compressed({**CHANNEL, "num_bits": 4}, TOKEN), "weights: num_bits is 4; fp8 reads 8"),
        (compressed({**CHANNEL, "type": "int"}, TOKEN), "weights: type is 'int'"),
        (compressed({"strategy": "group"}, TOKEN), "weights: strategy is 'group'; fp8 reads"),
        (
            compressed(CHANNEL, {**STATIC, "dynamic": True}),
            "input_activations: strategy is 'tensor'; fp8 reads 'token' or 'group'",
        ),
        (compressed(CHANNEL, {**TOKEN, "dynamic": "local"}), "dynamic is 'local'"),
        (compressed(BLOCK_STRUCTURE, {**GROUP, "group_size": 64}), "group_size is 64"),
        (compressed({"strategy": "block"}, GROUP), "block_structure is None"),
    ],
)
def test_config_that_cannot_be_served_names_its_key(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Fp8(config)


@pytest.mark.parametrize(
    ("config", "excluded"),
    [
        (hugging_face(modules_to_not_convert=["model.layers.1.mlp"]), True),
        (hugging_face(modules_to_not_convert=["down_proj"]), True),
        (hugging_face(ignored_layers=["re:.*down_proj"]), True),
        (hugging_face(ignored_layers=["re:down_proj"]), False),
        (hugging_face(modules_to_not_convert=["layers.1.mlp.down"]), False),
        (hugging_face(modules_to_not_convert=["model.layers.11"]), False),
        ({**MODELOPT, "exclude_modules": ["model.layers.1.*"]}, True),
        ({**MODELOPT, "exclude_modules": ["model.layers.1"]}, True),
        ({**MODELOPT, "exclude_modules": ["lm_head"]}, False),
        (compressed(CHANNEL, TOKEN, ignore=["model.layers.1.mlp.down_proj"]), True),
        (compressed(CHANNEL, TOKEN, ignore=["re:.*mlp.*"]), True),
        (compressed(CHANNEL, TOKEN, ignore=["mlp"]), False),
    ],
)
def test_excluded_names_are_read_as_each_tool_means_them(
    config: dict[str, Any], excluded: bool
) -> None:
    found = Fp8(config).method_for(spec_of("model.layers.1.mlp.down_proj"))

    assert (found is None) == excluded


def test_expression_that_does_not_compile_is_told() -> None:
    method = Fp8(compressed(CHANNEL, TOKEN, ignore=["re:*"]))

    with pytest.raises(ConfigError, match=r"'re:\*' is not a regular expression"):
        method.method_for(spec_of("a.o"))


def test_projections_that_are_kept_apart_are_refused_by_name() -> None:
    method = Fp8(hugging_face(modules_to_not_convert=["k_proj"]))

    reason = method.why_unsupported(spec_of("a.qkv_proj", "q_proj", "k_proj"))

    assert "a.q_proj: a scale a tensor, a.k_proj: not quantized" in str(reason)


@pytest.mark.parametrize("name", FORMS)
def test_head_is_kept_as_the_format_says(name: str) -> None:
    config = {**FORMS[name].config}
    for key in ("ignore", "exclude_modules", "modules_to_not_convert"):
        config.pop(key, None)
    has_heads = config["quant_method"] in ("modelopt", "compressed-tensors")

    assert (Fp8(config).method_for(head()) is not None) == has_heads
    assert Fp8(config).method_for(head("model.embed_tokens", is_head=False)) is None


def test_head_that_is_excluded_stays_in_the_models_dtype() -> None:
    assert Fp8(MODELOPT).method_for(head()) is None
    assert Fp8(FORMS["compressed-token"].config).method_for(head()) is None
    assert Fp8({}).method_for(head()) is None


def test_other_devices_and_layers_are_refused_with_what_serves() -> None:
    cache = KVCacheSpec(name="c", num_kv_heads=1, head_dim=4, kv_dtype="float32")

    assert Fp8({}).why_unsupported(spec_of("a.o")) is None
    assert "cpu and cuda, not on mps" in str(Fp8({}).why_unsupported(spec_of("a.o", device="mps")))
    assert "KVCacheSpec" in str(Fp8({}).why_unsupported(cache))


@pytest.mark.parametrize(
    "quant_method", ["fp8", "fbgemm_fp8", "modelopt", "compressed-tensors:float-quantized"]
)
def test_formats_are_claimed(quant_method: str) -> None:
    plugin, _ = select_quantization(load_plugins(), None, quant_method)

    assert plugin.name == "fp8"


def test_compressed_format_that_nobody_reads_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"'compressed-tensors:strange'.*float-quantized, "):
        select_quantization(load_plugins(), None, "compressed-tensors:strange")
