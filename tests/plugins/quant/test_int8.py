"""Int8: the kit, exact integer products on every path, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quire.errors import CheckpointError, ConfigError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    ExpertsSpec,
    KVCacheSpec,
    LinearSpec,
)
from quire.layers.embedding import Embedding, Head
from quire.layers.linear import Linear
from quire.testing import QuantizationMethodTests
from quire_kernels import ops
from quire_kernels.cpu import products
from quire_quant.int8 import product
from quire_quant.int8.method import Int8, Int8WeightOnly
from quire_quant.int8.rounded import quantize_weight
from quire_quant.none.method import NoQuantization

METHOD = Int8({})
PACKED = pytest.mark.skipif(not product.packs(), reason="oneDNN does not sum in 32 bits here")


class TestInt8(QuantizationMethodTests):
    method = Int8

    def weight_bytes(self, spec: LinearSpec) -> int:
        bias = spec.out_features * getattr(torch, spec.dtype).itemsize if spec.bias else 0
        return spec.out_features * (spec.in_features + 4) + bias


class TestInt8ByOneDnn(TestInt8):
    """The products of a machine that has not built the kernels."""

    @pytest.fixture(autouse=True)
    def _unbuilt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(products, "is_built", lambda: False)


class TestInt8WithoutOneDnn(TestInt8ByOneDnn):
    """The products that PyTorch makes itself."""

    @pytest.fixture(autouse=True)
    def _plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(product, "packs", lambda: False)


class TestInt8WeightOnly(QuantizationMethodTests):
    method = Int8WeightOnly

    def weight_bytes(self, spec: LinearSpec) -> int:
        bias = spec.out_features * getattr(torch, spec.dtype).itemsize if spec.bias else 0
        return spec.out_features * (spec.in_features + 3) + bias


def linear(dtype: str = "bfloat16", in_features: int = 48, out_features: int = 24) -> Linear:
    spec = LinearSpec(
        name="a.o_proj",
        parts=("o_proj",),
        in_features=in_features,
        output_sizes=(out_features,),
        bias=False,
        dtype=dtype,
        device="cpu",
    )
    method = METHOD.method_for(spec)
    assert method is not None
    return Linear(spec, method)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(layer: Linear) -> Linear:
    layer.allocate()
    layer.get_weight("weight").data.copy_(draw(*layer.get_weight("weight").shape))
    layer.finish_loading()
    return layer


def test_weight_is_rounded_by_output() -> None:
    weight = torch.tensor([[1.0, -127.0, 63.4], [0.5, 0.25, -0.125], [0.0, 0.0, 0.0]])

    values, scales = quantize_weight(weight, "a")

    assert values.tolist() == [[1, -127, 63], [127, 64, -32], [0, 0, 0]]
    torch.testing.assert_close(scales, torch.tensor([1.0, 0.5 / 127, 1.0]))


def test_weight_is_rounded_alike_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(37, 10)
    whole = quantize_weight(weight, "a")

    monkeypatch.setattr("quire_quant.int8.rounded.PIECE_ELEMENTS", 40)

    for piecewise, expected in zip(quantize_weight(weight, "a"), whole, strict=True):
        assert torch.equal(piecewise, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(bad: float) -> None:
    layer = linear()
    layer.allocate()
    layer.get_weight("weight").data.fill_(1).view(-1)[7] = bad

    with pytest.raises(CheckpointError, match=r"a\.o_proj\.weight has a NaN or an infinity"):
        layer.finish_loading()


@PACKED
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_sums_of_the_largest_integers_are_exact(rows: int) -> None:
    values = torch.full((5, 2048), 127, dtype=torch.int8)
    x = torch.full((rows, 2048), 255, dtype=torch.uint8)

    packed = product.multiply_packed(x, 1.0, product.pack(values), torch.ones(5), torch.float32)

    assert packed.unique().tolist() == [2048 * 127 * 127]
    assert product.multiply(x, values, torch.ones(5)).unique().tolist() == [2048 * 127 * 127]


def test_float32_product_is_that_of_the_rounded_factors() -> None:
    layer = filled(linear("float32"))
    x = draw(9, 48, seed=1)

    weight, rounded = layer.method.dequantize(layer), layer.method.rounded_input(layer, x)

    assert weight is not None
    assert rounded is not None
    torch.testing.assert_close(layer(x).double(), rounded @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_row_that_is_not_finite_gives_nan_and_others_do_not(rows: int, bad: float) -> None:
    x = draw(rows, 48).bfloat16()
    x[0, 5] = bad

    out = filled(linear())(x)

    assert bool(out[0].isnan().all())
    assert bool(out[1:].isfinite().all())


def test_row_of_zeros_gives_zeros() -> None:
    assert filled(linear())(torch.zeros(1, 48).bfloat16()).abs().max() == 0


def test_layer_gives_back_its_plain_weight() -> None:
    layer = filled(linear())

    assert list(layer.parameters()) == []
    assert layer.method.loaded_bytes(layer) == 24 * 48 + 4 * 24


def test_tied_head_multiplies_in_8_bits_and_look_ups_stay_exact() -> None:
    specs = [
        EmbeddingSpec(
            name="e", num_embeddings=40, embedding_dim=48, is_head=is_head,
            dtype="bfloat16", device="cpu",
        )
        for is_head in (False, True)
    ]  # fmt: skip
    assert METHOD.method_for(specs[0]) is None
    dense, method = NoQuantization({}).method_for(specs[0]), METHOD.method_for(specs[1])
    assert dense is not None
    assert method is not None
    embedding = Embedding(specs[0], dense)
    head = Head(specs[1], method, embedding)
    weight = draw(40, 48).bfloat16()
    embedding.get_weight("weight").data.copy_(weight)

    head.finish_loading()

    assert torch.equal(embedding(torch.tensor([3, 0])), weight[[3, 0]])
    read = method.dequantize(head)
    assert read is not None
    assert 0 < (read - weight.float()).abs().max() <= weight.abs().max().float() / 127 / 1.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 7, 64, 100, 1024])
def test_rounding_of_rows_is_the_formula(dtype: torch.dtype, size: int) -> None:
    x = torch.cat((draw(5, size), torch.zeros(1, size))).to(dtype)
    x[1] *= 1e-3

    values, scales = ops.quantize_rows(x)

    largest = x.float().abs().amax(1)
    expected = torch.where(largest == 0, 1.0, largest / 127)
    assert torch.equal(scales, expected)
    rounded = (x.float() / expected[:, None]).round() + 128
    assert values.dtype is torch.uint8
    assert torch.equal(values, rounded.to(torch.uint8))


def test_another_checkpoints_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="format is None; this method reads 'int-quantized'"):
        Int8({"quant_method": "gptq", "bits": 4})


def test_only_linears_and_embeddings_are_served() -> None:
    experts = ExpertsSpec(
        name="e", num_experts=2, hidden_size=4, intermediate_size=4, dtype="float32", device="cpu"
    )
    cache = KVCacheSpec(name="c", num_kv_heads=1, head_dim=4, kv_dtype="float32")

    for spec, words in ((experts, "it rounds activations"), (cache, "KVCacheSpec")):
        assert words in (METHOD.why_unsupported(spec) or "")
        assert METHOD.method_for(spec) is None


@pytest.mark.parametrize("size", [1.0, 1e-2, 2e-3, 1e-4])
def test_weights_alone_are_rounded_by_half_a_step_however_small(size: float) -> None:
    spec = LinearSpec(
        name="a.o_proj",
        parts=("o_proj",),
        in_features=64,
        output_sizes=(24,),
        bias=False,
        dtype="float32",
        device="cpu",
    )
    method = Int8WeightOnly({}).method_for(spec)
    assert method is not None
    layer = Linear(spec, method)
    weight = draw(24, 64) * size
    layer.allocate()
    layer.get_weight("weight").data.copy_(weight)

    layer.finish_loading()

    found = method.dequantize(layer)
    assert found is not None
    # Scales are multiples of 2^-24, which the least of these weights feel.
    steps = weight.abs().amax(1, keepdim=True) / 127 + 2.0**-24
    assert bool(((found - weight).abs() <= 0.5 * steps * (1 + 1e-5)).all())
