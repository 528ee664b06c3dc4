"""Model `mixtral`: Mistral with experts."""

from __future__ import annotations

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import end_tokens, real, whole
from quire.interfaces.plugin import ModelPlugin
from quire.interfaces.rope import RopeParameters, rope_key
from quire_models.decoder_config import DecoderConfig, check_uniform_layers, layer_types_key
from quire_models.mixture_config import MOST_EXPERTS, check_top_k

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class MixtralConfig(DecoderConfig):
    """Keys of MixtralForCausalLM, with the defaults of Transformers."""

    intermediate_size: int = whole(14336, 1, 2**20)
    given_num_kv_heads: int | None = whole(
        8, 1, 1024, optional=True, names=("num_key_value_heads",)
    )
    max_position_embeddings: int = whole(131072, 1, 2**30)
    rms_norm_eps: float = real(1e-5, 0.0, 1.0)
    rope: RopeParameters = rope_key(default_theta=1e6)  # noqa: RUF009 - an attrs field
    eos_token_ids: tuple[int, ...] = end_tokens(2)
    sliding_window: int | None = whole(None, 1, 2**30, optional=True)
    layer_types: tuple[str, ...] | None = layer_types_key()
    num_local_experts: int = whole(8, 1, MOST_EXPERTS, names=("num_local_experts", "num_experts"))
    num_experts_per_tok: int = whole(2, 1, MOST_EXPERTS)

    def check(self) -> None:
        """Check that all layers see alike, and that there are enough experts."""
        super().check()
        check_uniform_layers(self, self.layer_types, self.sliding_window)
        check_top_k(self, self.num_experts_per_tok, self.num_local_experts)


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `mixtral`."""
    return [
        ModelPlugin(
            name="mixtral",
            load="quire_models.mixtral.model:Mixtral",
            architectures=("MixtralForCausalLM",),
            config_class=MixtralConfig,
            summary="Mixtral: Mistral with experts",
        )
    ]
