"""Models `llama` (Llama 2 and 3.x and what is shaped like them) and `mistral`."""

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import end_tokens, flag, whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.decoder_config import DecoderConfig, check_uniform_layers, layer_types_key
from quire_models.pooling_plugins import pooling_plugins

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class LlamaConfig(DecoderConfig):
    """Keys of LlamaForCausalLM, with the defaults of Transformers."""

    eos_token_ids: tuple[int, ...] = end_tokens(2)
    attention_bias: bool = flag(False)
    mlp_bias: bool = flag(False)


@frozen(kw_only=True)
class MistralConfig(DecoderConfig):
    """Keys of MistralForCausalLM, with the defaults of Transformers.

    All layers have the window or none has; mixtures are another architecture, Ministral.
    """

    intermediate_size: int = whole(14336, 1, 2**20)
    given_num_kv_heads: int | None = whole(
        8, 1, 1024, optional=True, names=("num_key_value_heads",)
    )
    max_position_embeddings: int = whole(131072, 1, 2**30)
    eos_token_ids: tuple[int, ...] = end_tokens(2)
    sliding_window: int | None = whole(4096, 1, 2**30, optional=True)
    layer_types: tuple[str, ...] | None = layer_types_key()

    def check(self) -> None:
        """Check that the layers' types, where given, say the same as the window."""
        super().check()
        check_uniform_layers(self, self.layer_types, self.sliding_window)


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `llama` and `mistral`, for text, embeddings and scores."""
    llama = ModelPlugin(
        name="llama",
        load="quire_models.llama.model:Llama",
        architectures=("LlamaForCausalLM",),
        config_class=LlamaConfig,
        summary="Llama 2, Llama 3.x and models of their shape",
    )
    mistral = ModelPlugin(
        name="mistral",
        load="quire_models.llama.model:Mistral",
        architectures=("MistralForCausalLM",),
        config_class=MistralConfig,
        summary="Mistral: Llama with a sliding window",
    )
    return [
        llama,
        mistral,
        *pooling_plugins(llama, "Llama"),
        *pooling_plugins(mistral, "Mistral"),
    ]
