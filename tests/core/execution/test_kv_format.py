"""What a checkpoint's quantization_config says of the KV cache."""

from __future__ import annotations

from typing import Any

import pytest

from quire.errors import ConfigError
from quire.execution.kv_format import kv_format_of

SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
FP8 = {
    "compressed-tensors": {"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME},
    "a scale a head": {"kv_cache_scheme": {**SCHEME, "strategy": "attn_head"}},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    "modelopt, newer": {"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}},
    "AutoFP8": {"quant_method": "fp8", "kv_cache_scheme": "static"},
    "modelopt, nested": {"quantization": {"kv_cache_quant_algo": "FP8"}},
}
NOTHING: dict[str, Any] = {
    "no quantization": None,
    "weights alone": {"quant_method": "fp8"},
    "null": {"kv_cache_scheme": None},
    "no algorithm": {"kv_cache_quant_algo": None},
}
REFUSED = {
    "kv_cache_quant_algo is 'NVFP4'; served: 'FP8'": {"kv_cache_quant_algo": "NVFP4"},
    "num_bits is 4; served: 8": {"kv_cache_scheme": {**SCHEME, "num_bits": 4}},
    "type is 'int'; served: 'float'": {"kv_cache_scheme": {**SCHEME, "type": "int"}},
    "dynamic is True; served: False": {"kv_cache_scheme": {**SCHEME, "dynamic": True}},
    "strategy is 'group'": {"kv_cache_scheme": {**SCHEME, "strategy": "group"}},
    "kv_cache_scheme is 'fp8', not an object": {"kv_cache_scheme": "fp8"},
}


@pytest.mark.parametrize("config", FP8.values(), ids=FP8)
def test_scheme_of_8_bit_floats_asks_for_fp8(config: dict[str, Any]) -> None:
    assert kv_format_of(config) == "fp8"


@pytest.mark.parametrize("config", NOTHING.values(), ids=NOTHING)
def test_config_without_a_scheme_asks_for_nothing(config: Any) -> None:
    assert kv_format_of(config) is None


@pytest.mark.parametrize(("words", "config"), REFUSED.items(), ids=REFUSED)
def test_other_schemes_are_refused_with_the_key_and_a_remedy(
    words: str, config: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        kv_format_of(config)

    assert words in str(caught.value)
    assert "--kv-cache-dtype bfloat16 keeps the cache wide" in str(caught.value)
