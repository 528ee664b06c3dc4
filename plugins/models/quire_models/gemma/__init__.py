"""Models `gemma2` and `gemma3`, the latter for text."""

from collections.abc import Mapping
from typing import Any, Self

from attrs import evolve, frozen

from quire import hookimpl
from quire.interfaces.model_config import end_tokens, flag, one_of, real, refuse, whole
from quire.interfaces.plugin import ModelPlugin
from quire.interfaces.rope import RopeParameters, rope_key
from quire_models.decoder_config import (
    FULL,
    SLIDING,
    DecoderConfig,
    check_layer_types,
    layer_types_key,
)

QUIRE_API_VERSION = (1, 0)

ROPE = "rope_parameters"
OF_THE_WHOLE = ("architectures", "dtype", "eos_token_id", "tie_word_embeddings", "torch_dtype")
LEAST_CAP, LARGEST_CAP = 1e-6, 1e6


@frozen(kw_only=True)
class GemmaConfig(DecoderConfig):
    """Keys that Gemma 2 and 3 share; every `sliding_window_pattern`th layer sees all tokens."""

    vocab_size: int = whole(256000, 1, 2**24)
    hidden_size: int = whole(2304, 1, 2**17)
    intermediate_size: int = whole(9216, 1, 2**20)
    num_hidden_layers: int = whole(26, 1, 1024)
    num_attention_heads: int = whole(8, 1, 1024)
    given_num_kv_heads: int | None = whole(4, 1, 1024, names=("num_key_value_heads",))
    given_head_dim: int | None = whole(256, 1, 4096, names=("head_dim",))
    tie_word_embeddings: bool = flag(True)
    eos_token_ids: tuple[int, ...] = end_tokens(1)
    hidden_act: str | None = one_of(
        "gelu_pytorch_tanh",
        ("gelu_pytorch_tanh", None),
        names=("hidden_activation", "hidden_act"),
    )
    attention_bias: bool = flag(False)
    query_pre_attn_scalar: int = whole(256, 1, 2**20)
    sliding_window: int | None = whole(4096, 1, 2**30, optional=True)
    layer_types: tuple[str, ...] | None = layer_types_key()
    final_logit_softcapping: float | None = real(None, LEAST_CAP, LARGEST_CAP, optional=True)

    def check(self) -> None:
        """Check that layers with a window have one."""
        super().check()
        check_layer_types(self, self.layer_types)
        slides = any(self.is_sliding(i) for i in range(self.num_hidden_layers))
        if slides and self.sliding_window is None:
            raise refuse(self.source, "sliding_window", None, "a number, where layers have one")

    @property
    def pattern(self) -> int:
        """Layers from one that sees all tokens to the next, unless `layer_types` tells."""
        return 2

    def is_sliding(self, layer: int) -> bool:
        """Answer whether a layer sees a window only."""
        if self.layer_types is not None:
            return self.layer_types[layer] == SLIDING
        return (layer + 1) % self.pattern != 0


@frozen(kw_only=True)
class Gemma2Config(GemmaConfig):
    """Keys of Gemma2ForCausalLM, with the defaults of Transformers."""

    max_position_embeddings: int = whole(8192, 1, 2**30)
    final_logit_softcapping: float | None = real(30.0, LEAST_CAP, LARGEST_CAP, optional=True)
    attn_logit_softcapping: float | None = real(50.0, LEAST_CAP, LARGEST_CAP, optional=True)


def rope_of(kind: str, base: str, default: float) -> Any:
    """Return what reads the rotation of one kind of layer, whose base is a key of its own."""

    def adapt(given: Mapping[str, Any], source: str) -> dict[str, Any]:
        by_kind = given.get(ROPE) or {}
        if not isinstance(by_kind, Mapping) or set(by_kind) - {FULL, SLIDING}:
            raise refuse(source, ROPE, by_kind, f'an object of "{FULL}" and "{SLIDING}"')
        entries = by_kind.get(kind) or {}
        scaling = given.get("rope_scaling") or {}
        if isinstance(entries, Mapping) and isinstance(scaling, Mapping) and kind == FULL:
            entries = {**entries, **scaling}
        theta = given.get(base)
        rest = None if isinstance(scaling, Mapping) else scaling
        own = {ROPE: entries, "rope_scaling": rest, "rope_theta": default}
        return {**given, **own, **({} if theta is None else {"rope_theta": theta})}

    return adapt


@frozen(kw_only=True)
class Gemma3Config(GemmaConfig):
    """Keys of Gemma3ForCausalLM, with the defaults of Transformers.

    Layers with a window have `local_rope`. `is_part`: the file is that of a model which reads
    pictures too, Gemma3ForConditionalGeneration, and these are the keys of its `text_config`.
    """

    is_part: bool = False

    vocab_size: int = whole(262208, 1, 2**24)
    max_position_embeddings: int = whole(131072, 1, 2**30)
    sliding_window_pattern: int = whole(6, 1, 1024)
    rope: RopeParameters = rope_key(  # noqa: RUF009 - an attrs field
        default_theta=1e6, adapt=rope_of(FULL, "rope_theta", 1e6)
    )
    local_rope: RopeParameters = rope_key(  # noqa: RUF009 - an attrs field
        adapt=rope_of(SLIDING, "rope_local_base_freq", 1e4), names=("rope_local_base_freq",)
    )

    @classmethod
    def from_json(cls, given: Any, *, source: str = "config.json") -> Self:
        """Read the text part, and what the whole says of both parts."""
        if not isinstance(given, Mapping) or "text_config" not in given:
            return super().from_json(given, source=source)
        text = given["text_config"]
        if not isinstance(text, Mapping):
            raise refuse(source, "text_config", text, "an object")
        of_both = {name: given[name] for name in OF_THE_WHOLE if name in given}
        return evolve(super().from_json({**text, **of_both}, source=source), is_part=True)

    @property
    def pattern(self) -> int:
        """Layers from one that sees all tokens to the next, unless `layer_types` tells."""
        return self.sliding_window_pattern


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `gemma2` and `gemma3`."""
    return [
        ModelPlugin(
            name="gemma2",
            load="quire_models.gemma.model:Gemma2",
            architectures=("Gemma2ForCausalLM",),
            config_class=Gemma2Config,
            summary="Gemma 2: soft caps, a window in every second layer",
        ),
        ModelPlugin(
            name="gemma3",
            load="quire_models.gemma.model:Gemma3",
            architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
            config_class=Gemma3Config,
            summary="Gemma 3 for text: five layers with a window, then one without",
        ),
    ]
