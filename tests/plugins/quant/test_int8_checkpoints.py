"""int8 from `int-quantized` checkpoints: the kit on every scheme, static inputs, and damage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from attrs import evolve
from torch import Tensor

from quire.errors import CheckpointError, ConfigError
from quire.interfaces.quantization import (
    EmbeddingSpec,
    EncodedWeight,
    LayerSpec,
    LinearSpec,
)
from quire.layers.linear import Linear
from quire.testing import QuantizationMethodTests
from quire.testing.quantization_cases import load
from quire_quant.int8 import product
from quire_quant.int8.method import Int8

WEIGHTS = {
    "num_bits": 8,
    "type": "int",
    "strategy": "channel",
    "symmetric": True,
    "dynamic": False,
}
INPUTS = {
    "num_bits": 8,
    "type": "int",
    "strategy": "token",
    "symmetric": True,
    "dynamic": True,
}
STATIC = {**INPUTS, "strategy": "tensor", "dynamic": False}
INPUT_SCALE, INPUT_ZERO = 0.03, -17
SPEC = LinearSpec(
    name="layers.0.gate_up_proj",
    parts=("gate_proj", "up_proj"),
    in_features=64,
    output_sizes=(16, 24),
    bias=False,
    dtype="float32",
    device="cpu",
)


def config(
    inputs: dict[str, Any] | None = INPUTS, *, ignore: tuple[str, ...] = (), **weights: Any
) -> dict[str, Any]:
    group = {
        "targets": ["Linear"],
        "weights": {**WEIGHTS, **weights},
        "input_activations": inputs,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": list(ignore),
        "config_groups": {"group_0": group},
    }


def encoded(weight: Tensor, settings: dict[str, Any], input_scale: float) -> EncodedWeight:
    """Round a projection with scales of its tensor, its rows, or groups in them."""
    weights, inputs = settings["weights"], settings["input_activations"]
    size = weights["group_size"] if weights["strategy"] == "group" else weight.shape[1]
    pieces = weight.double().unflatten(1, (-1, size))
    largest = pieces.abs().amax(-1)
    if weights["strategy"] == "tensor":
        largest = largest.amax()
    # As weight-only layers keep them, so that what is compared is what is stored.
    scale = (largest / 127).half().double()
    wide = scale if scale.dim() == 0 else scale[..., None]
    values = (pieces / wide).round().clamp(-128, 127)
    tensors = {
        "weight": values.flatten(1).to(torch.int8),
        "weight_scale": scale.float().view(-1) if scale.dim() == 0 else scale.float(),
    }
    if inputs is not None and not inputs["dynamic"]:
        tensors["input_scale"] = torch.tensor([input_scale])
        if not inputs["symmetric"]:
            tensors["input_zero_point"] = torch.tensor([INPUT_ZERO], dtype=torch.int8)
    return EncodedWeight(tensors=tensors, weight=(values * wide).flatten(1))


class StoredTests(QuantizationMethodTests):
    """The kit on checkpoints that are written number by number."""

    method = Int8

    @property
    def settings(self) -> dict[str, Any]:
        return self.config["config_groups"]["group_0"]

    def encode(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        return encoded(weight, self.settings, INPUT_SCALE)

    def weight_bytes(self, spec: LinearSpec) -> int:
        bias = spec.out_features * getattr(torch, spec.dtype).itemsize if spec.bias else 0
        inputs, each = self.settings["input_activations"], 4
        if inputs is None:
            size = self.settings["weights"].get("group_size") or spec.in_features
            each = 3 * (spec.in_features // size)
        elif not inputs["symmetric"]:
            each = 8
        return spec.out_features * (spec.in_features + each) + bias


class TestTokens(StoredTests):
    config: ClassVar = config()


class TestTokensWithScaleOfWholeProjections(StoredTests):
    config: ClassVar = config(strategy="tensor")


class TestStaticInputs(StoredTests):
    config: ClassVar = config(STATIC)


class TestStaticInputsWithZeroPoints(StoredTests):
    config: ClassVar = config({**STATIC, "symmetric": False})


class TestStaticInputsWithoutOneDnn(TestStaticInputsWithZeroPoints):
    @pytest.fixture(autouse=True)
    def _plain(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(product, "packs", lambda: False)


class TestWeightsAlone(StoredTests):
    config: ClassVar = config(None)


class TestWeightsAloneInGroups(StoredTests):
    config: ClassVar = config(None, strategy="group", group_size=16)


class TestWeightsAloneWithScaleOfWholeProjections(StoredTests):
    config: ClassVar = config(None, strategy="tensor")


def filled(
    settings: dict[str, Any], damage: Callable[[dict[str, Tensor]], Any] = lambda _: None
) -> tuple[Linear, list[Tensor]]:
    """Return a layer and the weights that its projections stand for; damaged before it loads."""
    tensors, exact = {}, []
    for i, (part, size) in enumerate(zip(SPEC.parts, SPEC.output_sizes, strict=True)):
        weight = torch.randn(size, 64, generator=torch.Generator().manual_seed(i))
        code = encoded(weight, settings["config_groups"]["group_0"], INPUT_SCALE * (i + 1))
        exact.append(code.weight)
        tensors |= {f"layers.0.{part}.{name}": t for name, t in code.tensors.items()}
    damage(tensors)
    layer = Linear(SPEC, Int8(settings).method_for(SPEC))
    load(layer, tensors)
    layer.finish_loading()
    return layer, exact


@pytest.mark.parametrize("symmetric", [True, False])
def test_projections_with_inputs_of_different_scales_are_multiplied_apart(symmetric: bool) -> None:
    layer, exact = filled(config({**STATIC, "symmetric": symmetric}))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(9))

    out = layer(x).split(SPEC.output_sizes, 1)

    zero = 0 if symmetric else INPUT_ZERO
    for i, (found, weight) in enumerate(zip(out, exact, strict=True)):
        scale = torch.tensor(INPUT_SCALE * (i + 1)).double()
        rounded = ((x.double() / scale + zero).round().clamp(-128, 127) - zero) * scale
        torch.testing.assert_close(found.double(), rounded @ weight.T, rtol=1e-5, atol=1e-5)
    assert layer.method.rounded_input(layer, x) is None


def test_row_with_nan_gives_nan_with_static_inputs_and_others_do_not() -> None:
    layer, _ = filled(config(STATIC))
    x = torch.randn(3, 64)
    x[1, 7] = float("nan")

    out = layer(x)

    assert bool(out[1].isnan().all())
    assert bool(out[[0, 2]].isfinite().all())


@pytest.mark.parametrize(
    ("inputs", "name"), [(INPUTS, "weight_scale"), (STATIC, "input_scale"), (None, "weight_scale")]
)
def test_scale_that_is_not_a_number_is_named(inputs: dict[str, Any] | None, name: str) -> None:
    def damage(tensors: dict[str, Tensor]) -> None:
        tensors[f"layers.0.up_proj.{name}"].view(-1)[0] = float("nan")

    with pytest.raises(CheckpointError, match=rf"'layers\.0\.up_proj\.{name}' h.* the scale nan"):
        filled(config(inputs), damage)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (config(num_bits=4), "weights: num_bits is 4; int8 reads 8"),
        (config(symmetric=False), "weights: symmetric is False; int8 reads True"),
        (config(strategy="group", group_size=32), "strategy is 'group'; int8 reads 'channel' or"),
        (config({**INPUTS, "symmetric": False}), "input_activations: symmetric is False"),
        (config({**INPUTS, "strategy": "tensor"}), "strategy is 'tensor'; int8 reads 'token'"),
        (config({**STATIC, "strategy": "token"}), "strategy is 'token'; int8 reads 'tensor'"),
        (config({**INPUTS, "type": "float"}), "input_activations: type is 'float'"),
        (config(None, strategy="group", group_size=3), "group_size is 3"),
        (config(None, strategy="group", group_size=32, actorder="group"), "actorder is 'group'"),
    ],
)
def test_unknown_scheme_is_refused_by_its_key(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Int8(settings)


def test_projections_that_are_kept_apart_are_refused() -> None:
    why = Int8(config(ignore=("layers.0.up_proj",))).why_unsupported(SPEC) or ""

    assert "layers.0.up_proj: None" in why


def test_inputs_that_make_no_groups_are_refused() -> None:
    method = Int8(config(None, strategy="group", group_size=32))

    assert "72 is not, 64 or 96 would do" in (
        method.why_unsupported(evolve(SPEC, in_features=72)) or ""
    )


def test_heads_of_a_checkpoint_are_quantized_unless_ignored() -> None:
    head = EmbeddingSpec(
        name="lm_head", num_embeddings=32, embedding_dim=64, is_head=True,
        dtype="float32", device="cpu",
    )  # fmt: skip

    assert Int8(config(ignore=("lm_head",))).method_for(head) is None
    assert Int8(config()).method_for(head) is not None
    assert Int8(config()).method_for(evolve(head, is_head=False)) is None
