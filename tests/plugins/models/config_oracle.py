"""Compare a declared config with the real class of Transformers."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from transformers import PreTrainedConfig

from quire.interfaces.config_keys import HARMLESS_KEYS
from quire.interfaces.model_config import ModelConfig

# Under these names a config of ours keeps what Transformers resolves in place.
RESOLVED = {
    "num_key_value_heads": "num_kv_heads",
    "eos_token_id": "eos_token_ids",
    "rope_parameters": "rope",
    "hidden_activation": "hidden_act",
    "num_mtp_layers": "num_nextn_predict_layers",
}

# Keys whose default follows from others; the real class resolves them when it is made.
DERIVED = {"num_key_value_heads", "head_dim", "mlp_only_layers", "rope_parameters"}

# What checkpoints say of every RoPE type.
ROPE_SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attention_factor": 1.25,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}


def saved(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what the config writes to config.json."""
    given: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return given


def undeclared_keys(oracle: type[PreTrainedConfig], ours: type[ModelConfig]) -> set[str]:
    """Return keys of the real class that are neither declared nor harmless."""
    known = ours.keys() | HARMLESS_KEYS | {"dtype", "is_encoder_decoder"}
    return {field.name for field in dataclasses.fields(oracle)} - known


def plain(value: Any) -> Any:
    """Return a value of either side in one form."""
    if isinstance(value, list):
        return tuple(value)
    return value


def default_differences(oracle: PreTrainedConfig, ours: ModelConfig) -> dict[str, Any]:
    """Return the keys whose defaults differ, with both values."""
    differences = {}
    # A part of the rotary parameters, which are compared as a whole, and names of labels.
    declared = ours.keys() - {"original_max_position_embeddings", "id2label"}
    for field in (f for f in dataclasses.fields(oracle) if f.name in declared):
        name = field.name
        theirs = plain(getattr(oracle, name) if name in DERIVED else field.default)
        value = plain(getattr(ours, RESOLVED.get(name, name)))
        if name == "head_dim" and theirs is None:
            theirs = oracle.hidden_size // oracle.num_attention_heads
        if name == "eos_token_id":
            theirs = () if theirs is None else (theirs,)
        if name == "rope_parameters":
            value = {name: getattr(value, name, None) for name in theirs}
        if theirs != value:
            differences[name] = (theirs, value)
    return differences


def rope_differences(oracle: PreTrainedConfig, ours: Any) -> dict[str, Any]:
    """Return entries of the real class's RoPE parameters that ours reads otherwise."""
    found = {}
    for name, value in oracle.rope_parameters.items():
        if name != "type" and getattr(ours.rope, name) != value:
            found[name] = (value, getattr(ours.rope, name))
    return found
