"""Model `gpt-oss`: experts with biases, sinks, and windows in every second layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import flag, key, real, refuse, whole
from quire.interfaces.plugin import ModelPlugin
from quire.interfaces.rope import RopeParameters, rope_key
from quire_models.decoder_config import (
    SLIDING,
    DecoderConfig,
    check_layer_types,
    layer_types_key,
)
from quire_models.mixture_config import MOST_EXPERTS, check_top_k

QUIRE_API_VERSION = (1, 0)
# Experts are in this format in the files that the model is published with.
MXFP4 = "mxfp4"
# What the class has where a file says nothing.
YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _quantization_key() -> Any:
    """Declare `quantization_config`, of which the name of the format is kept."""

    def parse(given: Mapping[str, Any], source: str) -> Any:
        value = given.get("quantization_config")
        return value.get("quant_method") if isinstance(value, Mapping) else None

    return key(
        None,
        check=lambda value: True,
        allowed="an object",
        names=("quantization_config",),
        parse=parse,
    )


@frozen(kw_only=True)
class GptOssConfig(DecoderConfig):
    """Keys of GptOssForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(201088, 1, 2**24)
    hidden_size: int = whole(2880, 1, 2**17)
    intermediate_size: int = whole(2880, 1, 2**20)
    num_hidden_layers: int = whole(36, 1, 1024)
    num_attention_heads: int = whole(64, 1, 1024)
    given_num_kv_heads: int | None = whole(
        8, 1, 1024, optional=True, names=("num_key_value_heads",)
    )
    given_head_dim: int | None = whole(64, 1, 4096, optional=True, names=("head_dim",))
    max_position_embeddings: int = whole(131072, 1, 2**30)
    rms_norm_eps: float = real(1e-5, 0.0, 1.0)
    rope: RopeParameters = rope_key(default_theta=150_000.0, default=YARN)  # noqa: RUF009 - a field
    attention_bias: bool = flag(True)
    sliding_window: int | None = whole(128, 1, 2**30, optional=True)
    layer_types: tuple[str, ...] | None = layer_types_key()
    num_local_experts: int = whole(128, 1, MOST_EXPERTS, names=("num_local_experts", "num_experts"))
    num_experts_per_tok: int = whole(
        4, 1, MOST_EXPERTS, names=("num_experts_per_tok", "experts_per_token")
    )
    swiglu_alpha: float = real(1.702, 0.0, 1e3)
    swiglu_limit: float = real(7.0, 0.0, 1e6)
    # What RoPE's own original_max_position_embeddings says again.
    initial_context_length: int | None = whole(None, 1, 2**30, optional=True)
    quantization: str | None = _quantization_key()

    def check(self) -> None:
        """Check the layers' types, and that there are enough experts."""
        super().check()
        check_layer_types(self, self.layer_types)
        check_top_k(self, self.num_experts_per_tok, self.num_local_experts)
        if self.sliding_window is None and SLIDING in (self.layer_types or (SLIDING,)):
            needed = f'numbers from 1, where a layer is of type "{SLIDING}"'
            raise refuse(self.source, "sliding_window", None, needed)

    def window(self, layer: int) -> int | None:
        """Return how many latest tokens a token sees in a layer, itself included; None: all."""
        if self.layer_types is not None:
            return self.sliding_window if self.layer_types[layer] == SLIDING else None
        return self.sliding_window if layer % 2 == 0 else None


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `gpt-oss`."""
    return [
        ModelPlugin(
            name="gpt-oss",
            load="quire_models.gpt_oss.model:GptOss",
            architectures=("GptOssForCausalLM",),
            config_class=GptOssConfig,
            summary="gpt-oss: sinks, windows, and experts with biases, in MXFP4 or 16 bits",
        )
    ]
