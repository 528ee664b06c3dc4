"""Run one step on one device: forward, sample, and later collect the tokens on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from quire.execution.adjustments import LogitAdjustments
from quire.execution.batch_builder import BatchBuilder, BuiltBatch
from quire.execution.decode_step import DecodeStep
from quire.execution.grammar_masks import GrammarMasks
from quire.execution.grammar_rows import GrammarRows
from quire.execution.in_flight import Forwarded, InFlight
from quire.execution.kv_cache import KVCache
from quire.execution.logprobs import LogprobRows, score_prompt
from quire.execution.mixed_step import MixedStep
from quire.execution.processors import ProcessorChain
from quire.execution.sampling_rows import SamplingRows
from quire.execution.staging import to_device
from quire.execution.static_step import Ending, StepTools, ending_for
from quire.execution.step_graphs import (
    Capture,
    StepGraphs,
    captures_any,
    decode_sizes,
    mixed_sizes,
)
from quire.interfaces.attention import AttentionBackend, BatchLimits
from quire.interfaces.batch import Batch
from quire.interfaces.model import Model
from quire.interfaces.sampling import Sampler
from quire.scheduling.output import KVCacheGroup, SchedulerOutput, StepResult

# Logits of so many rows are made at once for a prompt's log-probabilities.
MAX_PROMPT_SLICE = 256


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
        self._adjustments = LogitAdjustments(limits.max_num_seqs, self.vocab_size, self.device)
        self._logprobs = LogprobRows(self.device)
        masks = GrammarMasks(
            self.vocab_size, limits.max_num_seqs, self._builder.num_buffers, self.device
        )
        self.grammars = GrammarRows(masks)
        # No more than a step's own logits, whose memory is measured at the start.
        self._prompt_slice = min(limits.max_num_seqs, MAX_PROMPT_SLICE)
        self._limits = limits
        self._most_captured = 0  # sequences
        self.decode_graphs: StepGraphs | None = None
        self.mixed_graphs: StepGraphs | None = None

    def use_graphs(self, capture: Capture) -> None:
        """Capture steps and replay them: of one token a sequence, and all where backends can."""
        sizes = decode_sizes(self._limits.max_num_seqs)
        self._most_captured = sizes[-1]
        tools = StepTools(
            model=self.model,
            backends=self._backends,
            builder=self._builder,
            sampling=self._sampling,
            sampler=self._sampler,
            forbid=self.grammars.masks.forbid,
            max_num_seqs=sizes[-1],
        )
        self.decode_graphs = StepGraphs(DecodeStep(tools), sizes, capture)
        if captures_any(self._backends):
            # A stranger's backend may have an __init__ that keeps none.
            specs = [getattr(backend, "spec", None) for backend in self._backends]
            sizes = mixed_sizes(self._limits.max_num_batched_tokens, filter(None, specs))
            self.mixed_graphs = StepGraphs(MixedStep(tools, sizes[-1]), sizes, capture)

    @property
    def graph_sizes(self) -> list[int]:
        """Sizes that may be captured."""
        kinds = (self.decode_graphs, self.mixed_graphs)
        return [size for graphs in kinds if graphs is not None for size in graphs.sizes]

    @torch.inference_mode()
    def warm_up(self, *, is_compiled: bool = False) -> None:
        """Compile and capture what the smallest and the largest step of each kind need.

        `is_compiled`: another runner did it before.
        """
        if self.mixed_graphs is not None:
            # The first one takes the memory that all others share.
            largest = self.mixed_graphs.sizes[-1]
            self.mixed_graphs.warm_up([largest], [Ending.GREEDY], is_compiled=is_compiled)
        if self.decode_graphs is not None:
            endings = [Ending.GREEDY, *self._endings()]
            sizes = self.decode_graphs.sizes
            ends = [sizes[-1], sizes[0]]
            self.decode_graphs.warm_up(ends, endings, is_compiled=is_compiled)

    @contextlib.contextmanager
    def without_replays(self) -> Iterator[None]:
        """Run captured steps kernel by kernel meanwhile, with the same inputs and shapes."""
        kinds = [graphs for graphs in (self.decode_graphs, self.mixed_graphs) if graphs]
        for graphs in kinds:
            graphs.replays = False
        try:
            yield
        finally:
            for graphs in kinds:
                graphs.replays = True

    def _endings(self) -> list[Ending]:
        """Return how rows that draw may end inside a graph."""
        return [Ending.RANDOM, Ending.FILTERED] if self._sampler.capturable else []

    @torch.inference_mode()
    def dispatch(self, output: SchedulerOutput) -> InFlight:
        """Launch a step: forward, then sample. Nothing here waits for the device."""
        return self.sample(self.forward(output, knows_tokens=True))

    @torch.inference_mode()
    def forward(self, output: SchedulerOutput, *, knows_tokens: bool = False) -> Forwarded:
        """Take over the difference, build the batch and launch the model.

        `knows_tokens`: every token before is on the host, so that masks can be filled meanwhile.
        """
        self._processors.remove(output, self._builder.row_of)
        self.grammars.remove(output, self._builder.row_of)
        self._builder.apply_difference(output)
        for added in (*output.added, *output.resumed):
            self._sampling.add(added)
            self._adjustments.add(added)
            self._logprobs.add(added)
            self._processors.add(added)
            self.grammars.add(added)
        if output.block_copies:
            self._kv_cache.copy_blocks(output.block_copies)
        if knows_tokens:
            self.grammars.begin(self._builder.sampled_rows(output))
        graphs = self._graphs_for(output)
        size = None if graphs is None else graphs.size_for(output.num_tokens)
        if graphs is not None and size is not None:
            return self._replay(output, graphs, size)
        built = self._builder.build(output)
        return self._logits(output.step_id, built, self._hidden(built.batch))

    def begin_masks(self, forwarded: Forwarded) -> None:
        """Begin to fill the masks that `sample` needs, once the tokens before are collected."""
        self.grammars.begin(forwarded.built.sampled_rows)

    def _hidden(self, batch: Batch) -> Tensor:
        """Return the last hidden states of a step that is not captured."""
        batch.plans = [backend.plan(batch, i) for i, backend in enumerate(self._backends)]
        for backend, plan in zip(self._backends, batch.plans, strict=True):
            backend.prepare(plan)
        hidden: Tensor = self.model(self.model.embed(batch.token_ids), batch)
        return hidden

    def _graphs_for(self, output: SchedulerOutput) -> StepGraphs | None:
        """Return the graphs that serve a step of this kind, None where none do."""
        num_seqs = len(output.num_scheduled_tokens)
        if self._builder.scores_prompts or num_seqs > self._most_captured:
            return None
        is_decode = output.num_tokens == num_seqs == len(output.samples)
        return self.decode_graphs if is_decode else self.mixed_graphs

    def _replay(self, output: SchedulerOutput, graphs: StepGraphs, size: int) -> Forwarded:
        loaded = graphs.begin(output, size)
        last = self._ending(loaded.rows)
        ending = Ending.LOGITS if self.grammars.asks(loaded.rows) else last
        result = graphs.run(loaded, size, ending)
        built = BuiltBatch(
            batch=graphs.batch(size),
            sampled_ids=loaded.ids,
            sampled_rows=loaded.rows,
            sampled_positions=loaded.positions,
        )
        forwarded = Forwarded(step_id=output.step_id, built=built, logits=None)
        if ending is Ending.LOGITS:
            forwarded.logits = result[: len(loaded.ids)]
            if last is not Ending.LOGITS:
                forwarded.end = lambda: graphs.end(size, last)
        elif loaded.ids:
            forwarded.tokens = result
        return forwarded

    def _ending(self, rows: list[int]) -> Ending:
        """Return how graphs may sample these rows; those with wishes are sampled outside."""
        if not rows:
            return Ending.GREEDY  # nobody's token, and nothing is drawn
        has_wishes = (
            bool(self._processors)
            or self._logprobs.asks(rows)
            or self._adjustments.asks(rows)
            or self._sampling.holds_back(rows)
        )
        if has_wishes:
            return Ending.LOGITS
        ending = ending_for(self._sampling.flags(rows))
        return ending if ending in (Ending.GREEDY, *self._endings()) else Ending.LOGITS

    def _logits(self, step_id: int, built: BuiltBatch, hidden: Tensor) -> Forwarded:
        """Make the logits that are sampled, and score the tokens of prompts."""
        hidden, prompt = built.batch.kept(hidden), built.prompt
        forwarded = Forwarded(step_id=step_id, built=built, logits=None)
        if prompt is not None and prompt.places:
            forwarded.prompt_scores = score_prompt(
                self.model.logits, hidden, prompt, slice_rows=self._prompt_slice
            )
        if built.sampled_ids:
            if built.sampled_places is not None:
                places = to_device(built.sampled_places, torch.int64, str(self.device))
                hidden = hidden.index_select(0, places)
            forwarded.logits = self.model.logits(hidden)
        return forwarded

    @torch.inference_mode()
    def sample(self, forwarded: Forwarded) -> InFlight:
        """Sample the rows whose last token was computed and keep their tokens on the device."""
        built, logits = forwarded.built, forwarded.logits
        step = InFlight(
            step_id=forwarded.step_id,
            sampled_ids=built.sampled_ids,
            prompt=built.prompt,
            prompt_scores=forwarded.prompt_scores,
        )
        if forwarded.end is not None:
            self.grammars.send(built.sampled_rows)
            step.take_tokens(forwarded.end())
            self.grammars.masks.note_read()
        elif logits is not None:
            self._sample(logits, built, step)
        elif forwarded.tokens is not None:
            step.take_tokens(forwarded.tokens)
        if self.device.type == "cuda":
            step.send_to_host()
        return step

    def _sample(self, logits: Tensor, built: BuiltBatch, step: InFlight) -> None:
        batch, rows = self._sampling.batch(built), built.sampled_rows
        kept = self._logprobs.keep(logits, rows, built.sampled_ids)
        logits = self._adjustments.apply(logits, rows)
        if self._processors:
            logits = self._processors.apply(logits, built, batch.rows)
        logits = self.grammars.apply(logits, rows)
        sampled = self._sampler.sample(logits, batch)
        # A token that is out of range is reported when it is collected; the step that is
        # launched before that must not look it up.
        token_ids = sampled.token_ids[:, 0].clamp(0, self.vocab_size - 1)
        self._builder.last_tokens.index_copy_(0, batch.rows.long(), token_ids.int())
        self._adjustments.count(token_ids, rows)
        if self._processors:
            self._processors.append(batch.rows, token_ids.int())
        step.token_ids, step.status = sampled.token_ids, sampled.status
        step.num_tokens = sampled.num_tokens
        if kept is not None:
            step.scored_ids, step.scores = kept.sequence_ids, kept.score(token_ids)

    def collect(self, step: InFlight) -> StepResult:
        """Wait for a step and return its tokens on the host, and which rows failed."""
        if step.ready is not None:
            step.ready.synchronize()
        prompts = step.prompt_entries()
        if step.token_ids is None:
            return StepResult(step_id=step.step_id, token_ids={}, prompt_logprobs=prompts)
        tokens, errors = step.tokens_and_errors(self.vocab_size)
        self.grammars.accept(tokens, errors)
        return StepResult(
            step_id=step.step_id,
            token_ids=tokens,
            errors=errors,
            logprobs=step.sampled_entries(),
            prompt_logprobs=prompts,
        )
