"""Layers in e4m3 by their kernels, in Triton's interpreter where there is no GPU: the kit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from e4m3_oracle import FORMS, Form, rounded_rows
from torch import Tensor

from quire.interfaces.quantization import EncodedWeight, LayerSpec, LinearSpec
from quire.layers.linear import Linear
from quire.layers.places import places_of_layer
from quire.testing import QuantizationMethodTests
from quire.testing.kit_report import Profile
from quire_kernels import fp8, ops, with_cpu
from quire_quant.fp8.method import Fp8

pytest.importorskip("triton")
from quire_kernels import fp8_gemm, fp8_gemv, fp8_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def everywhere() -> Iterator[None]:
    """Take the kernels on a CPU, too; programs make more there, each takes milliseconds."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            plan = fp8_gemv.plan
            few = lambda num_out, size: plan(num_out, size) and (64, 256, 4)  # noqa: E731
            patch.setattr(fp8_gemv, "plan", few)
        patch.setattr(fp8, "computes_e4m3", lambda device: True)
        patch.setattr(fp8, "has_room_for_tiles", lambda device: True)
        patch.setattr(with_cpu, "kernels", lambda: None)
        yield


FEW = Profile(name="few", seconds=2, examples=6, longest=0, shrink_s=0, small=True, least=2)


class TestOnTheFly(QuantizationMethodTests):
    method = Fp8
    device = DEVICE
    profile = FEW

    def rounded_input(self, x: Tensor, spec: LayerSpec) -> Tensor:
        return rounded_rows(x.cpu()).to(x.device)


class InForm(QuantizationMethodTests):
    __test__ = False
    method = Fp8
    device = DEVICE
    profile = FEW
    form: ClassVar[Form]

    def encode(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight:
        found = self.form.encode(weight)
        flat = {k: t.reshape(1) if t.dim() == 0 else t for k, t in found.tensors.items()}
        return EncodedWeight(tensors=flat, weight=found.weight)

    def rounded_input(self, x: Tensor, spec: LayerSpec) -> Tensor:
        return self.form.rounded_input(x.cpu()).to(x.device)


def kit_class(name: str) -> type[InForm]:
    members = {"__test__": True, "form": FORMS[name], "config": FORMS[name].config}
    return type(f"Test_{name}", (InForm,), members)


TestBlocks = kit_class("fp8-blocks")
TestStatic = kit_class("fp8-static")

TestWeightOnly = kit_class("compressed-weight-only")


def layer_of(form: Form, dtype: str, in_features: int, out_features: int) -> Linear:
    spec = LinearSpec(
        name="a.o",
        parts=("o",),
        in_features=in_features,
        output_sizes=(out_features,),
        bias=False,
        dtype=dtype,
        device=DEVICE,
    )
    layer = Linear(spec, Fp8(form.config).method_for(spec))
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    for name, place in places_of_layer(layer):
        place.view().copy_(form.encode(weight).tensors[name.removeprefix("a.o.")])
    layer.finish_loading()
    return layer


class Launches(list[str]):
    """Names of the kernels that were launched."""

    def around(self, module: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        inner = getattr(module, name)

        def launch(*arguments: Any, **named: Any) -> None:
            self.append(f"{module.__name__.rpartition('.')[2]}.{name}")
            inner(*arguments, **named)

        patch.setattr(module, name, launch)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    found.around(fp8_rows, "quantize", monkeypatch)
    found.around(fp8_gemv, "linear", monkeypatch)
    found.around(fp8_gemm, "linear", monkeypatch)
    return found


@pytest.mark.parametrize(
    ("name", "num_rows", "product"),
    [
        ("compressed-token", 1, "fp8_gemv.linear"),
        ("compressed-token", 5, "fp8_gemm.linear"),
        ("compressed-static", 1, "fp8_gemv.linear"),
        ("compressed-static", 5, "fp8_gemm.linear"),
        ("fp8-blocks", 1, "fp8_gemv.linear"),
        ("fp8-blocks", 5, "fp8_gemm.linear"),
    ],
)
def test_layer_behind_a_norm_or_a_gate_takes_two_launches(
    name: str, num_rows: int, product: str, launches: Launches
) -> None:
    layer = layer_of(FORMS[name], "float16", 256, 128)
    x = torch.randn(num_rows, 256, dtype=torch.float16, device=DEVICE)
    norm = torch.ones(256, dtype=torch.float16, device=DEVICE)

    normed = layer.after_norm((x.clone(), x), (norm, 1e-5))
    gated = layer.after_silu_mul(torch.cat((x, x), 1))

    assert normed is not None
    assert gated is not None
    assert launches == ["fp8_rows.quantize", product] * 2
    plain = ops.rms_norm(2 * x, norm, 1e-5)
    assert torch.allclose(normed[0].float(), layer(plain).float(), rtol=0.05, atol=0.3)
    assert torch.equal(normed[1], 2 * x)


def test_weights_alone_in_e4m3_leave_norm_and_gate_to_the_model() -> None:
    layer = layer_of(FORMS["compressed-weight-only"], "float16", 256, 128)
    x = torch.randn(1, 256, dtype=torch.float16, device=DEVICE)

    assert layer.after_norm((x, x), (x[0], 1e-5)) is None
    assert layer.after_silu_mul(torch.cat((x, x), 1)) is None


def test_projections_calibrated_apart_leave_the_norm_to_the_model() -> None:
    form = FORMS["compressed-static"]
    layer = layer_of(form, "float16", 256, 128)
    layer.method.shares_input_scale = False

    x = torch.randn(1, 256, dtype=torch.float16, device=DEVICE)
    assert layer.after_norm((x, x), (x[0], 1e-5)) is None
