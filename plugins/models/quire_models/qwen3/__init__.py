"""Model `qwen3`: the dense Qwen3 models."""

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import flag, whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.decoder_config import WindowedConfig
from quire_models.pooling_plugins import pooling_plugins

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class Qwen3Config(WindowedConfig):
    """Keys of Qwen3ForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(151936, 1, 2**24)
    intermediate_size: int = whole(22016, 1, 2**20)
    given_num_kv_heads: int | None = whole(
        32, 1, 1024, optional=True, names=("num_key_value_heads",)
    )
    given_head_dim: int | None = whole(128, 1, 4096, names=("head_dim",))
    max_position_embeddings: int = whole(32768, 1, 2**30)
    attention_bias: bool = flag(False)


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `qwen3`, for text, embeddings and scores."""
    plugin = ModelPlugin(
        name="qwen3",
        load="quire_models.qwen3.model:Qwen3",
        architectures=("Qwen3ForCausalLM",),
        config_class=Qwen3Config,
        summary="Qwen3, dense",
    )
    return [plugin, *pooling_plugins(plugin, "Qwen3")]
