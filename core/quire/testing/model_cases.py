"""A tiny model as a value: its config.json, the lengths of its inputs, and how steps are cut."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
from attrs import Factory, field, frozen

from quire.errors import ConfigError
from quire.interfaces.model import Model, PoolingModel
from quire.interfaces.model_config import ModelConfig

# Small sizes, for every key that a model declares.
SIZES: dict[str, Any] = {
    "vocab_size": 83,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "dim": 32,
    "hidden_dim": 40,
    "n_heads": 4,
    "n_layers": 2,
}
# For models with latent attention, whose heads have none of their own in the cache.
LATENT_SIZES: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 12,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}
ROPE = "rope_parameters"
# The size of weights: small enough that rounding does not grow from layer to layer.
WEIGHT = 0.2
_FACTORS = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [1.0, 2.0, 4.0, 8.0]}
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def _rope(rope_type: str, **entries: Any) -> dict[str, Any]:
    return {ROPE: {"rope_type": rope_type, "rope_theta": 1000.0, **entries}}


_TWO_ROTATIONS = {
    "sliding_window_pattern": 2,
    ROPE: {
        "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
    },
}


# Changes of a key that many models have, by the key that must be declared.
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    ROPE: {
        "rope_theta 20": {ROPE: {"rope_type": "default", "rope_theta": 20.0}},
        "rope linear": _rope("linear", factor=4.0),
        "rope llama3": _rope("llama3", factor=8.0, **_LLAMA3),
        "rope yarn": _rope("yarn", factor=4.0, original_max_position_embeddings=16),
        # Within the original length, where the real class has the short factors.
        "rope longrope": _rope(
            "longrope", **_FACTORS, factor=2.0, original_max_position_embeddings=64
        ),
        "half of a head rotated": _rope("default", partial_rotary_factor=0.5),
    },
    "num_key_value_heads": {
        "one KV head": {"num_key_value_heads": 1},
        "as many KV heads as heads": {"num_key_value_heads": 4},
    },
    "head_dim": {"head_dim 24": {"head_dim": 24}},
    "tie_word_embeddings": {"tied embeddings": {"tie_word_embeddings": True}},
    "num_experts_per_tok": {"one expert a token": {"num_experts_per_tok": 1}},
    "q_lora_rank": {"queries of one product": {"q_lora_rank": None}},
    "kv_lora_rank": {
        "rope yarn with mscale": _rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            mscale=0.7,
            mscale_all_dim=1.1,
        ),
    },
    "v_head_dim": {"values wider than keys": {"v_head_dim": 26}},
    "topk_group": {"experts of one group": {"topk_group": 1}},
    "topk_method": {"the best groups only": {"topk_method": "group_limited_greedy"}},
    "first_k_dense_replace": {"experts in every layer": {"first_k_dense_replace": 0}},
    "decoder_sparse_step": {"experts in every second layer": {"decoder_sparse_step": 2}},
    "mlp_only_layers": {"no experts in layer 0": {"mlp_only_layers": [0]}},
    "sliding_window": {"sliding_window 3": {"sliding_window": 3}},
    "new_decoder_architecture": {
        "a norm each for attention and MLP": {"new_decoder_architecture": True, "num_kv_heads": 2},
        "one norm for attention and MLP": {
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
        "attention before the MLP, ALiBi and biases": {
            "parallel_attn": False,
            "multi_query": False,
            "alibi": True,
            "bias": True,
        },
    },
    "activation_function": {"gelu": {"activation_function": "gelu"}},
    "sliding_window_pattern": {
        "every second layer without window 3": {"sliding_window": 3, "sliding_window_pattern": 2}
    },
    "rope_local_base_freq": {"another rotation in layers with a window": _TWO_ROTATIONS},
    "query_pre_attn_scalar": {"query_pre_attn_scalar 16": {"query_pre_attn_scalar": 16}},
    "use_sliding_window": {
        "windows from layer 1 on": {
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
        },
        "windows in every layer": {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 0,
        },
    },
}
# Numbers that are tried for a key that holds one: the first that is allowed, and not the default.
NUMBERS = (0.1, 0.5, 3.0)


@frozen(kw_only=True)
class ModelSubject:
    """The model that is checked: its class, its keys, the architecture that it claims.

    `config` changes the tiny config.json. `oracle` is the class of Transformers that is meant,
    where it has another name than the architecture. `task` is the plugin's, where the class
    generates and the architecture has no head. `made` keeps what is dear to make.
    """

    model: type[Model]
    config_class: type[ModelConfig]
    architecture: str
    config: Mapping[str, Any] = Factory(dict)
    device: str = "cpu"
    oracle: str | None = None
    task: str = "generate"
    made: dict[Any, Any] = field(factory=dict, eq=False, repr=False)


@frozen(kw_only=True)
class ModelCase:
    """Sequences of some lengths through a model; `chunk`: so many tokens of each in a step.

    `variation` names what of config.json is not as in the plainest one.
    """

    lengths: tuple[int, ...]
    variation: str = ""
    chunk: int | None = None
    dtype: str = "float32"
    seed: int = 0

    @property
    def weights(self) -> int:
        """The seed of the weights: models are dear to make, so there are few."""
        return self.seed % 2

    def __str__(self) -> str:
        lengths = ", ".join(map(str, self.lengths))
        words = [f"sequences of {lengths} tokens", self.dtype]
        words += [f"in steps of {self.chunk}"] if self.chunk else []
        words += [f"config.json with {self.variation}"] if self.variation else []
        return f"{'; '.join(words)}; seed {self.seed}"


def given_by(subject: ModelSubject) -> str:
    """Return what the model gives: logits, vectors of tokens, or scores of sequences."""
    if issubclass(subject.model, PoolingModel):
        return "vectors" if subject.model.scores is PoolingModel.scores else "scores"
    return "logits" if subject.task == "generate" else "vectors"


def computes_whole(subject: ModelSubject) -> bool:
    """Answer whether the model is an encoder, which computes a sequence in one step."""
    if not issubclass(subject.model, PoolingModel):
        return False
    return subject.config_class.from_json(tiny_config(subject)).is_encoder


def tiny_config(subject: ModelSubject) -> dict[str, Any]:
    """Return the plainest config.json: small sizes for the keys that the model declares."""
    declared = subject.config_class.keys()
    all_sizes = SIZES | LATENT_SIZES if "kv_lora_rank" in declared else SIZES
    sizes = {name: value for name, value in all_sizes.items() if name in declared}
    return {**sizes, **subject.config}


def config_json(subject: ModelSubject, variation: str = "") -> dict[str, Any]:
    """Return the config.json of a variation."""
    changes = variations(subject)[variation] if variation else {}
    return {**tiny_config(subject), **copy.deepcopy(changes)}


def variations(subject: ModelSubject) -> dict[str, dict[str, Any]]:
    """Return the changes of config.json that the model honours, by what they are in words."""
    if "variations" not in subject.made:
        found: dict[str, dict[str, Any]] = {}
        plain = tiny_config(subject)
        has_head = given_by(subject) == "logits"
        for name, changes in _candidates(subject.config_class):
            if "tie_word_embeddings" in changes and not has_head:
                continue
            if all(plain.get(key) == value for key, value in changes.items()):
                continue
            with contextlib.suppress(ConfigError):
                subject.config_class.from_json({**plain, **changes})
                found.setdefault(name, changes)
        subject.made["variations"] = found
    return dict(subject.made["variations"])


def _candidates(config_class: type[ModelConfig]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield changes of the keys that a model declares."""
    declared = config_class.keys()
    for key, changes in CHANGES.items():
        # Where windows are switched on by a key of their own, this one alone does nothing.
        if key in declared and not (key == "sliding_window" and "use_sliding_window" in declared):
            yield from changes.items()
    for attribute in attrs.fields(config_class):
        if attribute.metadata.get("key") and not attribute.metadata["parse"]:
            yield from _of_plain_key(attribute)


def _of_plain_key(attribute: attrs.Attribute[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield changes of a key that is true or false, or holds a number with a point."""
    key, default = (attribute.metadata["names"] or (attribute.name,))[0], attribute.default
    if isinstance(default, bool) and key not in CHANGES:
        yield f"{key} {str(not default).lower()}", {key: not default}
    if isinstance(default, float):
        for number in NUMBERS:
            if number != default:
                yield f"another {key}", {key: number}


def draw_sequences(case: ModelCase, vocab_size: int) -> list[list[int]]:
    """Draw the token ids of the case."""
    generator = random.Random(case.seed)
    return [[generator.randrange(vocab_size) for _ in range(n)] for n in case.lengths]
