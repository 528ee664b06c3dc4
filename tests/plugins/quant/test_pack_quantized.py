"""pack-quantized: the kit on every kind of checkpoint, what is left alone, and damaged ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from attrs import evolve
from naive_packing import Rounded, groups_of, round_weight, words_of
from torch import Tensor

from quire.errors import CheckpointError, ConfigError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    EncodedWeight,
    KVCacheSpec,
    LayerSpec,
    LinearSpec,
)
from quire.layers.linear import Linear
from quire.testing import QuantizationMethodTests
from quire.testing.quantization_cases import load
from quire_quant.pack_quantized.method import PackQuantized
from quire_quant.packed import PackedProduct

WEIGHTS = {
    "num_bits": 4,
    "type": "int",
    "strategy": "group",
    "group_size": 32,
    "symmetric": False,
    "dynamic": False,
}
SPEC = LinearSpec(
    name="layers.0.qkv_proj",
    parts=("q_proj", "k_proj", "v_proj"),
    in_features=64,
    output_sizes=(16, 8, 8),
    bias=False,
    dtype="float32",
    device="cpu",
)


def config(*, ignore: tuple[str, ...] = (), **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {**WEIGHTS, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def tensors_of(rounded: Rounded, *, symmetric: bool, has_order: bool) -> dict[str, Tensor]:
    """Write a projection bit by bit: codes along the inputs, zero points along the outputs."""
    found = {
        "weight_packed": words_of(rounded.codes, rounded.bits),
        "weight_scale": rounded.scales.float(),
        "weight_shape": torch.tensor(rounded.codes.shape),
    }
    if not symmetric:
        found["weight_zero_point"] = words_of(rounded.zeros.T, rounded.bits).T.contiguous()
    if has_order:
        found["weight_g_idx"] = rounded.groups.int()
    return found


class PackedTests(QuantizationMethodTests):
    """The kit on checkpoints that are written bit by bit."""

    method = PackQuantized

    @property
    def weights(self) -> Mapping[str, Any]:
        return self.config["config_groups"]["group_0"]["weights"]

    @property
    def has_order(self) -> bool:
        return self.weights.get("actorder") == "group"

    def encode(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        weights = self.weights
        size = weights["group_size"] if weights["strategy"] == "group" else -1
        seed = int(weight.abs().sum() * 1000) if self.has_order else None
        groups = groups_of(weight.shape[1], size, shuffled=seed)
        symmetric = weights["symmetric"]
        rounded = round_weight(weight, weights["num_bits"], groups, symmetric=symmetric)
        tensors = tensors_of(rounded, symmetric=symmetric, has_order=self.has_order)
        return EncodedWeight(tensors=tensors, weight=rounded.weight)

    def weight_bytes(self, spec: LinearSpec) -> int | None:
        weights, inputs, outputs = self.weights, spec.in_features, spec.out_features
        groups = inputs // (weights["group_size"] if weights["strategy"] == "group" else inputs)
        bits = weights["num_bits"]
        codes = inputs * outputs * bits // 8 + groups * -(-outputs * bits // 8)
        orders = len(spec.parts) if self.has_order and groups > 1 else 0
        bias = outputs * (4 if spec.dtype == "float32" else 2) if spec.bias else 0
        return codes + 2 * groups * outputs + 4 * inputs * orders + bias


class TestPackQuantized(QuantizationMethodTests):
    """As `quire plugins check` does it."""

    method = PackQuantized


class TestFourBits(PackedTests):
    config: ClassVar = config()


class TestFourBitsSymmetric(PackedTests):
    config: ClassVar = config(symmetric=True)


class TestFourBitsOfWholeRows(PackedTests):
    config: ClassVar = config(strategy="channel", group_size=None)


class TestEightBits(PackedTests):
    config: ClassVar = config(num_bits=8)


class TestEightBitsSymmetricOfWholeRows(PackedTests):
    config: ClassVar = config(num_bits=8, symmetric=True, strategy="channel", group_size=None)


class TestGroupsInAnOrder(PackedTests):
    config: ClassVar = config(actorder="group")


class TestEightBitsInAnOrder(PackedTests):
    config: ClassVar = config(num_bits=8, actorder="group", symmetric=True)


def filled(damage: Callable[[dict[str, Tensor]], Any], **weights: Any) -> Linear:
    """Return a layer whose checkpoint was changed before it was loaded."""
    has_order, symmetric = weights.get("actorder") == "group", weights.get("symmetric", False)
    tensors = {}
    for part, size in zip(SPEC.parts, SPEC.output_sizes, strict=True):
        weight = torch.randn(size, 64, generator=torch.Generator().manual_seed(size))
        groups = groups_of(64, 32, shuffled=size if has_order else None)
        rounded = round_weight(weight, 4, groups, symmetric=symmetric)
        own = tensors_of(rounded, symmetric=symmetric, has_order=has_order)
        tensors |= {f"layers.0.{part}.{name}": tensor for name, tensor in own.items()}
    damage(tensors)
    layer = Linear(SPEC, PackQuantized(config(**weights)).method_for(SPEC))
    load(layer, tensors)
    layer.finish_loading()
    return layer


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Any], str]] = {
    "shape of another layer": (
        lambda t: t["layers.0.k_proj.weight_shape"].copy_(torch.tensor([8, 32])),
        {},
        r"'layers\.0\.k_proj\.weight_shape' says \[8, 32\]; config.json makes .* \[8, 64\]",
    ),
    "scale too large": (
        lambda t: t["layers.0.v_proj.weight_scale"][3, 1].fill_(1e6),
        {},
        r"'layers\.0\.v_proj\.weight_scale' has the scale 1e\+06 at group 1 of output 3",
    ),
    "scale too small": (
        lambda t: t["layers.0.q_proj.weight_scale"][0, 0].fill_(1e-9),
        {},
        r"q_proj\.weight_scale' has the scale 1e-09 at group 0 of output 0, which float16",
    ),
    "NaN": (
        lambda t: t["layers.0.q_proj.weight_scale"][5, 0].fill_(float("nan")),
        {"symmetric": True},
        r"q_proj\.weight_scale' has the scale nan at group 0 of output 5",
    ),
    "group out of range": (
        lambda t: t["layers.0.k_proj.weight_g_idx"][7].fill_(2),
        {"actorder": "group"},
        r"'layers\.0\.k_proj\.weight_g_idx' names group 2; 64 inputs in groups of 32",
    ),
    "uneven groups": (
        lambda t: t["layers.0.k_proj.weight_g_idx"].fill_(0),
        {"actorder": "group"},
        r"'layers\.0\.k_proj\.weight_g_idx' puts 64 inputs into group 0",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensor_is_named(damage: str) -> None:
    change, weights, words = DAMAGES[damage]

    with pytest.raises(CheckpointError, match=words):
        filled(change, **weights)


@pytest.mark.parametrize("weights", [{}, {"symmetric": True}, {"actorder": "group"}])
def test_bytes_are_known_before_loading(weights: dict[str, Any]) -> None:
    told: list[int] = []
    method = PackQuantized(config(**weights)).method_for(SPEC)
    told.append(method.loaded_bytes(Linear(SPEC, method)))

    layer = filled(lambda _: None, **weights)

    assert told == [sum(p.numel() * p.element_size() for p in layer.parameters())]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_bits": 3}, "weights: num_bits is 3; pack-quantized reads 4 or 8"),
        ({"type": "float"}, "type is 'float'; pack-quantized reads 'int'"),
        ({"strategy": "tensor"}, "strategy is 'tensor'; pack-quantized reads 'group' or 'channel'"),
        ({"actorder": "sideways"}, "actorder is 'sideways'"),
        ({"group_size": 12}, "group_size is 12; served is -1 or a positive multiple of 8"),
        ({"symmetric": None}, "symmetric is None"),
        ({"dynamic": True}, "dynamic is True"),
    ],
)
def test_unknown_scheme_is_refused_by_its_key(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PackQuantized(config(**changed))


def test_activations_are_refused_with_what_is_read() -> None:
    given = config()
    given["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8}

    with pytest.raises(ConfigError, match="config_groups.group_0.input_activations is .*W4A16"):
        PackQuantized(given)


def test_ignored_layers_are_left_alone_and_heads_only_where_ignored() -> None:
    head = EmbeddingSpec(
        name="lm_head", num_embeddings=32, embedding_dim=64, is_head=True,
        dtype="float32", device="cpu",
    )  # fmt: skip
    method = PackQuantized(config(ignore=("lm_head", "re:.*down_proj")))

    assert method.method_for(head) is None
    assert method.method_for(evolve(SPEC, name="a.down_proj", parts=("down_proj",))) is None
    assert method.method_for(SPEC) is not None
    assert PackQuantized(config()).method_for(head) is not None
    assert PackQuantized(config()).method_for(evolve(head, is_head=False)) is None


def test_a_group_that_names_a_layer_comes_before_one_of_its_class() -> None:
    groups = config()["config_groups"]
    by_name = {"targets": ["re:.*down_proj$"], "weights": {**WEIGHTS, "num_bits": 8}}
    method = PackQuantized({**config(), "config_groups": {**groups, "group_1": by_name}})

    bits = []
    for name in ("down_proj", "o_proj"):
        product = method.method_for(evolve(SPEC, name=f"a.{name}", parts=(name,)))
        assert isinstance(product, PackedProduct)
        bits.append(product.form.bits)

    assert bits == [8, 4]


def test_projections_that_are_kept_apart_are_refused() -> None:
    method = PackQuantized(config(ignore=("layers.0.k_proj",)))

    why = method.why_unsupported(SPEC) or ""

    assert "layers.0.q_proj: 4 bits, group_size 32, layers.0.k_proj: not quantized" in why


@pytest.mark.parametrize(
    ("changes", "weights", "why"),
    [
        ({"in_features": 72}, {}, "its inputs must be a multiple of 32; 72 is not, 64 or 96 would"),
        (
            {"output_sizes": (16, 4, 8)},
            {},
            "the outputs of layers.0.k_proj must be a multiple of 8",
        ),
        ({"output_sizes": (16, 4, 8)}, {"symmetric": True}, None),
    ],
)
def test_sizes_that_fill_no_groups_or_words_are_refused(
    changes: dict[str, Any], weights: dict[str, Any], why: str | None
) -> None:
    found = PackQuantized(config(**weights)).why_unsupported(evolve(SPEC, **changes))

    assert (found or "").startswith(why or "")
    assert (found is None) == (why is None)


def test_caches_are_refused() -> None:
    cache = KVCacheSpec(name="c", num_kv_heads=1, head_dim=4, kv_dtype="float32")

    assert "KVCacheSpec" in (PackQuantized(config()).why_unsupported(cache) or "")
