"""BERT. Source: Devlin et al., "BERT: pre-training of deep bidirectional transformers", 2019."""

from __future__ import annotations

from typing import ClassVar

from attrs import evolve
from torch import Tensor, nn

from quire.interfaces.model import BuildContext, WeightNames
from quire_models.encoder import Encoder, weight_names
from quire_models.encoder_config import EncoderConfig


class Bert(Encoder):
    """The encoder alone."""

    weight_names: ClassVar[WeightNames] = weight_names("bert.", Encoder.names)


class BertClassifier(Encoder):
    """The encoder with its pooler, a product and tanh of the first token, and a score head."""

    weight_names: ClassVar[WeightNames] = evolve(
        Bert.weight_names, ignored=(r".*\.position_ids", r"cls\..*")
    )

    def __init__(self, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        size = config.hidden_size
        self.pooler: nn.Module = build.linear("pooler.dense", size, size, bias=True)
        self.classifier = build.linear("classifier", size, config.num_labels, bias=True)

    def scores(self, pooled: Tensor) -> Tensor:
        """Return the scores [num_seqs, num_labels] of the first tokens' vectors."""
        found: Tensor = self.classifier(self.pooler(pooled).tanh())
        return found
