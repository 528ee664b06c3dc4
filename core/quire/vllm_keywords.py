"""vLLM's keywords of `LLM(...)` that say what is so in Quire anyway, so that its scripts run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quire.config import OPTIONS
from quire.errors import ConfigError

# Each with the values that ask for nothing that Quire does not do.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "distributed_executor_backend": (None, "uni", "mp"),
    "disable_log_stats": (True, False),
    "disable_custom_all_reduce": (True, False),
    "enable_chunked_prefill": (None, True),
    "enable_lora": (False,),
    "disable_hybrid_kv_cache_manager": (None, False),
    "disable_sliding_window": (False,),
    "cpu_offload_gb": (0,),
    "swap_space": (0, 4),
    "tokenizer_mode": ("auto", "hf"),
    "config_format": ("auto", "hf"),
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "hf_overrides": (None, {}),
    "limit_mm_per_prompt": (None, {}),
    "speculative_config": (None,),
    "compilation_config": (None,),
    "max_logprobs": (20,),
}

# What vLLM says by other names than `task`.
TASKS = {
    ("runner", "pooling"): "pooling",
    ("convert", "embed"): "embed",
    ("convert", "classify"): "classify",
}


def without_neutral(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without those of vLLM's that ask for nothing.

    Raises: ConfigError for one that asks for what Quire does not do.
    """
    kept = {}
    for name, value in options.items():
        if isinstance(value, str) and (name, value) in TASKS:
            kept["task"] = TASKS[name, value]
            continue
        if name in OPTIONS or name not in NEUTRAL:
            kept[name] = value
        elif not any(type(value) is type(one) and value == one for one in NEUTRAL[name]):
            allowed = ", ".join(map(repr, NEUTRAL[name]))
            shown = repr(value)[:60]
            raise ConfigError(
                f"{name} is {shown}, which this version of Quire does not do; allowed: {allowed}."
            )
    return kept
