"""Layers in e4m3: the kit on every format, and what only single layers show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from attrs import evolve
from e4m3_oracle import FORMS, Form, nearest, rounded_rows, rounded_static
from torch import Tensor

from quire.errors import CheckpointError
from quire.interfaces.quantization import EncodedWeight, LayerSpec, LinearSpec
from quire.layers.linear import Linear
from quire.layers.places import places_of_layer
from quire.testing import QuantizationMethodTests
from quire.testing.kit_quantization import QuantizationSubject, check_quantization
from quire_quant.fp8 import numbers, products
from quire_quant.fp8.method import Fp8
from quire_quant.fp8.products import Weight

E4M3 = torch.float8_e4m3fn
EVERY_CODE = torch.arange(256, dtype=torch.uint8).view(E4M3)


class TestFp8OnTheFly(QuantizationMethodTests):
    method = Fp8

    def rounded_input(self, x: Tensor, spec: LayerSpec) -> Tensor:
        return rounded_rows(x)

    def weight_bytes(self, spec: LinearSpec) -> int:
        bias = spec.out_features * getattr(torch, spec.dtype).itemsize if spec.bias else 0
        return spec.out_features * (spec.in_features + 4) + bias


class InForm(QuantizationMethodTests):
    """The kit on checkpoints of one form."""

    __test__ = False
    method = Fp8
    form: Form

    def encode(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight:
        found = self.form.encode(weight)
        # The kit gives every weight the shape that the layer registers.
        flat = {k: t.reshape(1) if t.dim() == 0 else t for k, t in found.tensors.items()}
        return EncodedWeight(tensors=flat, weight=found.weight)

    def rounded_input(self, x: Tensor, spec: LayerSpec) -> Tensor:
        return self.form.rounded_input(x.cpu()).to(x.device)


def kit_class(name: str, **more: Any) -> type[InForm]:
    form = FORMS[name]
    members = {"__test__": True, "form": form, "config": form.config, **more}
    return type(f"TestFp8_{name}", (InForm,), members)


TestOnGPU = kit_class("compressed-token", device="cuda")
TestStaticOnGPU = kit_class("fp8-static", device="cuda")
TestBlocksOnGPU = kit_class("fp8-blocks", device="cuda")
TestBlocks = kit_class("fp8-blocks")
TestSmallBlocks = kit_class("fp8-small-blocks")
TestStatic = kit_class("fp8-static")
TestFbgemm = kit_class("fbgemm")
TestCompressedWeightOnly = kit_class("compressed-weight-only")
LAYER = "model.layers.3.self_attn.qkv_proj"
TestCompressedToken = kit_class(
    "compressed-token",
    config={**FORMS["compressed-token"].config, "ignore": ["lm_head", r"re:.*\.3\.self_attn\..*"]},
    excluded=(LAYER,),
)
TestFp8Excluding = kit_class(
    "fp8-tensor",
    config={**FORMS["fp8-tensor"].config, "modules_to_not_convert": ["layers.3.self_attn"]},
    excluded=(LAYER,),
)
TestModelOptExcluding = kit_class(
    "modelopt",
    config={**FORMS["modelopt"].config, "exclude_modules": ["lm_head", "*.layers.3.self*"]},
    excluded=(LAYER,),
)


class TestQuantizedHead(QuantizationMethodTests):
    """Heads that are not ignored; a tied one has the embedding's weight, and inputs as they are."""

    method = Fp8
    config: ClassVar[Mapping[str, Any]] = {**FORMS["compressed-token"].config, "ignore": []}

    def encode(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight:
        return FORMS["compressed-token"].encode(weight)


def test_widening_by_bits_and_by_table_is_exact() -> None:
    finite = EVERY_CODE[~EVERY_CODE.float().isnan()]

    assert torch.equal(numbers.widened_weight(finite), finite.float())
    assert torch.equal(numbers.widened(finite), finite.float())
    assert numbers.widened(EVERY_CODE).isnan().sum() == 2


def test_rounding_is_to_the_nearest_even_number_and_saturates() -> None:
    x = torch.cat((torch.randn(4000) * 30, torch.tensor([500.0, -1e9, 0.0, 2.0**-10, 17.0, 19.0])))

    assert torch.equal(numbers.rounded(x, torch.ones(1)).double(), nearest(x))


def spec_of(*sizes: int, inputs: int = 48, dtype: str = "float32", **keys: Any) -> LinearSpec:
    parts = tuple("qkv"[: len(sizes)]) if len(sizes) > 1 else ("o",)
    given = {"name": "a.qkv" if len(sizes) > 1 else "a.o", "bias": False, "device": "cpu", **keys}
    return LinearSpec(parts=parts, in_features=inputs, output_sizes=sizes, dtype=dtype, **given)


def loaded(form: Form, spec: LinearSpec, weights: dict[str, Tensor], **other: Tensor) -> Linear:
    """Fill a layer's projections with encoded weights; `other` replaces tensors by their names."""
    layer = Linear(spec, Fp8(form.config).method_for(spec))
    tensors = {
        f"a.{part}.{name}": tensor
        for part, weight in weights.items()
        for name, tensor in form.encode(weight).tensors.items()
    }
    tensors |= {name.replace("__", "."): tensor for name, tensor in other.items()}
    layer.allocate()
    for name, place in places_of_layer(layer):
        place.view().copy_(tensors[name])
    layer.finish_loading()
    return layer


def test_projections_calibrated_apart_each_see_their_own_inputs() -> None:
    form, generator = FORMS["compressed-static"], torch.Generator().manual_seed(0)
    weights = {part: torch.randn(8, 48, generator=generator) for part in "qkv"}
    scales = {"a__q__input_scale": 0.01, "a__k__input_scale": 0.03, "a__v__input_scale": 0.01}
    given = {name: torch.tensor([scale]) for name, scale in scales.items()}
    layer = loaded(form, spec_of(8, 8, 8), weights, **given)
    x = torch.randn(3, 48, generator=generator)

    out = layer(x)

    exact = [
        rounded_static(x, scale) @ form.encode(weight).weight.T
        for weight, scale in zip(weights.values(), scales.values(), strict=True)
    ]
    assert torch.allclose(out.double(), torch.cat(exact, 1), rtol=1e-5, atol=1e-5)


def test_blocks_of_each_projection_begin_anew() -> None:
    form = FORMS["fp8-small-blocks"]
    weights = {part: torch.randn(20, 40) * 10.0**i for i, part in enumerate("qkv")}

    layer = loaded(form, spec_of(20, 20, 20, inputs=40), weights)

    assert layer.get_weight("weight_scale_inv").shape == (6, 2)
    exact = torch.cat([form.encode(weight).weight for weight in weights.values()])
    assert torch.allclose(layer.method.dequantize(layer).double(), exact, rtol=1e-6)


@pytest.mark.parametrize("wrong", [0.0, -0.5])
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("fp8-static", "weight_scale"),
        ("fp8-static", "input_scale"),
        ("fbgemm", "weight_scale"),
        ("fp8-small-blocks", "weight_scale_inv"),
    ],
)
def test_scale_that_is_not_positive_names_its_tensor(form: str, name: str, wrong: float) -> None:
    weights = {part: torch.randn(20, 48) for part in "qkv"}
    bad = FORMS[form].encode(weights["k"]).tensors[name].clone()
    bad.view(-1)[-1] = wrong

    with pytest.raises(CheckpointError, match=rf"tensor 'a\.k\.{name}' holds the scale {wrong:g}"):
        loaded(FORMS[form], spec_of(20, 20, 20), weights, **{f"a__k__{name}": bad})


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_uniform", [True, False], ids=["tensor", "rows"])
def test_call_of_scaled_mm_means_the_same_product(is_uniform: bool, has_bias: bool) -> None:
    """PyTorch runs it on a CPU as well, which tells whether scales and layouts are right."""
    x, weight = torch.randn(16, 64).bfloat16(), numbers.quantize_rows(torch.randn(32, 64))
    bias = torch.randn(32).bfloat16() if has_bias else None
    rows, scales = numbers.quantize_rows(x), weight.scales
    if is_uniform:
        scales = torch.full((32, 1), 0.01)
        rows = numbers.quantize_static(x, torch.tensor([0.02]))
    kept = Weight(values=weight.values, scales=scales, sizes=(32,), is_uniform=is_uniform)

    found = products._scaled_mm(rows, kept, bias, torch.bfloat16)

    wide = products._multiply_wide(numbers.dequantized(rows), kept, bias, torch.bfloat16)
    assert torch.allclose(found.float(), wide.float(), rtol=2**-7, atol=2**-8)


