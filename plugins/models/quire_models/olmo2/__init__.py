"""Model `olmo2`: OLMo 2."""

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import end_tokens, flag, real, whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.decoder_config import DecoderConfig

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class Olmo2Config(DecoderConfig):
    """Keys of Olmo2ForCausalLM, with the defaults of Transformers."""

    vocab_size: int = whole(50304, 1, 2**24)
    eos_token_ids: tuple[int, ...] = end_tokens(50279)
    rms_norm_eps: float = real(1e-5, 0.0, 1.0)
    attention_bias: bool = flag(False)


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `olmo2`."""
    return [
        ModelPlugin(
            name="olmo2",
            load="quire_models.olmo2.model:Olmo2",
            architectures=("Olmo2ForCausalLM",),
            config_class=Olmo2Config,
            summary="OLMo 2",
        )
    ]
