"""config.json keys that the Llama-like families share. Never imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from quire.interfaces.model_config import ModelConfig, flag, key, one_of, real, refuse, whole
from quire.interfaces.rope import RopeParameters, rope_key

FULL, SLIDING = "full_attention", "sliding_attention"


@frozen(kw_only=True)
class DecoderConfig(ModelConfig):
    """Keys of a decoder with grouped-query attention, rotary embeddings and a gated MLP.

    A key whose default follows from others is kept as `given_...`; its property resolves it.
    """

    intermediate_size: int = whole(11008, 1, 2**20)
    num_attention_heads: int = whole(32, 1, 1024)
    given_num_kv_heads: int | None = whole(
        None, 1, 1024, optional=True, names=("num_key_value_heads",)
    )
    given_head_dim: int | None = whole(None, 1, 4096, optional=True, names=("head_dim",))
    hidden_act: str | None = one_of("silu", ("silu", "swish"))
    rms_norm_eps: float = real(1e-6, 0.0, 1.0)
    rope: RopeParameters = rope_key()  # noqa: RUF009 - an attrs field

    def check(self) -> None:
        """Check that heads divide what they share."""
        heads = self.num_attention_heads
        if self.given_head_dim is None and self.hidden_size % heads:
            divisors = f"divisors of hidden_size, {self.hidden_size}, where head_dim is not given"
            raise refuse(self.source, "num_attention_heads", heads, divisors)
        if heads % self.num_kv_heads:
            divisors = f"divisors of num_attention_heads, {heads}"
            raise refuse(self.source, "num_key_value_heads", self.num_kv_heads, divisors)
        self.rope.check_head_dim(self.head_dim, self.source)

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.given_num_kv_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.given_head_dim or self.hidden_size // self.num_attention_heads

    @property
    def longest_model_len(self) -> int:
        """What the RoPE scaling is made for, in tokens."""
        return self.rope.longest_context

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token adds to the KV cache, of all layers."""
        return 2 * self.num_hidden_layers * self.num_kv_heads * self.head_dim


def layer_types_key() -> Any:
    """Declare `layer_types`: null, or full or sliding attention for each layer."""

    def parse(given: Mapping[str, Any], source: str) -> Any:
        value = given.get("layer_types")
        return tuple(value) if isinstance(value, list) else value

    def check(value: Any) -> bool:
        known = isinstance(value, tuple) and all(kind in (FULL, SLIDING) for kind in value)
        return value is None or known

    allowed = f'null, or a list of "{FULL}" and "{SLIDING}"'
    return key(None, check=check, allowed=allowed, names=("layer_types",), parse=parse)


def check_layer_types(config: DecoderConfig, layer_types: tuple[str, ...] | None) -> None:
    """Raise ConfigError unless there is one type for each layer, or none at all."""
    layers = config.num_hidden_layers
    if layer_types is not None and len(layer_types) != layers:
        entries = f"{layers} entries, one for each of num_hidden_layers"
        raise refuse(config.source, "layer_types", list(layer_types), entries)


def check_uniform_layers(
    config: DecoderConfig, layer_types: tuple[str, ...] | None, window: int | None
) -> None:
    """Raise ConfigError unless the types, where given, are all of the kind that the window says."""
    check_layer_types(config, layer_types)
    kind = FULL if window is None else SLIDING
    if set(layer_types or ()) - {kind}:
        only = f'null or only "{kind}", as sliding_window says'
        raise refuse(config.source, "layer_types", list(layer_types or ()), only)


@frozen(kw_only=True)
class WindowedConfig(DecoderConfig):
    """Keys of a decoder some of whose layers may see a sliding window only, as in Qwen2."""

    use_sliding_window: bool = flag(False)
    sliding_window: int | None = whole(4096, 1, 2**30, optional=True)
    max_window_layers: int = whole(28, 0, 2**30)
    layer_types: tuple[str, ...] | None = layer_types_key()

    def check(self) -> None:
        """Check that layers with a window have one."""
        super().check()
        check_layer_types(self, self.layer_types)
        if self.own_window is None and SLIDING in (self.layer_types or ()):
            window = f'without "{SLIDING}" unless use_sliding_window and sliding_window are set'
            raise refuse(self.source, "layer_types", list(self.layer_types or ()), window)

    @property
    def own_window(self) -> int | None:
        """The window of the layers that have one; None: none has."""
        return self.sliding_window or None if self.use_sliding_window else None

    def window(self, layer: int) -> int | None:
        """Return how many latest tokens a token sees in a layer, itself included; None: all."""
        if self.layer_types is not None:
            return self.own_window if self.layer_types[layer] == SLIDING else None
        return self.own_window if layer >= self.max_window_layers else None