def test_drawn_scales_are_those_of_a_model() -> None:
    spec = spec_of(8, 8, 8)
    layer = Linear(spec, Fp8(FORMS["fp8-static"].config).method_for(spec))
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn(parameter.shape))

    layer.method.settle_drawn(layer)
    layer.finish_loading()

    assert layer.get_weight("weight_scale").unique().tolist() == [1.0]
    assert layer.get_weight("input_scale").tolist() == [1.0] * 3


@pytest.mark.parametrize("name", FORMS)
def test_bytes_that_are_foretold_are_those_that_stay(name: str) -> None:
    spec = spec_of(20, 20, 20)
    layer = Linear(spec, Fp8(FORMS[name].config).method_for(spec))
    foretold = layer.method.loaded_bytes(layer)

    layer = loaded(FORMS[name], spec, {part: torch.randn(20, 48) for part in "qkv"})

    assert sum(p.numel() * p.element_size() for p in layer.parameters()) == foretold


def test_wide_weight_of_a_layer_takes_no_memory_until_it_is_filled() -> None:
    spec = spec_of(8)
    layer = Linear(spec, Fp8({}).method_for(spec))

    assert layer.get_weight("weight").is_meta
    assert layer.method.loaded_bytes(layer) == 8 * (48 + 4)


def test_kit_sees_inputs_that_are_not_rounded_as_declared() -> None:
    form = evolve(FORMS["fp8-tensor"], inputs="plain")
    subject = QuantizationSubject(
        method=Fp8,
        config=form.config,
        encode=lambda weight, spec: form.encode(weight),
        rounded_input=lambda x, spec: form.rounded_input(x),
    )

    report = check_quantization(subject)

    assert [c.name for c in report.checks if c.outcome == "failed"] == ["product"]
