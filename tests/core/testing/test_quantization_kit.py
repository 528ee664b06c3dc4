"""The kit passes right quantization methods, catches every broken one, and says what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
from attrs import evolve
from broken_methods import BROKEN, SAYS
from int8_weights import HiddenInt8, Int8, Packed

from quire.errors import ConfigError
from quire.interfaces.quantization import LayerSpec, LinearSpec
from quire.testing import QuantizationMethodTests
from quire.testing.kit_quantization import QuantizationSubject, check_quantization
from quire.testing.kit_report import PROFILES

# As many cases on a slow machine as on a fast one.
PATIENT = evolve(PROFILES["quick"], seconds=60)
EXCLUDED = ("model.layers.3.mlp.down_proj",)


class TestInt8(QuantizationMethodTests):
    method = Int8
    config: ClassVar[Mapping[str, Any]] = {"ignore": EXCLUDED}
    excluded = EXCLUDED

    def weight_bytes(self, spec: LinearSpec) -> int | None:
        bias = spec.out_features * (4 if spec.dtype == "float32" else 2) if spec.bias else 0
        return spec.out_features * (spec.in_features + 4) + bias


class TestHiddenInt8(QuantizationMethodTests):
    method = HiddenInt8


class TestPacked(QuantizationMethodTests):
    method = Packed


def subject_of(name: str) -> QuantizationSubject:
    method = BROKEN[name]
    if method.example_config:
        return QuantizationSubject(method=method, config=method.example_config)
    return QuantizationSubject(method=method, config={"ignore": EXCLUDED}, excluded=EXCLUDED)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_method_is_caught(name: str) -> None:
    report = check_quantization(subject_of(name), profile=PATIENT)

    failed = [check.detail for check in report.checks if check.outcome == "failed"]
    print(*failed)
    assert len(failed) == 1
    assert SAYS[name] in failed[0]


def test_case_is_told_in_words() -> None:
    report = check_quantization(subject_of("bias-forgotten"), profile=PATIENT)

    assert "through a linear of " in report.checks[-1].detail
    assert " with bias; float32; x contiguous; seed " in report.checks[-1].detail


class Unencoded(Packed):
    @classmethod
    def encode(cls, weight: object, spec: LayerSpec) -> None:
        return None


def test_format_that_nobody_can_write_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"o_proj.weight_packed is wanted.* Give `encode`"):
        check_quantization(QuantizationSubject(method=Unencoded, config={}))


class ServesNothing(Int8):
    def why_unsupported(self, spec: LayerSpec) -> str | None:
        return "it needs a moon"


def test_method_that_serves_nothing_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="on cpu: it needs a moon"):
        check_quantization(QuantizationSubject(method=ServesNothing, config={}))
