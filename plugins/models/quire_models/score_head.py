"""A decoder that scores: a product of the last token's vector instead of logits."""

from __future__ import annotations

from torch import Tensor

from quire.interfaces.model import BuildContext, PoolingModel
from quire.interfaces.model_config import ModelConfig


class ScoreHead(PoolingModel):
    """Put this before a decoder's class; its checkpoint calls the head `score`."""

    def __init__(self, config: ModelConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.score = build.linear("score", config.hidden_size, config.num_labels)

    def scores(self, pooled: Tensor) -> Tensor:
        """Return the scores [num_seqs, num_labels] of the last tokens' vectors."""
        found: Tensor = self.score(pooled)
        return found
