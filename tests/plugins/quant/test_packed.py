"""Strings of bits, and the product a slice at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_packing import groups_of, round_weight, words_of
from torch import Tensor

from quire.interfaces.quantization import LinearSpec
from quire.layers.linear import Linear
from quire_kernels.packed import product
from quire_quant import packed, tiled
from quire_quant.packed import PackedForm, PackedProduct, num_bytes, pack, unpack
from quire_quant.rounding import quantize

BITS = pytest.mark.parametrize("bits", [2, 3, 4, 8])


@st.composite
def rows_of_codes(draw: st.DrawFn, bits: int, multiple: int = 1) -> Tensor:
    rows = draw(st.integers(1, 2))
    length = multiple * draw(st.integers(1, 20 if multiple == 1 else 2))
    code = st.integers(0, 2**bits - 1)
    row = st.lists(code, min_size=length, max_size=length)
    return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows)), dtype=torch.uint8)


@BITS
@given(data=st.data())
def test_unpacking_gives_back_the_codes(bits: int, data: st.DataObject) -> None:
    codes = data.draw(rows_of_codes(bits))

    kept = pack(codes, bits)

    assert kept.shape == (len(codes), num_bytes(codes.shape[1], bits))
    assert torch.equal(unpack(kept, bits, codes.shape[1]), codes)


@BITS
@given(data=st.data())
def test_packing_writes_codes_bit_by_bit(bits: int, data: st.DataObject) -> None:
    codes = data.draw(rows_of_codes(bits, multiple=32))

    assert torch.equal(pack(codes, bits).view(torch.int32), words_of(codes, bits))


def test_three_bits_cross_words_as_gptq_has_them() -> None:
    """Ten codes and two bits; a bit, ten codes and a bit; two bits and ten codes."""
    codes = torch.arange(32)[None] * 5 % 8
    c = codes[0].tolist()
    first = sum(c[i] << 3 * i for i in range(10)) | (c[10] & 3) << 30
    second = c[10] >> 2 | sum(c[11 + i] << 3 * i + 1 for i in range(10)) | (c[21] & 1) << 31
    third = c[21] >> 1 | sum(c[22 + i] << 3 * i + 2 for i in range(10))

    words = words_of(codes, 3)[0].tolist()

    assert [word % 2**32 for word in words] == [first, second, third]


@BITS
def test_rounding_is_within_half_a_step(bits: int) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(bits))

    codes, scales, zeros = quantize(weight, bits, 32)

    naive = round_weight(weight, bits, groups_of(64, 32))
    assert torch.equal(codes.long(), naive.codes)
    assert torch.equal(zeros.long(), naive.zeros)
    assert torch.equal(scales, naive.scales)
    # The greatest weights also lose what the scale's own rounding takes.
    steps = 0.5 + 2**bits * 2**-11
    error = (naive.weight - weight.double()).abs()
    assert bool((error <= steps * scales.double()[:, groups_of(64, 32)]).all())


def packed_layer(
    bits: int,
    orders: int,
    sizes: tuple[int, ...],
    *,
    inputs: int = 64,
    dtype: str = "float32",
    device: str = "cpu",
) -> tuple[Linear, Tensor]:
    """Return a layer of random codes, two groups, and the weight that it stands for."""
    spec = LinearSpec(
        name="a.qkv_proj",
        parts=("q", "k", "v"),
        in_features=inputs,
        output_sizes=sizes,
        bias=True,
        dtype=dtype,
        device=device,
    )
    generator = torch.Generator().manual_seed(bits)
    outputs = sum(sizes)
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8, generator=generator)
    zeros = torch.randint(0, 2**bits, (2, outputs), dtype=torch.uint8, generator=generator)
    scales = torch.rand(2, outputs, generator=generator).half()
    order = torch.stack(
        [torch.randperm(inputs, generator=generator) for _ in range(max(1, orders))]
    )

    class Installed(PackedProduct):
        def create_weights(self, layer: object) -> None:
            self.install(
                layer,  # type: ignore[arg-type]
                values=pack(codes, bits).to(device),
                scales=scales.to(device),
                zeros=pack(zeros, bits).to(device),
                order=order.int().to(device) if orders else None,
            )

    layer = Linear(spec, Installed(PackedForm.of(spec, bits, inputs // 2)))
    layer.bias.data.copy_(torch.randn(outputs, generator=generator))  # type: ignore[union-attr]
    grouped = codes.double().unflatten(1, (2, -1)) - zeros.T.double()[..., None]
    kept = (grouped * scales.T.double()[..., None]).flatten(1)
    if not orders:
        return layer, kept
    weight = torch.empty_like(kept)
    rows = kept.split(sizes) if orders > 1 else [kept]
    for target, row, own in zip(weight.split([len(r) for r in rows]), rows, order, strict=True):
        target[:, own] = row
    return layer, weight


@BITS
@pytest.mark.parametrize("orders", [0, 1, 3])
def test_slices_of_outputs_give_the_whole_product(
    bits: int, orders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, weight = packed_layer(bits, orders, (96, 32, 64))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ weight.T + layer.bias.double()  # type: ignore[union-attr]

    whole = layer(x)
    monkeypatch.setattr(packed, "SLICE_WEIGHTS", 1)
    in_slices = layer(x)

    assert torch.equal(layer.method.dequantize(layer).double(), weight)
    for out in (whole, in_slices):
        assert (out.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("orders", [0, 1, 3])
def test_layer_in_tiles_is_the_same_layer(
    bits: int, orders: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "serves", lambda device, dtype: True)
    layer, weight = packed_layer(bits, orders, (96, 32, 64), inputs=256)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ weight.T + layer.bias.double()  # type: ignore[union-attr]

    out = layer(x)

    assert layer.method.is_tiled
    assert torch.equal(layer.method.dequantize(layer).double(), weight)
    assert (out.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("bits", "largest"), [(4, 60000.0), (8, 4000.0), (8, 4200.0)])
def test_scales_that_16_times_is_no_float16_keep_8_bits_out_of_tiles(
    bits: int, largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(product, "serves", lambda device, dtype: True)
    layer, _ = packed_layer(bits, 0, (32,), inputs=256)
    scales = torch.full((2, 32), largest, dtype=torch.float16)

    assert tiled.lies_in_tiles(layer.method.form, scales) == (largest != 4200.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 4, 7, 20, 200, 1500])
@pytest.mark.parametrize("orders", [0, 1, 3])
@pytest.mark.parametrize("bits", [4, 8])
def test_layer_on_a_gpu_is_within_a_rounding_of_the_exact_product(
    bits: int, orders: int, rows: int, dtype: torch.dtype
) -> None:
    name = str(dtype).removeprefix("torch.")
    form = {"inputs": 256, "dtype": name, "device": "cuda"}
    layer, weight = packed_layer(bits, orders, (96, 32, 64), **form)  # type: ignore[arg-type]
    x = torch.randn(rows, 256, device="cuda").to(dtype)
    rounded = weight.to("cuda", dtype).double()
    expected = x.double() @ rounded.T + layer.bias.double()  # type: ignore[union-attr]

    out = layer(x)

    assert layer.method.is_tiled
    assert torch.equal(layer.method.dequantize(layer).cpu().double(), weight)
    assert (out.double() - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_slice_holds_few_wide_weights_whatever_the_layer() -> None:
    spec = LinearSpec(
        name="a",
        parts=("a",),
        in_features=8192,
        output_sizes=(28672,),
        bias=False,
        dtype="bfloat16",
        device="meta",
    )
    form = PackedForm.of(spec, 4, 128)

    pieces = list(form.slices(0, form.out_features))

    assert max(s.stop - s.start for s in pieces) * form.in_features <= packed.SLICE_WEIGHTS
    assert sum(s.stop - s.start for s in pieces) == form.out_features
