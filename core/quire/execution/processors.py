"""Apply the loaded logits processors; without any, nothing is kept and nothing runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from quire.errors import PluginError
from quire.execution.batch_builder import BuiltBatch
from quire.interfaces.attention import BatchLimits
from quire.interfaces.sampling import LogitsProcessor, LogitsState
from quire.scheduling.output import AddedSequence, SchedulerOutput


@contextlib.contextmanager
def _named(processor: LogitsProcessor) -> Iterator[None]:
    """Say whose failure it is. Raises: PluginError."""
    try:
        yield
    except Exception as error:
        raise PluginError(
            f"logits processor {processor.name!r} failed: {type(error).__name__}: {error}"
        ) from error


class ProcessorChain:
    """The processors in the order in which they were named, and the token history they read."""

    def __init__(
        self, processors: Sequence[LogitsProcessor], limits: BatchLimits, device: torch.device
    ) -> None:
        self._processors = processors
        self._host_tokens: dict[int, list[int]] = {}
        if processors:
            rows = limits.max_num_seqs
            shape = (rows, limits.max_model_len + 1)
            self._history = torch.zeros(shape, dtype=torch.int32, device=device)
            self._num_tokens = torch.zeros(rows, dtype=torch.int32, device=device)
            self._num_prompt_tokens = torch.zeros(rows, dtype=torch.int32, device=device)

    def __bool__(self) -> bool:
        return bool(self._processors)

    @property
    def needs_host_tokens(self) -> bool:
        """Whether a step must be collected before the next one is scheduled."""
        return any(processor.needs_host_tokens for processor in self._processors)

    def remove(self, output: SchedulerOutput, row_of: Mapping[int, int]) -> None:
        """Forget the rows that this step gives back."""
        if not self._processors:
            return
        for sequence_id in (*output.finished, *output.preempted):
            row = row_of.get(sequence_id)
            if row is not None:
                self._remove_row(row)

    def _remove_row(self, row: int) -> None:
        self._host_tokens.pop(row, None)
        for processor in self._processors:
            with _named(processor):
                processor.remove_row(row)

    def add(self, added: AddedSequence) -> None:
        """Begin to serve a row."""
        if not self._processors:
            return
        row, count = added.row, len(added.token_ids)
        self._history[row, :count] = torch.tensor(added.token_ids, dtype=torch.int32)
        self._num_tokens[row] = count
        self._num_prompt_tokens[row] = added.num_prompt_tokens
        if self.needs_host_tokens:
            self._host_tokens[row] = list(added.token_ids)
        for processor in self._processors:
            with _named(processor):
                processor.add_row(row, added.params.extra_args.get(processor.name), added.params)

    def apply(self, logits: Tensor, built: BuiltBatch, rows: Tensor) -> Tensor:
        """Return the logits after all processors."""
        state = LogitsState(
            rows=rows,
            token_history=self._history,
            num_tokens=self._num_tokens,
            num_prompt_tokens=self._num_prompt_tokens,
            host_rows=built.sampled_rows,
            host_token_ids=self._host_tokens,
        )
        for processor in self._processors:
            with _named(processor):
                found = processor.apply(logits, state)
            if not isinstance(found, Tensor) or found.shape != logits.shape:
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise PluginError(
                    f"logits processor {processor.name!r} returned {got}; it has to return "
                    f"logits {list(logits.shape)}."
                )
            logits = found
        return logits

    def append(self, rows: Tensor, token_ids: Tensor) -> None:
        """Add the sampled tokens to the history."""
        index = rows.long()
        ends = self._num_tokens[index].long()
        self._history[index, ends] = token_ids
        self._num_tokens[index] += 1
        if self.needs_host_tokens:
            for row, token_id in zip(rows.tolist(), token_ids.tolist(), strict=True):
                self._host_tokens[row].append(token_id)
