"""Run steps of a model that gives vectors: forward, pool, and later collect them on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attrs import define
from torch import Tensor

from quire.execution.batch_builder import BuiltBatch
from quire.execution.in_flight import Forwarded, InFlight
from quire.execution.model_runner import ModelRunner
from quire.execution.pooler import Pieces, Pooler
from quire.interfaces.batch import Batch
from quire.pooling_params import PoolingInput
from quire.scheduling.output import SchedulerOutput, StepResult

NOT_FINITE = "the model's vector is not finite (NaN or infinity)"
_PLAIN = PoolingInput()


@define(kw_only=True)
class Pooled(InFlight):
    """A step whose vectors are on their way: float32 [sampled sequences, size]."""

    vectors: Tensor | None = None


class PoolingRunner(ModelRunner):
    """A runner whose steps end in vectors instead of tokens; nothing is captured."""

    def __init__(self, pooler: Pooler, **options: Any) -> None:
        super().__init__(**options)
        self._pooler = pooler
        self._asked: dict[int, PoolingInput] = {}  # by row

    @torch.inference_mode()
    def forward(self, output: SchedulerOutput, *, knows_tokens: bool = False) -> Forwarded:
        """Take over the difference, build the batch, launch the model and the pooling."""
        self._builder.apply_difference(output)
        for added in (*output.added, *output.resumed):
            self._asked[added.row] = added.pooling or _PLAIN
        if output.block_copies:
            self._kv_cache.copy_blocks(output.block_copies)
        built = self._builder.build(output)
        batch = built.batch
        rows = self._builder.rows_of(output).tolist()
        batch.segments = self._segments(batch, rows)
        if self._pooler.setup.needs_whole:
            batch.logit_rows = batch.logit_rows[:0]  # all are wanted
        vectors = self._vectors(self._hidden(batch), built, rows)
        return Forwarded(step_id=output.step_id, built=built, logits=vectors)

    def _vectors(self, hidden: Tensor, built: BuiltBatch, rows: list[int]) -> Tensor | None:
        if not built.sampled_ids:
            return None
        if not self._pooler.setup.needs_whole:
            return self._pooler.last(built.batch.kept(hidden))
        lengths = built.batch.query_lens
        assert len(built.sampled_ids) == len(lengths), "each sequence is computed whole"
        skipped = [self._asked[row].num_skipped for row in rows]
        return self._pooler.whole(hidden, Pieces(lengths=lengths, skipped=skipped))

    def _segments(self, batch: Batch, rows: list[int]) -> Tensor | None:
        """Return which tokens belong to second texts, None where no sequence is a pair."""
        seconds = [self._asked[row].second_at for row in rows]
        if all(second is None for second in seconds):
            return None
        parts = []
        for second, count, end in zip(seconds, batch.query_lens, batch.seq_lens_bound, strict=True):
            places = np.arange(end - count, end)
            parts.append(places >= (end if second is None else second))
        found = torch.from_numpy(np.concatenate(parts).astype(np.int32))
        return found.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def sample(self, forwarded: Forwarded) -> InFlight:
        """Start the copy of the vectors to the host."""
        step = Pooled(step_id=forwarded.step_id, sampled_ids=forwarded.built.sampled_ids)
        vectors = forwarded.logits
        if self.device.type == "cuda":
            if vectors is not None:
                pinned = torch.empty(vectors.shape, dtype=vectors.dtype, pin_memory=True)
                vectors = pinned.copy_(vectors, non_blocking=True)
            step.ready = torch.cuda.Event()
            step.ready.record()
        step.vectors = vectors
        return step

    def collect(self, step: InFlight) -> StepResult:
        """Wait for a step and return its vectors on the host, and which rows failed."""
        assert isinstance(step, Pooled), step
        if step.ready is not None:
            step.ready.synchronize()
        result = StepResult(step_id=step.step_id, token_ids={})
        if step.vectors is None:
            return result
        finite = step.vectors.isfinite().all(-1).tolist()
        for sequence_id, row, is_finite in zip(
            step.sampled_ids, step.vectors.numpy(), finite, strict=True
        ):
            if is_finite:
                result.token_ids[sequence_id] = [0]
                result.pooled[sequence_id] = row.tobytes()
            else:
                result.errors[sequence_id] = NOT_FINITE
        return result
