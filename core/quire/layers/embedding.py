"""Token embeddings and the head that turns hidden states into logits."""

from __future__ import annotations

from torch import Tensor, nn

from quire.interfaces.quantization import EmbeddingSpec, LayerMethod
from quire.layers.weights import WeightStore


class Embedding(WeightStore):
    """Look up token embeddings."""

    spec: EmbeddingSpec
    method: LayerMethod

    def __init__(self, spec: EmbeddingSpec, method: LayerMethod) -> None:
        super().__init__(spec, method)
        method.create_weights(self)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Return [num_tokens, embedding_dim] for `token_ids` int32 [num_tokens]."""
        return self.method.apply(self, token_ids, None)


class NoHead(nn.Module):
    """Stand where a model that generates nothing would have its head; it has no weights."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, hidden: Tensor) -> Tensor:
        """Raises: NotImplementedError."""
        raise NotImplementedError(f"{self.name} was not built: the model gives vectors")


class Head(WeightStore):
    """Give logits, with an own weight or with the embedding's."""

    spec: EmbeddingSpec
    method: LayerMethod

    def __init__(self, spec: EmbeddingSpec, method: LayerMethod, tied_to: Embedding | None) -> None:
        super().__init__(spec, method)
        # Held in a tuple, so that the embedding is not a child of the head in the module tree.
        self._tied = (tied_to,)
        if tied_to is None:
            method.create_weights(self)

    def get_weight(self, name: str) -> Tensor:
        """Return the own weight, or the embedding's where they are tied."""
        tied = self._tied[0]
        return super().get_weight(name) if tied is None else tied.get_weight(name)

    @property
    def is_tied(self) -> bool:
        """Whether the weight is the embedding's."""
        return self._tied[0] is not None

    def drop_weight(self, name: str) -> None:
        """Forget the own weight; an embedding's stays, since look-ups need it."""
        if not self.is_tied:
            super().drop_weight(name)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return logits [num_rows, vocab_size] for `hidden` [num_rows, hidden_size]."""
        return self.method.apply(self, hidden, None)
