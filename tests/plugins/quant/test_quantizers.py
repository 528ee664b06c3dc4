"""Quantizers: what their plugins read back, and that calibration loses less than rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve
from torch import Tensor

from quire.errors import ConfigError
from quire.interfaces.quantization import (
    InputMoments,
    LinearSpec,
    QuantizationMethod,
    QuantizerOptions,
    WeightQuantizer,
)
from quire.layers.linear import Linear
from quire.testing.quantization_cases import load
from quire_quant.awq.method import Awq
from quire_quant.awq.quantizer import AwqQuantizer
from quire_quant.fp8.method import Fp8
from quire_quant.fp8.quantizer import Fp8Quantizer
from quire_quant.gptq.method import Gptq
from quire_quant.gptq.quantizer import GptqQuantizer, inverse_factor
from quire_quant.int4.quantizer import Int4Quantizer
from quire_quant.int8.method import Int8
from quire_quant.int8.quantizer import Int8Quantizer
from quire_quant.pack_quantized.method import PackQuantized
from quire_quant.rounding import Rounding, round_to_nearest, search_ranges

INPUTS, OUTPUTS = 192, 32
OPTIONS = QuantizerOptions(dtype="bfloat16")
Case = tuple[type[WeightQuantizer], type[QuantizationMethod], dict[str, Any]]
CASES: dict[str, Case] = {
    "gptq": (GptqQuantizer, Gptq, {"group_size": 32}),
    "gptq 2 bits": (GptqQuantizer, Gptq, {"group_size": 32, "bits": 2}),
    "gptq 3 bits": (GptqQuantizer, Gptq, {"group_size": 32, "bits": 3, "symmetric": False}),
    "gptq 8 bits": (GptqQuantizer, Gptq, {"group_size": 32, "bits": 8}),
    "gptq zero points": (GptqQuantizer, Gptq, {"group_size": 32, "symmetric": False}),
    "gptq order": (GptqQuantizer, Gptq, {"group_size": 32, "act_order": True}),
    "gptq groups across blocks": (GptqQuantizer, Gptq, {"group_size": 96}),
    "gptq whole rows": (GptqQuantizer, Gptq, {"group_size": -1}),
    "awq": (AwqQuantizer, Awq, {"group_size": 32}),
    "awq whole rows": (AwqQuantizer, Awq, {"group_size": -1}),
    "fp8": (Fp8Quantizer, Fp8, {}),
    "int8": (Int8Quantizer, Int8, {}),
    "int4": (Int4Quantizer, PackQuantized, {"group_size": 32}),
    "int4 zero points": (Int4Quantizer, PackQuantized, {"group_size": 32, "symmetric": False}),
    "int4 whole rows": (Int4Quantizer, PackQuantized, {"group_size": -1}),
}


def weights() -> list[Tensor]:
    """Return two projections, the second much smaller."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(2, OUTPUTS, INPUTS, generator=generator)
    return [drawn[0], drawn[1] * 0.01]


def moments() -> InputMoments:
    """Return those of inputs that depend on each other, some far larger than others."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(40, INPUTS, generator=generator) / 40**0.5
    sizes = torch.exp(torch.randn(INPUTS, generator=generator))
    common = torch.randn(1000, 40, generator=generator) @ mixing
    x = (common + 0.2 * torch.randn(1000, INPUTS, generator=generator)) * sizes
    return InputMoments(second=x.T @ x / len(x), magnitude=x.abs().mean(0))


def read(method: QuantizationMethod, tensors: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the projections' weights as the plugin that reads them multiplies with them."""
    spec = LinearSpec(
        name="up_gate", parts=("up", "gate"), in_features=INPUTS, output_sizes=(OUTPUTS, OUTPUTS),
        bias=False, dtype="float32", device="cpu",
    )  # fmt: skip
    assert method.why_unsupported(spec) is None
    layer = Linear(spec, method.method_for(spec))
    named = zip(spec.parts, tensors, strict=True)
    load(layer, {f"{part}.{name}": t for part, own in named for name, t in own.items()})
    layer.finish_loading()
    return list(layer.method.dequantize(layer).split(OUTPUTS))


def twice(weight: Tensor) -> list[Tensor]:
    """Return two projections of one weight, which a quantizer may change."""
    return [weight.clone(), weight.clone()]


