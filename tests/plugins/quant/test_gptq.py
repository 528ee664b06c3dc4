"""GPTQ: the kit on every kind of checkpoint, what is left alone, and damaged ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from naive_packing import gptq_tensors, groups_of, round_weight
from torch import Tensor

from quire.errors import CheckpointError, ConfigError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    EncodedWeight,
    ExpertsSpec,
    LayerSpec,
    LinearSpec,
)
from quire.layers.linear import Linear
from quire.testing import QuantizationMethodTests
from quire.testing.quantization_cases import load
from quire_quant.gptq.method import Gptq

CONFIG = {"bits": 4, "group_size": 32, "desc_act": False, "sym": False}
EXCLUDED = ("model.layers.3.mlp.down_proj",)


class GptqTests(QuantizationMethodTests):
    """The kit on checkpoints that are written bit by bit."""

    method = Gptq

    def encode(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        config = self.config
        # Each projection in an order of its own.
        seed = int(weight.abs().sum() * 1000) if config.get("desc_act") else None
        groups = groups_of(weight.shape[1], config["group_size"], shuffled=seed)
        rounded = round_weight(weight, config["bits"], groups, symmetric=config.get("sym", False))
        version = 2 if config.get("checkpoint_format") == "gptq_v2" else 1
        return EncodedWeight(tensors=gptq_tensors(rounded, version=version), weight=rounded.weight)

    def weight_bytes(self, spec: LinearSpec) -> int | None:
        config, inputs, outputs = self.config, spec.in_features, spec.out_features
        size = inputs if config["group_size"] == -1 else config["group_size"]
        groups = inputs // size
        codes = (inputs + groups) * outputs * config["bits"] // 8
        orders = len(spec.parts) if config.get("desc_act") and groups > 1 else 0
        bias = outputs * (4 if spec.dtype == "float32" else 2) if spec.bias else 0
        return codes + 2 * groups * outputs + 4 * inputs * orders + bias


class TestGptq(QuantizationMethodTests):
    """As `quire plugins check` does it."""

    method = Gptq


class TestFourBits(GptqTests):
    config: ClassVar[Mapping[str, Any]] = {
        **CONFIG,
        "dynamic": {"-:.*layers\\.3\\.mlp": {}},
        "lm_head": True,
    }
    excluded = EXCLUDED


class TestFourBitsOnGPU(TestFourBits):
    pytestmark = pytest.mark.gpu
    device = "cuda"


class TestFourBitsInAnyOrderOnGPU(GptqTests):
    pytestmark = pytest.mark.gpu
    device = "cuda"
    config: ClassVar[Mapping[str, Any]] = {**CONFIG, "desc_act": True}


class TestThreeBitsInAnyOrder(GptqTests):
    config: ClassVar[Mapping[str, Any]] = {**CONFIG, "bits": 3, "desc_act": True}


class TestTwoBitsInAnyOrder(GptqTests):
    config: ClassVar[Mapping[str, Any]] = {
        **CONFIG,
        "bits": 2,
        "group_size": 16,
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
    }


class TestEightBitsOfWholeRows(GptqTests):
    config: ClassVar[Mapping[str, Any]] = {
        **CONFIG,
        "bits": 8,
        "group_size": -1,
        "sym": True,
        "desc_act": True,
        "checkpoint_format": "gptq_v2",
    }


def spec_of(sizes: tuple[int, ...] = (32, 64), in_features: int = 64) -> LinearSpec:
    return LinearSpec(
        name="model.layers.0.self_attn.fused" if len(sizes) > 1 else "model.layers.0.o_proj",
        parts=tuple("qkv"[i] + "_proj" for i in range(len(sizes))),
        in_features=in_features,
        output_sizes=sizes,
        bias=False,
        dtype="float32",
        device="cpu",
    )


def head_spec(*, is_head: bool) -> EmbeddingSpec:
    return EmbeddingSpec(
        name="lm_head" if is_head else "model.embed_tokens",
        num_embeddings=64,
        embedding_dim=64,
        is_head=is_head,
        dtype="float32",
        device="cpu",
    )


def tensors_of(spec: LinearSpec, config: Mapping[str, Any], shuffled: int | None) -> Any:
    """Return a layer's tensors by name, and its weight."""
    tensors, weights = {}, []
    for part, size in zip(spec.parts, spec.output_sizes, strict=True):
        generator = torch.Generator().manual_seed(size)
        weight = torch.randn(size, spec.in_features, generator=generator)
        groups = groups_of(spec.in_features, config["group_size"], shuffled=shuffled)
        rounded = round_weight(weight, config["bits"], groups)
        weights.append(rounded.weight)
        for name, tensor in gptq_tensors(rounded).items():
            tensors[f"model.layers.0.self_attn.{part}.{name}"] = tensor
    return tensors, torch.cat(weights)


