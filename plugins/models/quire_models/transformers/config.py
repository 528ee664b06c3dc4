"""config.json read by Transformers' own class for the architecture. Imports it when it is used."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from attrs import field, frozen

from quire.errors import ConfigError
from quire.interfaces.model_config import ModelConfig, shown

AUTO_MODELS = "models/auto/modeling_auto.py"
NAMES = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


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
        architecture = next(filter(is_causal_model, given.get("architectures", ())), "")
        found = transformers_config(architecture, given, source)
        heads, layers = _needed(found, "num_attention_heads"), _needed(found, "num_hidden_layers")
        kv_heads = getattr(found, "num_key_value_heads", None) or heads
        if getattr(found, "multi_query", False):
            kv_heads = 1
        hidden = _needed(found, "hidden_size")
        head_dim = getattr(found, "head_dim", None) or hidden // heads
        ends = getattr(found, "eos_token_id", None)
        ends = () if ends is None else ends
        dtype = getattr(found, "dtype", None)
        return cls(
            source=source,
            architecture=architecture,
            given=given,
            vocab_size=_needed(found, "vocab_size"),
            hidden_size=hidden,
            num_hidden_layers=layers,
            max_position_embeddings=_needed(found, "max_position_embeddings"),
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
    import transformers

    config_class = getattr(transformers, architecture).config_class
    try:
        found = config_class.from_dict(dict(given))
    except Exception as error:
        words = " ".join(str(error).split())
        raise ConfigError(f"{source}: {config_class.__name__} refuses it: {words}") from error
    found._source = source
    return found


def _needed(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(
            f"{config._source}: {name} is {shown(value)}; a model that Transformers builds for "
            f"Quire needs a whole number there."
        )
    return value
