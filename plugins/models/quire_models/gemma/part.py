"""A text model whose files are a part of those of a model that reads pictures too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from quire.interfaces.model import AttentionOptions, BuildContext, WeightNames

PREFIX = "language_model."


class Within:
    """A `BuildContext` whose layers have a prefix in their names."""

    def __init__(self, build: BuildContext) -> None:
        self._build = build

    def __getattr__(self, name: str) -> Any:
        return getattr(self._build, name)

    def linear(
        self, name: str, in_features: int, out_features: int | Sequence[int], **options: Any
    ) -> nn.Module:
        """Make a linear layer."""
        return self._build.linear(PREFIX + name, in_features, out_features, **options)

    def embedding(self, name: str, num_embeddings: int, embedding_dim: int) -> nn.Module:
        """Make an embedding."""
        return self._build.embedding(PREFIX + name, num_embeddings, embedding_dim)

    def head(self, name: str, embedding_dim: int, num_embeddings: int, **options: Any) -> nn.Module:
        """Make the head."""
        return self._build.head(PREFIX + name, embedding_dim, num_embeddings, **options)

    def attention(self, name: str, options: AttentionOptions) -> nn.Module:
        """Make an attention layer."""
        return self._build.attention(PREFIX + name, options)


def names_of_part(names: WeightNames) -> WeightNames:
    """Return how the names of the whole map to those of the part; what sees is left in the file."""
    return WeightNames(
        renamed={**names.renamed, r"^model\.": f"{PREFIX}model."},
        ignored=(*names.ignored, r"vision_tower\..*", r"multi_modal_projector\..*"),
    )
