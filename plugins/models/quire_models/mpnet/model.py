"""MPNet. Source: Song et al., "MPNet: masked and permuted pre-training", 2020.

Scores depend on how far apart two tokens are, by a table that all layers share. No attention
backend adds to scores, so that the layers attend by themselves.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from quire.interfaces.batch import Batch
from quire.interfaces.model import BuildContext, WeightNames
from quire_models.encoder import LayerNames, PaddedPositions, TwoProducts, weight_names
from quire_models.encoder_config import EncoderConfig
from quire_models.mpnet import BUCKETS

FAR = 128  # tokens beyond which distances are one


def buckets(distances: Tensor) -> Tensor:
    """Return the rows of the table for distances, a key's position minus the query's.

    A half of them is for keys to come; in each the near ones have their own, and the others grow
    with the logarithm.
    """
    half = BUCKETS // 2
    near = half // 2
    far = distances.abs()
    scaled = (far.float().clamp(min=1) / near).log() / math.log(FAR / near) * (half - near)
    rows = torch.where(far < near, far, (near + scaled.long()).clamp(max=half - 1))
    return rows + (distances > 0) * half


class BiasedAttention(nn.Module):
    """Attention within each sequence, with a bias by distance."""

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads

    def forward(self, qkv: Tensor, batch: Batch, bias: Tensor) -> Tensor:
        """Return [num_tokens, hidden_size] for `qkv` [num_tokens, 3 * hidden_size].

        `bias` [num_heads, longest, longest].
        """
        out = []
        for part in qkv.split(batch.query_lens):
            count = len(part)
            q, k, v = part.view(count, 3, self.num_heads, -1).permute(1, 2, 0, 3)
            mask = bias[:, :count, :count]
            attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out.append(attended.transpose(0, 1).reshape(count, -1))
        return torch.cat(out)


class MPNet(PaddedPositions):
    """The encoder alone."""

    names: ClassVar[LayerNames] = LayerNames(
        attention="attention.attn",
        parts=("q", "k", "v"),
        output="attention.attn.o",
        attention_norm="attention.LayerNorm",
    )
    has_types: ClassVar[bool] = False
    weight_names: ClassVar[WeightNames] = weight_names("mpnet.", names)

    def __init__(self, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.relative_attention_bias = build.embedding(
            "encoder.relative_attention_bias", BUCKETS, config.num_attention_heads
        )

    def attention(
        self, name: str, index: int, config: EncoderConfig, build: BuildContext
    ) -> nn.Module:
        """Return attention with a bias."""
        return BiasedAttention(config.num_attention_heads)

    def bias(self, batch: Batch) -> Tensor:
        """Return [num_heads, longest, longest] for the longest sequence of the step."""
        longest = max(batch.query_lens)
        places = torch.arange(longest, device=batch.positions.device)
        rows = buckets(places - places[:, None])
        found: Tensor = self.relative_attention_bias(rows.flatten().int())
        return found.view(longest, longest, -1).permute(2, 0, 1)


class MPNetClassifier(MPNet):
    """The encoder with a score head."""

    def __init__(self, config: EncoderConfig, build: BuildContext) -> None:
        super().__init__(config, build)
        self.classifier = TwoProducts("classifier", config, build)

    def scores(self, pooled: Tensor) -> Tensor:
        """Return the scores [num_seqs, num_labels] of the first tokens' vectors."""
        found: Tensor = self.classifier(pooled)
        return found
