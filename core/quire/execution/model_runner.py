"""Run one step on one device: forward, sample, and later collect the tokens on the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from attrs import define
from torch import Tensor

from quire.execution.batch_builder import BatchBuilder, BuiltBatch
from quire.execution.kv_cache import KVCache
from quire.execution.processors import ProcessorChain
from quire.execution.sampling_rows import SamplingRows
from quire.interfaces.attention import AttentionBackend, BatchLimits
from quire.interfaces.model import Model
from quire.interfaces.sampling import RowStatus, SampledTokens, Sampler
from quire.scheduling.output import KVCacheGroup, SchedulerOutput, StepResult

ROW_ERRORS = {
    RowStatus.NOT_FINITE: "the model's logits are not finite (NaN or infinity)",
    RowStatus.OUT_OF_RANGE: "the sampler gave a token id outside the vocabulary",
}


@define(kw_only=True)
class Forwarded:
    """A step whose forward pass was launched; its tokens are still to be sampled."""

    step_id: int
    built: BuiltBatch
    logits: Tensor | None


@define(kw_only=True)
class InFlight:
    """A step that was dispatched; `collect` waits for it."""

    step_id: int
    sampled_ids: list[int]
    token_ids: Tensor | None
    num_tokens: Tensor | None
    status: Tensor | None
    ready: torch.cuda.Event | None


class ModelRunner:
    """Own the model, its KV cache and the persistent rows of one rank."""

    def __init__(
        self,
        *,
        model: Model,
        backends: Sequence[AttentionBackend],
        kv_cache: KVCache,
        groups: Sequence[KVCacheGroup],
        limits: BatchLimits,
        sampler: Sampler,
        processors: ProcessorChain,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.vocab_size = model.config.vocab_size
        self._backends = backends
        self._kv_cache = kv_cache
        self._sampler = sampler
        self._processors = processors
        self._builder = BatchBuilder(groups, limits, self.device)
        self._sampling = SamplingRows(limits.max_num_seqs, self.vocab_size, self.device)

    @torch.inference_mode()
    def dispatch(self, output: SchedulerOutput) -> InFlight:
        """Launch a step: forward, then sample. Nothing here waits for the device."""
        return self.sample(self.forward(output))

    @torch.inference_mode()
    def forward(self, output: SchedulerOutput) -> Forwarded:
        """Take over the difference, build the batch and launch the model."""
        self._processors.remove(output, self._builder.row_of)
        self._builder.apply_difference(output)
        for added in (*output.added, *output.resumed):
            self._sampling.add(added)
            self._processors.add(added)
        if output.block_copies:
            self._kv_cache.copy_blocks(output.block_copies)
        built = self._builder.build(output)
        batch = built.batch
        batch.plans = [backend.plan(batch, i) for i, backend in enumerate(self._backends)]
        for backend, plan in zip(self._backends, batch.plans, strict=True):
            backend.prepare(plan)
        hidden = self.model(self.model.embed(batch.token_ids), batch)
        logits = None
        if built.sampled_ids:
            if hidden.shape[0] != batch.logit_rows.shape[0]:
                hidden = hidden.index_select(0, batch.logit_rows)
            logits = self.model.logits(hidden)
        return Forwarded(step_id=output.step_id, built=built, logits=logits)

    @torch.inference_mode()
    def sample(self, forwarded: Forwarded) -> InFlight:
        """Sample the rows whose last token was computed and keep their tokens on the device."""
        built, logits = forwarded.built, forwarded.logits
        sampled = None
        if logits is not None:
            batch = self._sampling.batch(built)
            if self._processors:
                logits = self._processors.apply(logits, built, batch.rows)
            sampled = self._sampler.sample(logits, batch)
            # A token that is out of range is reported when it is collected; the step that is
            # launched before that must not look it up.
            token_ids = sampled.token_ids[:, 0].clamp(0, self.vocab_size - 1).int()
            self._builder.last_tokens.index_copy_(0, batch.rows.long(), token_ids)
            if self._processors:
                self._processors.append(batch.rows, token_ids)
        return self._in_flight(forwarded.step_id, built.sampled_ids, sampled)

    def _in_flight(
        self, step_id: int, sampled_ids: list[int], sampled: SampledTokens | None
    ) -> InFlight:
        token_ids = num_tokens = status = ready = None
        if sampled is not None:
            token_ids, status = sampled.token_ids, sampled.status
            num_tokens = sampled.num_tokens
            if self.device.type == "cuda":
                token_ids = _to_host(token_ids)
                status = _to_host(status)
                num_tokens = None if num_tokens is None else _to_host(num_tokens)
        if self.device.type == "cuda":
            # Also for a step without tokens: its staging buffer is written again after `collect`.
            ready = torch.cuda.Event()
            ready.record()
        return InFlight(
            step_id=step_id,
            sampled_ids=sampled_ids,
            token_ids=token_ids,
            num_tokens=num_tokens,
            status=status,
            ready=ready,
        )

    def collect(self, step: InFlight) -> StepResult:
        """Wait for a step and return its tokens on the host, and which rows failed."""
        if step.ready is not None:
            step.ready.synchronize()
        if step.token_ids is None or step.status is None:
            return StepResult(step_id=step.step_id, token_ids={})
        tokens: dict[int, list[int]] = {}
        errors: dict[int, str] = {}
        drawn = step.token_ids.tolist()
        if step.num_tokens is not None:
            drawn = [ids[:n] for ids, n in zip(drawn, step.num_tokens.tolist(), strict=True)]
        rows = zip(step.sampled_ids, drawn, step.status.tolist(), strict=True)
        for sequence_id, token_ids, status in rows:
            if status == RowStatus.OK and not all(0 <= t < self.vocab_size for t in token_ids):
                status = RowStatus.OUT_OF_RANGE
            if status == RowStatus.OK:
                tokens[sequence_id] = token_ids
            else:
                errors[sequence_id] = ROW_ERRORS[RowStatus(status)]
        return StepResult(step_id=step.step_id, token_ids=tokens, errors=errors)


def _to_host(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
