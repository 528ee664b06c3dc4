"""Models `roberta` and `roberta-classifier`: RoBERTa and XLM-RoBERTa."""

from attrs import frozen

from quire import hookimpl
from quire.interfaces.model_config import whole
from quire.interfaces.plugin import ModelPlugin
from quire_models.encoder_config import EncoderConfig

QUIRE_API_VERSION = (1, 0)


@frozen(kw_only=True)
class RobertaConfig(EncoderConfig):
    """Keys of RobertaModel and XLMRobertaModel: positions are counted from the padding's id on."""

    vocab_size: int = whole(50265, 1, 2**24)
    pad_token_id: int = whole(1, 0, 2**24)

    @property
    def first_position(self) -> int:
        """Row of the table of positions that the first token has."""
        return self.pad_token_id + 1


@hookimpl
def quire_models() -> list[ModelPlugin]:
    """Offer `roberta` and `roberta-classifier`."""
    families = ("Roberta", "XLMRoberta")
    return [
        ModelPlugin(
            name="roberta",
            load="quire_models.roberta.model:Roberta",
            architectures=tuple(f"{f}{end}" for f in families for end in ("Model", "ForMaskedLM")),
            config_class=RobertaConfig,
            task="embed",
            summary="RoBERTa and XLM-RoBERTa: vectors of texts",
        ),
        ModelPlugin(
            name="roberta-classifier",
            load="quire_models.roberta.model:RobertaClassifier",
            architectures=tuple(f"{f}ForSequenceClassification" for f in families),
            config_class=RobertaConfig,
            task="classify",
            summary="RoBERTa with a head for classes, or for how well texts fit",
        ),
    ]