def loss(given: Tensor, rounded: Tensor, second: Tensor) -> float:
    """Return the mean square by which the outputs change."""
    wrong = (rounded - given).double()
    return float(((wrong @ second.double()) * wrong).sum())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_is_written_is_read_as_weights_near_those_given(case: str, dtype: str) -> None:
    quantizer_class, method_class, options = CASES[case]
    quantizer = quantizer_class(QuantizerOptions(dtype=dtype, **options))
    given = weights()

    written = quantizer.quantize([w.clone() for w in given], moments())

    config = quantizer.config(["lm_head"])
    found = read(method_class(config), written)
    bits = options.get("bits", 8 if case in ("fp8", "int8") else 4)
    for weight, rounded in zip(given, found, strict=True):
        error = float((rounded - weight).norm() / weight.norm())
        # Compensation moves weights on purpose, and e4m3 has three bits of mantissa.
        assert 0 < error < {2: 1.5, 3: 0.7, 4: 0.4, 8: 0.03}[bits]


@pytest.mark.parametrize("case", CASES)
def test_equal_arguments_give_equal_bits(case: str) -> None:
    quantizer_class, _, options = CASES[case]
    quantizer = quantizer_class(QuantizerOptions(dtype="bfloat16", **options))

    first = quantizer.quantize(weights(), moments())
    again = quantizer.quantize(weights(), moments())

    for one, other in zip(first, again, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8))
                   for name in one)  # fmt: skip


def naive_gptq(weight: Tensor, second: Tensor, rounding: Rounding, damping: float) -> Tensor:
    """Round column by column, each time with the inverse of what is left, in float64."""
    weight, size = weight.double().clone(), rounding.group_size or weight.shape[1]
    left = second.double() + damping * second.diagonal().double().mean() * torch.eye(len(second))
    rounded = torch.empty_like(weight)
    for i in range(weight.shape[1]):
        if i % size == 0:
            scales, zeros = rounding.grid(weight[:, i : i + size].float())
        rounded[:, i] = rounding.rounded(weight[:, i, None].float(), scales, zeros)[:, 0]
        inverse = torch.linalg.inv(left[i:, i:])
        wrong = (weight[:, i] - rounded[:, i]) / inverse[0, 0]
        weight[:, i:] -= wrong[:, None] * inverse[0]
    return rounded


@pytest.mark.parametrize("group_size", [32, 96, -1])
def test_gptq_is_the_optimal_brain_update_done_at_once(group_size: int) -> None:
    given, seen = weights()[0], moments()
    options = evolve(OPTIONS, group_size=group_size, damping=0.02)
    quantizer = GptqQuantizer(options)

    [found, _] = read(Gptq(quantizer.config([])), quantizer.quantize(twice(given), seen))

    rounding = Rounding(
        bits=4, group_size=None if group_size == -1 else group_size, symmetric=True,
        dtype="bfloat16", least_zero=1,
    )  # fmt: skip
    expected = naive_gptq(given, seen.second, rounding, 0.02)
    # A weight near the middle between two codes may go to either, and moves those that follow.
    same = (found - expected).abs() < 1e-4 * expected.abs().max()
    assert float(same.double().mean()) > 0.98
    assert loss(given, found, seen.second) < 1.02 * loss(given, expected.float(), seen.second)


@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"symmetric": False}])
def test_gptq_changes_the_outputs_far_less_than_rounding(options: dict[str, Any]) -> None:
    given, seen = weights()[0], moments()
    quantizer = GptqQuantizer(evolve(OPTIONS, group_size=32, **options))
    rounding = Rounding(bits=4, group_size=32, symmetric=options == {}, dtype="bfloat16")
    nearest = round_to_nearest(given, rounding)
    plain = rounding.rounded(
        rounding.pieces(given), nearest.scales, nearest.zeros
    ).flatten(1)  # fmt: skip

    found, _ = read(Gptq(quantizer.config([])), quantizer.quantize(twice(given), seen))

    assert loss(given, found, seen.second) < 0.5 * loss(given, plain, seen.second)


def test_gptq_writes_no_zero_point_that_wraps_round() -> None:
    """Stored minus one, a zero point 0 would be the greatest code to readers that do not wrap."""
    given = weights()[0].abs()
    quantizer = GptqQuantizer(evolve(OPTIONS, group_size=32, symmetric=False))

    written = quantizer.quantize(twice(given), moments())

    nibbles = written[0]["qzeros"].view(torch.uint8)
    assert max(int((nibbles & 15).max()), int((nibbles >> 4).max())) < 15
    assert int((nibbles & 15).min()) == 0


