"""AWQ: the kit on checkpoints in the GEMM layout, what is left alone, and damaged ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from naive_packing import awq_tensors, groups_of, round_weight
from torch import Tensor

from quire.errors import CheckpointError, ConfigError
from quire.interfaces.quantization import EncodedWeight, LayerSpec, LinearSpec
from quire.layers.linear import Linear
from quire.testing import QuantizationMethodTests
from quire.testing.quantization_cases import load
from quire_quant.awq.method import Awq

CONFIG = {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
EXCLUDED = ("model.layers.3.mlp.down_proj",)


class AwqTests(QuantizationMethodTests):
    """The kit on checkpoints that are written by hand."""

    method = Awq

    def encode(self, weight: Tensor, spec: LayerSpec) -> EncodedWeight | None:
        groups = groups_of(weight.shape[1], self.config["group_size"])
        rounded = round_weight(weight, 4, groups)
        return EncodedWeight(tensors=awq_tensors(rounded), weight=rounded.weight)

    def weight_bytes(self, spec: LinearSpec) -> int | None:
        size = self.config["group_size"]
        groups = 1 if size == -1 else spec.in_features // size
        bias = spec.out_features * (4 if spec.dtype == "float32" else 2) if spec.bias else 0
        return spec.out_features * (spec.in_features + groups) // 2 + (
            2 * groups * spec.out_features + bias
        )


class TestAwq(QuantizationMethodTests):
    """As `quire plugins check` does it."""

    method = Awq


class TestGroups(AwqTests):
    config: ClassVar[Mapping[str, Any]] = {**CONFIG, "modules_to_not_convert": ["layers.3.mlp"]}
    excluded = EXCLUDED


class TestGroupsOnGPU(TestGroups):
    pytestmark = pytest.mark.gpu
    device = "cuda"


class TestWholeRows(AwqTests):
    config: ClassVar[Mapping[str, Any]] = {"w_bit": 4, "q_group_size": -1, "group_size": -1}


def spec_of(sizes: tuple[int, ...] = (32, 64), in_features: int = 64) -> LinearSpec:
    return LinearSpec(
        name="layers.0.fused" if len(sizes) > 1 else "layers.0.q_proj",
        parts=tuple("qkv"[i] + "_proj" for i in range(len(sizes))),
        in_features=in_features,
        output_sizes=sizes,
        bias=False,
        dtype="float32",
        device="cpu",
    )


def test_scale_that_is_not_finite_is_named() -> None:
    spec = spec_of()
    layer = Linear(spec, Awq(CONFIG).method_for(spec))
    tensors = {}
    for part, size in zip(spec.parts, spec.output_sizes, strict=True):
        rounded = round_weight(torch.randn(size, 64), 4, groups_of(64, 32))
        for name, tensor in awq_tensors(rounded).items():
            tensors[f"layers.0.{part}.{name}"] = tensor
    tensors["layers.0.k_proj.scales"][1, 7] = float("inf")
    load(layer, tensors)

    with pytest.raises(CheckpointError, match=r"k_proj\.scales' gives .* group 1 of output 7"):
        layer.finish_loading()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 8}, r"bits is 8; served is 4"),
        ({"group_size": None}, r"group_size is None"),
        ({"group_size": -2}, r"group_size is -2"),
        ({"zero_point": False}, r"zero_point is False; served is true"),
        ({"version": "gemv"}, r"version is 'gemv'; served is 'gemm'"),
        ({"version": 1}, r"version is 1"),
        ({"version": None, "format": "gemv"}, r"format is 'gemv'; served is 'gemm'"),
        ({"backend": "llm-awq"}, r"backend is 'llm-awq'"),
        ({"modules_to_not_convert": "lm_head"}, r"modules_to_not_convert is 'lm_head'"),
    ],
)
def test_config_that_nothing_serves_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Awq({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (spec_of(in_features=80), "inputs must be a multiple of 32; 80 is not, 64 or 96 would do"),
        (spec_of((32, 20)), "k_proj must be a multiple of 8; 20 is not, 16 or 24 would do"),
    ],
)
def test_sizes_that_cannot_be_cut_are_refused_with_those_that_can(
    spec: LinearSpec, words: str
) -> None:
    assert words in (Awq(CONFIG).why_unsupported(spec) or "")


def test_projections_of_one_product_are_left_alone_together() -> None:
    both = Awq({**CONFIG, "modules_to_not_convert": ["q_proj", "k_proj"]})
    one = Awq({**CONFIG, "modules_to_not_convert": ["k_proj"]})

    assert both.why_unsupported(spec_of()) is None
    assert both.method_for(spec_of()) is None
    assert "leaves layers.0.k_proj alone" in (one.why_unsupported(spec_of()) or "")
