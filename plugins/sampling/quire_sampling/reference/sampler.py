"""Greedy and random sampling in plain PyTorch, each row a pure function of its own inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from quire.interfaces.sampling import RowStatus, SampledTokens, Sampler, SamplingBatch
from quire_kernels import ops


class ReferenceSampler(Sampler):
    """Filter by temperature, top-k, top-p, min-p, then draw by the Gumbel-max rule, a group first.

    Source: the order of the filters is vLLM's; the draw is `quire.interfaces.sampling.Sampler`'s.
    """

    batch_invariant = True

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
            scaled = ops.keep_top_k_top_p(scaled, batch.top_k, batch.top_p)
        if batch.any_min_p:
            scaled = ops.keep_min_p(scaled, batch.min_p)
        return ops.draw(scaled, batch.seed, batch.child_index, batch.position)
