"""int4: the kit, what a layer holds, and what is refused."""

from __future__ import annotations

import pytest
import torch
from attrs import evolve
from naive_packing import groups_of, round_weight

from quire.errors import CheckpointError
from quire.interfaces.quantization import EmbeddingSpec, KVCacheSpec, LinearSpec
from quire.layers.linear import Linear
from quire.testing import QuantizationMethodTests
from quire_kernels.packed.layout import are_short
from quire_quant.int4.method import Int4

METHOD = Int4({})
SPEC = LinearSpec(
    name="layers.0.o_proj",
    parts=("o_proj",),
    in_features=256,
    output_sizes=(33,),
    bias=False,
    dtype="float32",
    device="cpu",
)


def empty_layer(spec: LinearSpec) -> Linear:
    layer = Linear(spec, METHOD.method_for(spec))
    layer.allocate()
    return layer


def group_size_of(in_features: int) -> int:
    return max(size for size in (16, 32, 64, 128) if in_features % size == 0)


class TestInt4(QuantizationMethodTests):
    method = Int4

    def weight_bytes(self, spec: LinearSpec) -> int | None:
        rows, inputs = spec.out_features, spec.in_features
        groups = inputs // group_size_of(inputs)
        bias = rows * (4 if spec.dtype == "float32" else 2) if spec.bias else 0
        return rows * inputs // 2 + 2 * groups * rows + groups * ((rows + 1) // 2) + bias


class TestInt4OnGPU(TestInt4):
    pytestmark = pytest.mark.gpu
    device = "cuda"


@pytest.mark.parametrize("in_features", [16, 48, 64, 96, 128, 256, 384])
def test_weight_is_rounded_to_nearest_in_the_largest_groups_that_fit(in_features: int) -> None:
    spec = evolve(SPEC, in_features=in_features)
    layer = empty_layer(spec)
    weight = torch.randn(33, in_features, generator=torch.Generator().manual_seed(0))
    layer.get_weight("weight").data.copy_(weight)

    layer.finish_loading()

    groups = groups_of(in_features, group_size_of(in_features))
    assert torch.equal(
        layer.method.dequantize(layer).double(), round_weight(weight, 4, groups).weight
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_are_numbers_of_the_models_dtype(dtype: str) -> None:
    layer = empty_layer(evolve(SPEC, dtype=dtype))
    layer.get_weight("weight").data.normal_(generator=torch.Generator().manual_seed(0))

    layer.finish_loading()

    assert are_short(layer.get_weight("scales")) == (dtype == "bfloat16")


def test_bytes_are_known_before_loading_and_the_wide_weight_has_none() -> None:
    layer = Linear(SPEC, METHOD.method_for(SPEC))
    told = layer.method.loaded_bytes(layer)

    assert layer.get_weight("weight").is_meta
    layer.allocate()
    layer.get_weight("weight").data.normal_()
    layer.finish_loading()

    assert told == sum(p.numel() * p.element_size() for p in layer.parameters())


def test_weight_too_large_for_a_scale_is_named() -> None:
    layer = empty_layer(SPEC)
    layer.get_weight("weight").data.fill_(1e6).mul_(2)

    with pytest.raises(CheckpointError, match=r"o_proj\.weight' gives a scale that is NaN or inf"):
        layer.finish_loading()


def test_group_of_zeros_stays_zero() -> None:
    layer = empty_layer(SPEC)
    layer.get_weight("weight").data.zero_()

    layer.finish_loading()

    assert bool((layer(torch.ones(2, 256)) == 0).all())


def test_inputs_that_make_no_groups_are_refused_with_those_that_do() -> None:
    why = METHOD.why_unsupported(evolve(SPEC, in_features=100))

    assert why == "its inputs must be a multiple of 16; 100 is not, 96 or 112 would do"


@pytest.mark.parametrize("is_head", [True, False])
def test_embeddings_and_heads_are_left_alone(is_head: bool) -> None:
    spec = EmbeddingSpec(
        name="e", num_embeddings=7, embedding_dim=5, is_head=is_head, dtype="float32", device="cpu"
    )

    assert METHOD.why_unsupported(spec) is None
    assert METHOD.method_for(spec) is None


def test_caches_are_refused() -> None:
    cache = KVCacheSpec(name="c", num_kv_heads=1, head_dim=4, kv_dtype="float32")

    assert "KVCacheSpec" in (METHOD.why_unsupported(cache) or "")