def test_projections_in_one_order_keep_it_once() -> None:
    spec = spec_of()
    layer = Linear(spec, Gptq(CONFIG).method_for(spec))
    tensors, weight = tensors_of(spec, CONFIG, shuffled=3)
    load(layer, tensors)

    layer.finish_loading()

    assert tuple(layer.get_weight("input_order").shape) == (1, 64)
    assert torch.equal(layer.method.dequantize(layer).double(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, -1])
@pytest.mark.parametrize("shuffled", [None, 1])
def test_layer_holds_what_the_checkpoint_does(
    bits: int, group_size: int, shuffled: int | None
) -> None:
    config = {**CONFIG, "bits": bits, "group_size": group_size}
    spec = spec_of((64, 128), 256)
    layer = Linear(spec, Gptq(config).method_for(spec))
    tensors, _ = tensors_of(spec, config, shuffled)
    load(layer, tensors)

    layer.finish_loading()

    held = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert held <= sum(t.numel() * t.element_size() for t in tensors.values())


def test_stored_zero_point_of_the_highest_code_is_zero() -> None:
    """Minus one wraps round in the bits of a code; one more must not reach the next code."""
    config = {**CONFIG, "group_size": 64}
    spec = spec_of((32, 32))
    layer = Linear(spec, Gptq(config).method_for(spec))
    tensors, _ = tensors_of(spec, config, None)
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.qzeros"].fill_(-1)
    tensors[f"{name}.qweight"].fill_(0)
    load(layer, tensors)

    layer.finish_loading()

    assert bool((layer.method.dequantize(layer)[:32] == 0).all())


