"""Greedy and random sampling in plain PyTorch, each row a pure function of its own inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.interfaces.sampling import RowStatus, SampledTokens, Sampler, SamplingBatch
from quire_kernels import ops


class ReferenceSampler(Sampler):
    """Filter by temperature, top-k, top-p, min-p, then draw by the Gumbel-max rule.

    Source: the order of the filters is vLLM's; the draw is `quire.interfaces.sampling.Sampler`'s.
    """

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        """Draw one token a row."""
        if batch.suppressed is not None:
            logits[batch.suppressed] = float("-inf")
        greedy_best, greedy_ids = logits.max(dim=-1)
        # A NaN anywhere makes the maximum NaN; -inf everywhere, or +inf, makes it infinite.
        status = torch.isfinite(greedy_best).logical_not_().int() * int(RowStatus.NOT_FINITE)
        token_ids = greedy_ids
        if not batch.all_greedy:
            drawn = self._drawn(logits.float(), batch)
            token_ids = torch.where(batch.temperature > 0, drawn, greedy_ids)
        return SampledTokens(token_ids=token_ids.unsqueeze(1), status=status)

    def _drawn(self, logits: Tensor, batch: SamplingBatch) -> Tensor:
        """Return the drawn token of each row; greedy rows give one that is not used."""
        temperature = torch.where(batch.temperature > 0, batch.temperature, 1.0)
        scaled = logits / temperature.unsqueeze(1)
        if batch.any_top_k or batch.any_top_p:
            scaled = _top_k_top_p(scaled, batch)
        if batch.any_min_p:
            scaled = _min_p(scaled, batch.min_p)
        vocab_size = logits.shape[1]
        noise = ops.gumbel_noise(batch.seed, batch.child_index, batch.position, vocab_size)
        return (scaled + noise).argmax(dim=-1)


def _top_k_top_p(logits: Tensor, batch: SamplingBatch) -> Tensor:
    """Keep the k most likely tokens, then the fewest whose probability reaches top_p.

    Ties are ordered by token id, so that exactly k remain.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(logits.shape[1], device=logits.device)
    ordered = ordered.masked_fill(ranks >= batch.top_k.unsqueeze(1), float("-inf"))
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = before >= batch.top_p.unsqueeze(1)
    # top_p of 1 keeps everything, also what rounding in the sum would cut off.
    outside &= (batch.top_p < 1).unsqueeze(1)
    outside[:, 0] = False
    ordered = ordered.masked_fill(outside, float("-inf"))
    return torch.empty_like(logits).scatter_(1, order, ordered)


def _min_p(logits: Tensor, min_p: Tensor) -> Tensor:
    """Drop tokens less likely than min_p times the most likely one."""
    best = logits.max(dim=-1, keepdim=True).values
    return logits.masked_fill(logits < best + min_p.log().unsqueeze(1), float("-inf"))
