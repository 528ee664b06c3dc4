"""config.json read by Transformers' own class for the architecture. Imports it when it is used."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from attrs import field, frozen

from quire.errors import ConfigError
from quire.interfaces.model_config import ModelConfig, refuse, shown

AUTO_MODELS = "models/auto/modeling_auto.py"
NAMES = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
CAUSAL = "AutoModelForCausalLM"
HEADS = "num_attention_heads"
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# What classes call the longest context.
LENGTHS = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "max_target_positions",
    "seq_length",
)


class Refusal(ConfigError):
    """Why a class is not served: what follows "it" in the error that a user sees."""


def is_causal_model(architecture: str) -> bool:
    """Answer whether Transformers has a causal model of this name."""
    return architecture in _causal_models()


@functools.cache
def _causal_models() -> frozenset[str]:
    """Return the names of its causal models, read from its source: importing it imports torch."""
    spec = importlib.util.find_spec("transformers")
    folders = () if spec is None else spec.submodule_search_locations or ()
    for path in filter(Path.is_file, (Path(folder) / AUTO_MODELS for folder in folders)):
        for statement in ast.parse(path.read_text("utf-8")).body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == NAMES:
                words = (node for node in ast.walk(statement) if isinstance(node, ast.Constant))
                return frozenset(str(word.value) for word in words)
    return frozenset()


@frozen(kw_only=True)
class AnyConfig(ModelConfig):
    """What the core reads, from a Transformers config; `given` is config.json itself.

    Keys that the class of Transformers does not know are ignored, as it does.
    """

    architecture: str = ""
    given: Mapping[str, Any] = field(factory=dict, repr=False)
    kv_elements: int = 0

    @classmethod
    def from_json(cls, given: Any, *, source: str = "config.json") -> Self:
        """Read a parsed config.json. Raises: ConfigError, with what Transformers says of it."""
        if not isinstance(given, Mapping):
            raise ConfigError(f"{source}: holds {shown(given)}; it must hold a JSON object.")
        named = given.get("architectures") or [""]
        architecture = next(filter(is_causal_model, named), named[0])
        found = transformers_config(architecture, given, source)
        text = found.get_text_config()
        text._source = source
        _check_sizes(text)
        heads, layers = _needed(text, HEADS), _needed(text, "num_hidden_layers")
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        if getattr(text, "multi_query", False):
            kv_heads = 1
        hidden = _needed(text, "hidden_size")
        head_dim = _own_head_dim(text) or hidden // heads
        ends = getattr(text, "eos_token_id", None)
        ends = () if ends is None else ends
        dtype = getattr(found, "dtype", None)
        return cls(
            source=source,
            architecture=architecture,
            given=given,
            vocab_size=_needed(text, "vocab_size"),
            hidden_size=hidden,
            num_hidden_layers=layers,
            max_position_embeddings=_needed(text, *LENGTHS),
            tie_word_embeddings=bool(getattr(found, "tie_word_embeddings", False)),
            eos_token_ids=(ends,) if isinstance(ends, int) else tuple(ends),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
            kv_elements=2 * layers * kv_heads * head_dim,
        )

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to the KV cache, of all layers."""
        return self.kv_elements


def transformers_config(architecture: str, given: Mapping[str, Any], source: str) -> Any:
    """Return the Transformers config of a class. Raises: ConfigError with its own words."""
    config_class = _config_class(architecture, given, source)
    try:
        # Numbers such as Infinity, which JSON has not.
        decoded = getattr(config_class, "_decode_special_floats", dict)
        found = config_class.from_dict(dict(decoded(given)))
    except Exception as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{source}: {config_class.__name__} refuses it: {words}") from error
    found._source = source
    return found


def model_class(architecture: str, given: Mapping[str, Any], source: str) -> Any:
    """Return the class of Transformers, or else the one that the checkpoint carries.

    Raises: ConfigError where there is neither.
    """
    import transformers

    if is_causal_model(architecture):
        return getattr(transformers, architecture)
    return _carried(CAUSAL, given, source)


def _config_class(architecture: str, given: Mapping[str, Any], source: str) -> Any:
    auto_map = given.get("auto_map") or {}
    if not is_causal_model(architecture) and "AutoConfig" in auto_map:
        return _carried("AutoConfig", given, source)
    return model_class(architecture, given, source).config_class


def _carried(kind: str, given: Mapping[str, Any], source: str) -> Any:
    """Import a class of a checkpoint's own code, which --trust-remote-code has allowed."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    place = (given.get("auto_map") or {}).get(kind)
    if not isinstance(place, str):
        raise ConfigError(
            f"{source}: auto_map names no {kind}; a model of the checkpoint's own code needs it."
        )
    try:
        return get_class_from_dynamic_module(place, str(Path(source).parent))
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"{source}: {kind} {place!r} cannot be loaded: {words}") from error


def named_true(given: Mapping[str, Any], word: str) -> list[str]:
    """Return the keys with a word in their name that are true, those of parts as `part.key`."""
    found = [name for name, value in given.items() if word in str(name) and value is True]
    for name, part in given.items():
        if isinstance(part, Mapping):
            found += [f"{name}.{key}" for key in named_true(part, word)]
    return found


def undivided(config: Any) -> list[str]:
    """Return what does not divide, and explains what a class may fail with, by its keys."""
    heads = getattr(config, HEADS, None)
    found = []
    for name, divides in (("num_key_value_heads", False), ("hidden_size", True)):
        value = config.__dict__.get(name)
        if not (isinstance(heads, int) and isinstance(value, int)):
            continue
        rest = value % heads if divides else heads % value
        if rest and not (divides and config.__dict__.get("head_dim")):
            found.append(f"{name} is {value}, {HEADS} {heads}")
    return found


def _check_sizes(config: Any) -> None:
    """Raise ConfigError for what no class can have, and would not name."""
    for name in ("num_key_value_heads", "head_dim"):
        value = config.__dict__.get(name)
        if isinstance(value, int) and value < 1:
            raise refuse(config._source, name, value, "whole numbers from 1 or null")
    counts = (getattr(config, name, None) for name in NUM_EXPERTS)
    most = next((count for count in counts if isinstance(count, int)), None)
    top_k = getattr(config, "num_experts_per_tok", None)
    if isinstance(top_k, int) and most and top_k > most:
        raise refuse(config._source, "num_experts_per_tok", top_k, f"up to {most}, all experts")


def _own_head_dim(config: Any) -> int | None:
    """Return `head_dim` where it is the same in all layers."""
    with contextlib.suppress(Exception):  # Transformers has an error of its own where it is not
        found: int | None = getattr(config, "head_dim", None)
        return found
    return None


def _needed(config: Any, *names: str) -> int:
    """Return the first of these keys that there is. Raises: ConfigError where there is none."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    more = f" (or one of {', '.join(names[1:])})" if names[1:] else ""
    recurrent = " One without attention, as Mamba and RWKV, is not served."
    raise ConfigError(
        f"{config._source}: {names[0]}{more} is {shown(getattr(config, names[0], None))}; a model "
        f"that Transformers builds for Quire needs a whole number there."
        f"{recurrent if names[0] == HEADS else ''}"
    )
