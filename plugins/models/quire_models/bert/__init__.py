"""Models `bert` and `bert-classifier`: BERT, MiniLM, BGE, E5 and what is shaped like them."""

from quire import hookimpl
from quire.interfaces.plugin import ModelPlugin
from quire_models.encoder_config import EncoderConfig

QUIRE_API_VERSION = (1, 0)


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `bert` and `bert-classifier`."""
    return [
        ModelPlugin(
            name="bert",
            load="quire_models.bert.model:Bert",
            architectures=("BertModel", "BertForMaskedLM"),
            config_class=EncoderConfig,
            task="embed",
            summary="BERT, MiniLM, BGE, E5: vectors of texts",
        ),
        ModelPlugin(
            name="bert-classifier",
            load="quire_models.bert.model:BertClassifier",
            architectures=("BertForSequenceClassification",),
            config_class=EncoderConfig,
            task="classify",
            summary="BERT with a head for classes, or for how well texts fit",
        ),
    ]
