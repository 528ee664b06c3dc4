"""Models `distilbert` and `distilbert-classifier`."""

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import flag, one_of, real, whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.encoder_config import ACTIVATIONS, EncoderConfig

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class DistilBertConfig(EncoderConfig):
    """Keys of DistilBertModel, which has names of its own for sizes, and no types of texts."""

    hidden_size: int = whole(768, 1, 2**17, names=("dim",))
    num_hidden_layers: int = whole(6, 1, 1024, names=("n_layers",))
    num_attention_heads: int = whole(12, 1, 1024, names=("n_heads",))
    intermediate_size: int = whole(3072, 1, 2**20, names=("hidden_dim",))
    hidden_act: str = one_of("gelu", ACTIVATIONS, names=("activation",))
    layer_norm_eps: float = real(1e-12, 1e-12, 1e-12)
    sinusoidal_pos_embds: bool = flag(False)  # the table is in the file all the same


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `distilbert` and `distilbert-classifier`."""
    return [
        ModelPlugin(
            name="distilbert",
            load="quire_models.distilbert.model:DistilBert",
            architectures=("DistilBertModel", "DistilBertForMaskedLM"),
            config_class=DistilBertConfig,
            task="embed",
            summary="DistilBERT: vectors of texts",
        ),
        ModelPlugin(
            name="distilbert-classifier",
            load="quire_models.distilbert.model:DistilBertClassifier",
            architectures=("DistilBertForSequenceClassification",),
            config_class=DistilBertConfig,
            task="classify",
            summary="DistilBERT with a head for classes, or for how well texts fit",
        ),
    ]