def test_gptq_leaves_out_inputs_that_are_always_zero() -> None:
    seen = moments()
    seen.second[7, :] = seen.second[:, 7] = 0

    factor, is_dead = inverse_factor(seen.second, 0.01)

    assert is_dead.nonzero().flatten().tolist() == [7]
    assert bool(factor.isfinite().all())


def test_gptq_damps_more_where_moments_are_not_definite() -> None:
    x = torch.ones(1, 64)  # of rank 1, and a little off by rounding

    factor, _ = inverse_factor(x.T @ x - 1e-2 * torch.eye(64), 1e-6)

    assert bool(factor.isfinite().all())


def test_awq_ranges_are_never_worse_than_whole_ones() -> None:
    given, seen = weights()[0], moments()
    rounding = Rounding(bits=4, group_size=32, symmetric=False, dtype="bfloat16")
    blocks = torch.zeros_like(seen.second)
    for first in range(0, INPUTS, 32):
        own = slice(first, first + 32)
        blocks[own, own] = seen.second[own, own]

    searched = search_ranges(given, seen.second, rounding)
    plain = round_to_nearest(given, rounding)

    losses = []
    for found in (searched, plain):
        weight = rounding.rounded(rounding.pieces(given), found.scales, found.zeros)
        losses.append(loss(given, weight.flatten(1), blocks))
    assert losses[0] < 0.95 * losses[1]


def test_awq_factors_lose_less_than_none() -> None:
    given, seen = weights(), moments()
    quantizer = AwqQuantizer(evolve(OPTIONS, group_size=32))

    factors = quantizer.smooth(given, seen)

    assert bool((factors > 0).all())
    smoothed = InputMoments(
        second=seen.second / factors / factors[:, None], magnitude=seen.magnitude / factors
    )
    config = Awq(quantizer.config([]))
    plain = read(config, quantizer.quantize([w.clone() for w in given], seen))
    scaled = read(config, quantizer.quantize([w * factors for w in given], smoothed))
    losses = [
        sum(loss(w, r, seen.second) for w, r in zip(given, found, strict=True))
        for found in (plain, [r / factors for r in scaled])
    ]
    assert losses[1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_scales_are_numbers_of_the_models_dtype_and_of_float16(dtype: str) -> None:
    """So that a reader that keeps them in either multiplies with the same weights."""
    rounding = Rounding(bits=4, group_size=32, symmetric=False, dtype=dtype)

    scales = rounding.storable(torch.logspace(-8, 3, 1000))

    for kept in (getattr(torch, dtype), torch.float16):
        assert torch.equal(scales.to(kept).float(), scales)
    assert float(scales.min()) == 2.0**-14


@pytest.mark.parametrize(
    ("quantizer", "options", "words"),
    [
        (Fp8Quantizer, {"group_size": 128}, "--method fp8 does not take --group-size"),
        (Int8Quantizer, {"symmetric": False}, "--method int8 does not take --symmetric"),
        (Int4Quantizer, {"act_order": True}, "--method int4 does not take --act-order; it takes: "),
        (AwqQuantizer, {"bits": 3}, "--bits is 3; --method awq writes 4."),
        (AwqQuantizer, {"damping": 0.1}, "--method awq does not take --damping"),
        (GptqQuantizer, {"bits": 5}, "--bits is 5; --method gptq writes 2 or 3 or 4 or 8."),
        (GptqQuantizer, {"group_size": 0}, "--group-size is 0; allowed: -1 or a positive"),
    ],
)
def test_option_that_is_not_served_is_named(
    quantizer: type[WeightQuantizer], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        quantizer(evolve(OPTIONS, **options))


def test_modules_that_are_left_alone_are_read_so() -> None:
    names = ["lm_head", "model.projector.up"]
    spec = LinearSpec(
        name="model.projector.up", parts=("up",), in_features=64, output_sizes=(32,),
        bias=False, dtype="float32", device="cpu",
    )  # fmt: skip

    for quantizer, method, _ in CASES.values():
        config = quantizer(OPTIONS).config(names)
        assert method(config).method_for(spec) is None
        # AutoAWQ takes a name for part of another.
        other = "model.projector.down" if method is Awq else "model.projector.upper"
        assert method(config).method_for(evolve(spec, name=other, parts=("x",))) is not None