DAMAGES: dict[str, tuple[str, Any, str]] = {
    "NaN scale": (
        "scales",
        lambda t: t[1].fill_(float("nan")),
        r"k_proj\.scales' gives a scale that is NaN or infinite, at group 1 of output 0",
    ),
    "infinite scale": ("scales", lambda t: t[0, 5].fill_(float("inf")), r"group 0 of output 5"),
    "group too high": ("g_idx", lambda t: t[3].fill_(2), r"k_proj\.g_idx' names group 2; .*0 to 1"),
    "group below zero": ("g_idx", lambda t: t[3].fill_(-1), r"k_proj\.g_idx' names group -1"),
    "group too large": ("g_idx", lambda t: t.fill_(1), r"puts 0 inputs into group 0; .*size 32"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensor_is_named(damage: str) -> None:
    name, change, words = DAMAGES[damage]
    spec = spec_of()
    layer = Linear(spec, Gptq(CONFIG).method_for(spec))
    tensors, _ = tensors_of(spec, CONFIG, None)
    change(tensors[f"model.layers.0.self_attn.k_proj.{name}"])
    load(layer, tensors)

    with pytest.raises(CheckpointError, match=words):
        layer.finish_loading()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 5}, r"bits is 5; served is 2 or 3 or 4 or 8"),
        ({"bits": None}, r"bits is None"),
        ({"bits": True}, r"bits is True"),
        ({"bits": [4]}, r"bits is \[4\]"),
        ({"group_size": 0}, r"group_size is 0; served is -1 or a positive multiple of 8"),
        ({"group_size": 12}, r"group_size is 12"),
        ({"group_size": "128"}, r"group_size is '128'"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin'; .*'gptq' or 'gptq_v2'"),
        ({"checkpoint_format": ["gptq"]}, r"checkpoint_format is \['gptq'\]"),
        ({"is_marlin_format": True}, r"is_marlin_format is True; served is false"),
        ({"pack_dtype": "int64"}, r"pack_dtype is 'int64'; served is 'int32'"),
        ({"sym": "yes"}, r"sym is 'yes'; served is true or false"),
        ({"desc_act": 1}, r"desc_act is 1"),
        ({"lm_head": "no"}, r"lm_head is 'no'"),
        ({"dynamic": ["a"]}, r"dynamic is \['a'\]"),
        ({"dynamic": {"-:(": {}}}, r"dynamic is '-:\('; served is a regular expression"),
        ({"dynamic": {"a": 4}}, r"dynamic 'a' is 4"),
        ({"dynamic": {"a": {"bits": 7}}}, r"bits is 7"),
        ({"modules_in_block_to_quantize": "q_proj"}, r"modules_in_block_to_quantize is 'q_proj'"),
    ],
)
def test_config_that_nothing_serves_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Gptq({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("spec", "bits", "words"),
    [
        (spec_of(in_features=80), 4, "inputs must be a multiple of 32; 80 is not, 64 or 96"),
        (spec_of((32, 20)), 4, r"k_proj must be a multiple of 8; 20 is not, 16 or 24 would do"),
        (spec_of((32, 48)), 3, r"k_proj must be a multiple of 32; 48 is not, 32 or 64 would do"),
        (spec_of((8,)), 2, r"multiple of 16; 8 is not, 16 would do"),
    ],
)
def test_sizes_that_cannot_be_cut_are_refused_with_those_that_can(
    spec: LinearSpec, bits: int, words: str
) -> None:
    assert words in (Gptq({**CONFIG, "bits": bits}).why_unsupported(spec) or "")


def test_dynamic_leaves_modules_alone_or_changes_them() -> None:
    rules = {"-:.*o_proj": {}, "+:.*self_attn.*": {"bits": 8, "group_size": 64}}
    method = Gptq({**CONFIG, "dynamic": rules})

    assert method.method_for(spec_of((32,))) is None
    form = method.method_for(spec_of()).form  # type: ignore[union-attr]
    assert (form.bits, form.group_size) == (8, 64)


@pytest.mark.parametrize("nested", [True, False])
def test_listed_modules_alone_are_quantized(nested: bool) -> None:
    names: list[Any] = ["self_attn.q_proj", "self_attn.k_proj"]
    listed = [names[:1], names[1:]] if nested else names
    method = Gptq({**CONFIG, "modules_in_block_to_quantize": listed})

    assert method.method_for(spec_of()) is not None
    assert method.method_for(spec_of((32,))) is None


def test_projections_of_one_product_must_be_quantized_alike() -> None:
    method = Gptq({**CONFIG, "dynamic": {".*k_proj": {"bits": 8}, "-:.*v_proj": {}}})

    why = method.why_unsupported(spec_of((32, 32, 32))) or ""

    assert "q_proj: 4 bits, group_size 32" in why
    assert "k_proj: 8 bits, group_size 32" in why
    assert "v_proj: left alone" in why


def test_head_is_quantized_where_the_config_says_so_and_embeddings_never() -> None:
    plain, whole = Gptq(CONFIG), Gptq({**CONFIG, "lm_head": True})

    assert plain.method_for(head_spec(is_head=True)) is None
    assert whole.method_for(head_spec(is_head=True)) is not None
    assert whole.method_for(head_spec(is_head=False)) is None


def test_experts_whose_sizes_fill_no_groups_are_refused() -> None:
    experts = ExpertsSpec(
        name="e", num_experts=2, hidden_size=4, intermediate_size=4, dtype="float32", device="cpu"
    )

    why = Gptq(CONFIG).why_unsupported(experts) or ""

    assert why.startswith("of expert 0, gate_proj and up_proj: its inputs must be a multiple of")
