"""DistilBERT. Source: Sanh et al., "DistilBERT, a distilled version of BERT", 2019."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quire.interfaces.model import BuildContext, WeightNames
from quire_models.encoder import Encoder, LayerNames, weight_names
from quire_models.encoder_config import EncoderConfig


class DistilBert(Encoder):
    """The encoder alone."""

    names: ClassVar[LayerNames] = LayerNames(
        layer="transformer.layer",
        attention="attention",
        parts=("q_lin", "k_lin", "v_lin"),
        output="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        norm="output_layer_norm",
    )
    has_types: ClassVar[bool] = False
    weight_names: ClassVar[WeightNames] = weight_names("distilbert.", names)


class DistilBertClassifier(DistilBert):
    """The encoder with a product and a ReLU of the first token, and a score head."""

    def __init__(self, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        size = config.hidden_size
        self.pre_classifier = build.linear("pre_classifier", size, size, bias=True)
        self.classifier = build.linear("classifier", size, config.num_labels, bias=True)

    def scores(self, pooled: Tensor) -> Tensor:
        """Return the scores [num_seqs, num_labels] of the first tokens' vectors."""
        found: Tensor = self.classifier(self.pre_classifier(pooled).relu())
        return found
