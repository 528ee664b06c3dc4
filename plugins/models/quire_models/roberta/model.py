"""RoBERTa. Source: Liu et al., "RoBERTa: a robustly optimized BERT pretraining approach", 2019."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from quire.interfaces.model import BuildContext, WeightNames
from quire_models.encoder import Encoder, PaddedPositions, TwoProducts, weight_names
from quire_models.encoder_config import EncoderConfig


class Roberta(PaddedPositions):
    """BERT with other positions."""

    weight_names: ClassVar[WeightNames] = weight_names("roberta.", Encoder.names)


class RobertaClassifier(Roberta):
    """The encoder with a score head."""

    def __init__(self, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.classifier = TwoProducts("classifier", config, build)

    def scores(self, pooled: Tensor) -> Tensor:
        """Return the scores [num_seqs, num_labels] of the first tokens' vectors."""
        found: Tensor = self.classifier(pooled)
        return found
