"""Models `mpnet` and `mpnet-classifier`: MPNet, all-mpnet-base."""

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.encoder_config import EncoderConfig

QUIRE_API_VERSION = (1, 0)

PADDING = 1  # whatever pad_token_id says, as in the original
BUCKETS = 32


@frozen(kw_only=True)
class MPNetConfig(EncoderConfig):
    """Keys of MPNetModel, with the defaults of Transformers."""

    vocab_size: int = whole(30527, 1, 2**24)
    relative_attention_num_buckets: int = whole(BUCKETS, BUCKETS, BUCKETS)

    @property
    def first_position(self) -> int:
        """Row of the table of positions that the first token has."""
        return PADDING + 1


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `mpnet` and `mpnet-classifier`."""
    return [
        ModelPlugin(
            name="mpnet",
            load="quire_models.mpnet.model:MPNet",
            architectures=("MPNetModel", "MPNetForMaskedLM"),
            config_class=MPNetConfig,
            task="embed",
            summary="MPNet: vectors of texts",
        ),
        ModelPlugin(
            name="mpnet-classifier",
            load="quire_models.mpnet.model:MPNetClassifier",
            architectures=("MPNetForSequenceClassification",),
            config_class=MPNetConfig,
            task="classify",
            summary="MPNet with a head for classes, or for how well texts fit",
        ),
    ]
