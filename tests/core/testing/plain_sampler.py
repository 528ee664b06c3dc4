"""A right sampler in plain PyTorch, cut into methods that a broken one may replace."""

from __future__ import annotations

import torch
from attrs import evolve
from torch import Tensor

from quire.interfaces.sampling import RowStatus, SampledTokens, Sampler, SamplingBatch
from quire.testing.sampler_cases import Row
from quire.testing.sampler_formula import GROUP_SIZE, uniforms


class PlainSampler(Sampler):
    """Each row by itself, as the contract says."""

    gives_logprobs = False

    def sample(self, logits: Tensor, batch: SamplingBatch) -> SampledTokens:
        if batch.suppressed is not None:
            logits[batch.suppressed] = float("-inf")
        tokens, logprobs, size = [], [], logits.shape[1]
        self.noises = self.noise(batch, size)
        self.group_noises = self.noise(batch, -(-size // GROUP_SIZE), stage=1)
        for i in range(len(logits)):
            token, logprob = self.drawn(logits[i], batch, i)
            tokens.append(token)
            logprobs.append(logprob)
        return SampledTokens(
            token_ids=torch.tensor(tokens, dtype=torch.int64)[:, None],
            status=self.status_of(logits),
            logprobs=torch.tensor(logprobs)[:, None] if self.gives_logprobs else None,
        )

    def status_of(self, logits: Tensor) -> Tensor:
        usable = (logits.isfinite() | (logits == float("-inf"))).all(1) & logits.isfinite().any(1)
        return torch.where(usable, int(RowStatus.OK), int(RowStatus.NOT_FINITE)).int()

    def drawn(self, logits: Tensor, batch: SamplingBatch, i: int) -> tuple[int, float]:
        if batch.temperature[i] == 0:
            return self.greedy(logits), 0.0
        scaled = self.filtered(logits.float(), batch, i)
        token = self.taken(scaled, i)
        return token, float(scaled.log_softmax(0)[token])

    def taken(self, scaled: Tensor, i: int) -> int:
        masses = torch.stack([group.logsumexp(0) for group in scaled.split(GROUP_SIZE)])
        first = GROUP_SIZE * int((masses + self.group_noises[i]).argmax())
        group = slice(first, first + GROUP_SIZE)
        return first + int((scaled[group] + self.noises[i][group]).argmax())

    def greedy(self, logits: Tensor) -> int:
        return int(logits.argmax())

    def filtered(self, logits: Tensor, batch: SamplingBatch, i: int) -> Tensor:
        scaled = logits / batch.temperature[i]
        scaled = self.keep_top_k(scaled, int(batch.top_k[i]))
        scaled = self.keep_top_p(scaled, batch.top_p[i])
        return self.keep_min_p(scaled, batch.min_p[i])

    def keep_top_k(self, scaled: Tensor, top_k: int) -> Tensor:
        order = scaled.sort(descending=True, stable=True).indices
        return scaled.index_fill(0, order[top_k:], float("-inf"))

    def keep_top_p(self, scaled: Tensor, top_p: Tensor) -> Tensor:
        if top_p >= 1:
            return scaled
        ordered, order = scaled.sort(descending=True, stable=True)
        before = self.mass_before(ordered.softmax(0))
        outside = before >= top_p
        outside[0] = False
        return scaled.index_fill(0, order[outside], float("-inf"))

    def mass_before(self, probabilities: Tensor) -> Tensor:
        return probabilities.cumsum(0) - probabilities

    def keep_min_p(self, scaled: Tensor, min_p: Tensor) -> Tensor:
        return scaled.masked_fill(scaled < scaled.max() + min_p.log(), float("-inf"))

    def noise(self, batch: SamplingBatch, count: int, *, stage: int = 0) -> Tensor:
        columns = (batch.seed, batch.child_index, batch.position)
        given = zip(*(column.tolist() for column in columns), strict=True)
        rows = [self.counter(*values, i) for i, values in enumerate(given)]
        if not rows:
            return torch.empty(0, count)
        first, size = rows[0], len(rows)
        if rows == [evolve(first, position=first.position + i) for i in range(size)]:
            found = uniforms(first, count, num_draws=size, stage=stage)
        else:
            found = torch.cat([uniforms(row, count, stage=stage) for row in rows])
        return -torch.log(-torch.log1p(-found))

    def counter(self, seed: int, child: int, position: int, i: int) -> Row:
        return Row(seed=seed, child=child, position=position)
