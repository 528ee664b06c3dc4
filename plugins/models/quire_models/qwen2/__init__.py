"""Model `qwen2`: Qwen2 and Qwen2.5."""

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.decoder_config import WindowedConfig
from quire_models.pooling_plugins import pooling_plugins

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class Qwen2Config(WindowedConfig):
    """Keys of Qwen2ForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(151936, 1, 2**24)
    intermediate_size: int = whole(22016, 1, 2**20)
    given_num_kv_heads: int | None = whole(
        32, 1, 1024, optional=True, names=("num_key_value_heads",)
    )
    max_position_embeddings: int = whole(32768, 1, 2**30)


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `qwen2`, for text, embeddings and scores."""
    plugin = ModelPlugin(
        name="qwen2",
        load="quire_models.qwen2.model:Qwen2",
        architectures=("Qwen2ForCausalLM",),
        config_class=Qwen2Config,
        summary="Qwen2 and Qwen2.5",
    )
    return [plugin, *pooling_plugins(plugin, "Qwen2")]
