"""What a checkpoint's `quantization_config` says of the KV cache. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.errors import ConfigError

REMEDY = "--kv-cache-dtype bfloat16 keeps the cache wide, and fp8 quantizes it"
SCALES = ("k_scale", "v_scale", "kv_scale", "k_proj.output_scale", "v_proj.output_scale")
NOTHING = (None, "", "none", "None")


def kv_format_of(config: Any) -> str | None:
    """Return "fp8" where a `quantization_config` asks for it; None: the cache is not quantized.

    `kv_cache_scheme` is of compressed-tensors and of newer ModelOpt, `kv_cache_quant_algo` of
    ModelOpt. Raises: ConfigError for another format.
    """
    if not isinstance(config, Mapping):
        return None
    inner = config.get("quantization")
    config = inner if isinstance(inner, Mapping) else config
    algorithm = config.get("kv_cache_quant_algo")
    if algorithm not in NOTHING and algorithm != "FP8":
        raise ConfigError(f"kv_cache_quant_algo is {algorithm!r}; served: 'FP8'. {REMEDY}.")
    scheme = config.get("kv_cache_scheme")
    if scheme is None:
        return "fp8" if algorithm == "FP8" else None
    if scheme == "static":  # AutoFP8's word, whose only format is e4m3
        return "fp8"
    if not isinstance(scheme, Mapping):
        raise ConfigError(f"kv_cache_scheme is {scheme!r}, not an object. {REMEDY}.")
    wanted = {"type": ("float",), "num_bits": (8,), "dynamic": (False, None)}
    wanted["strategy"] = ("tensor", "attn_head", None)
    for key, allowed in wanted.items():
        found = scheme.get(key)
        if not any(found == one and type(found) is type(one) for one in allowed):
            listed = " or ".join(repr(one) for one in allowed if one is not None)
            raise ConfigError(f"kv_cache_scheme: {key} is {found!r}; served: {listed}. {REMEDY}.")
    return "fp8"


def is_scale(name: str) -> bool:
    """Answer whether a tensor of this name is a scale of keys or values."""
    return name.endswith(tuple(f".{scale}" for scale in SCALES))
